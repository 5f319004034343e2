"""Explanations: every event really left out, the memory's evidence apart, the steps of the served lists."""

import json
import warnings

import numpy as np
import polars as pl
import pytest

from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.recommend import explain
from m6rec_jax.recommend.attribution import EVENTS, leave_out
from m6rec_jax.recommend.explain import MOST, explained
from m6rec_jax.recommend.gate import Gate
from m6rec_jax.recommend.generate import generate
from m6rec_jax.recommend.histories import Past
from m6rec_jax.recommend.memory import Memory
from m6rec_jax.recommend.recommender import Recommender

K = 4
GATE = Gate(bias=-1.5, length=-0.2, mass=0.5, temperature=1.4)


@pytest.fixture(scope="module", params=["plain", "levels"])
def world(request):
    """(dataset, run, recommender whose memory and model both matter, histories: of one event, of many, with searches)."""
    names = {"plain": ("tiny_dataset", "tiny_run"), "levels": ("tiny_levels", "levels_run")}[request.param]
    data, run = open_dataset(request.getfixturevalue(names[0])), request.getfixturevalue(names[1])
    recommender = Recommender.load(run, dataset=data)
    recommender.gate = GATE
    histories = Past(data).all()
    return data, run, recommender, histories.take([u for u, known in enumerate(histories.known) if len(known)][:12])


@pytest.fixture(scope="module")
def long(world):
    """A recommender's request for one user with more events than the model reads, and than are left out."""
    data, _, recommender, _ = world
    n, rng = 70, np.random.default_rng(5)
    items, times = rng.integers(data.catalogue, size=n).astype(np.int32), np.cumsum(rng.choice([60, 30_000], n))
    return recommender.request([items], [times], K, kinds=[rng.integers(2, size=n).astype(np.uint8)], queries=[{}])


def asked_of(recommender, histories, **options):
    return recommender.request(histories.items, histories.times, K, kinds=histories.kinds, queries=histories.queries, **options)  # fmt: skip


def slowly(engine, asked, u, row, event, heat):
    """log p(row) after a history, and after the same without one event: one user, one item at a time."""
    told = []
    for kept in (np.arange(len(asked.items[u])), np.delete(np.arange(len(asked.items[u])), event)):
        queries = {i: asked.queries[u][p] for i, p in enumerate(kept.tolist()) if p in asked.queries[u]}
        told.append(engine.score([asked.items[u][kept]], [row], times=[asked.times[u][kept]], kinds=[asked.kinds[u][kept]],
                                 queries=[queries], temperatures=[heat])[0, 0])  # fmt: skip
    return told[0] - told[1]


def test_a_drop_is_what_the_model_loses_without_the_event(world):
    _, _, recommender, histories = world
    lists = recommender.recommend_histories(histories, K)
    asked, rng = asked_of(recommender, histories), np.random.default_rng(1)
    heat = np.linspace(0.8, 1.5, len(histories)).astype(np.float32)
    left = leave_out(recommender.engine, asked, lists.rows, heat)
    assert {len(h) for h in histories.items} >= {1, 2}
    for u, history in enumerate(histories.items):
        n = min(len(history), EVENTS)
        assert left.events[u, :n].tolist() == list(range(len(history) - 1, len(history) - 1 - n, -1))
        assert left.read[u, :n].all() and not left.read[u, n:].any() and (left.drops[u, :, n:] == 0).all()
        for at in rng.permutation(n)[:2]:
            place = int(rng.integers(K))
            one = slowly(recommender.engine, asked, u, lists.rows[u, place], left.events[u, at], heat[u])
            assert left.drops[u, place, at] == pytest.approx(one, abs=1e-4)
    assert np.abs(left.drops).max() > 0.1  # events matter, so that zeros would not pass


def test_an_event_beyond_what_the_model_reads_has_no_drop(world, long):
    _, _, recommender, _ = world
    engine, rows = recommender.engine, np.array([[3, 9]])
    left = leave_out(engine, long, rows)
    reads = sum(1 for row in engine.prompts(long.items, long.times, long.kinds)[0][1] if row >= 0)
    assert left.events[0].tolist() == list(range(69, 69 - EVENTS, -1))
    assert left.read[0].sum() == min(reads, EVENTS) and not left.read[0, reads:].any()
    assert (left.drops[0][:, ~left.read[0]] == 0).all()
    assert reads < 70 and (engine.codes.shape[1] == 1 or reads < EVENTS)
    for at in (0, min(reads, EVENTS) - 1):  # with the oldest that is read gone, an older one moves up
        assert left.drops[0, 1, at] == pytest.approx(slowly(engine, long, 0, 9, left.events[0, at], 1.0), abs=1e-4)


def test_all_events_of_a_block_of_users_are_one_call_of_the_engine(world, monkeypatch):
    _, _, recommender, histories = world
    lists, calls, inner = recommender.recommend_histories(histories, K), [], recommender.engine.logp
    monkeypatch.setattr(recommender.engine, "logp", lambda h, *rest, **options: calls.append(len(h)) or inner(h, *rest, **options))  # fmt: skip
    whole = explained(recommender, asked_of(recommender, histories), lists)
    assert calls == [sum(1 + min(len(h), EVENTS) for h in histories.items)]
    monkeypatch.setattr(explain, "BLOCK", 5)
    small = explained(recommender, asked_of(recommender, histories), lists)
    assert len(calls) == 4 and sum(calls[1:]) == calls[0]
    same(whole, small)


def same(a: pl.DataFrame, b: pl.DataFrame) -> None:
    """The same explanations, up to what float32 sums are off."""
    for one, other in zip(a.to_dicts(), b.to_dicts(), strict=True):
        assert one["evidence"] == other["evidence"] and one["memory_share"] == pytest.approx(other["memory_share"], abs=1e-4)  # fmt: skip
        drops = [[event["drop"] for event in x["attribution"]] for x in (one, other)]
        assert drops[0] == pytest.approx(drops[1], abs=1e-4)
        near = {e["event"]: e["drop"] for e in other["attribution"]}
        last = min(drops[1], default=0)
        assert all(e["drop"] == pytest.approx(near.get(e["event"], last), abs=2e-4) for e in one["attribution"])


def test_a_user_alone_is_explained_as_among_others(world):
    _, _, recommender, histories = world
    lists = recommender.recommend_histories(histories, K)
    mixed = np.random.default_rng(0).permutation(len(histories))
    asked = asked_of(recommender, histories)
    whole = explained(recommender, asked.take(mixed), lists.of(mixed))
    for place, u in enumerate(mixed[:2]):
        one = np.array([u])
        same(explained(recommender, asked.take(one), lists.of(one)), whole[place * K : place * K + K])


def test_memory_and_model_are_told_of_apart(world):
    data, _, recommender, histories = world
    lists = recommender.recommend_histories(histories, K)
    told = explained(recommender, asked_of(recommender, histories), lists).to_dicts()
    known = histories.known
    support, gate = recommender.gated_support(known, recommender.seen(asked_of(recommender, histories)))
    shares = []
    for (u, place), one in zip(np.argwhere(lists.rows >= 0), told, strict=True):
        row = lists.rows[u, place]
        mass = float(support.mass[u][support.rows[u] == row].sum())
        p = np.exp(recommender.engine.logp([histories.items[u]], [[row]], times=[histories.times[u]], kinds=[histories.kinds[u]],
                                           queries=[histories.queries[u]], temperature=GATE.heat(gate[u : u + 1]))[0][0])  # fmt: skip
        assert one["memory_share"] == pytest.approx(gate[u] * mass / ((1 - gate[u]) * p + gate[u] * mass), abs=1e-3)
        assert bool(one["evidence"]) == (mass > 0) == (one["memory_share"] > 0)
        assert sum(e["share"] for e in one["evidence"]) <= 1 + 1e-9 and len(one["evidence"]) <= MOST
        assert {e["item_id"] for e in one["evidence"]} <= {data.item_ids[i] for i in known[u]}
        n, drops = len(histories.items[u]), [e["drop"] for e in one["attribution"]]
        assert drops == sorted(drops, reverse=True) and len(drops) == min(MOST, n)
        for e in one["attribution"]:
            item = histories.items[u][e["event"]]
            assert e["item_id"] == (data.item_ids[item] if item >= 0 else None)
        shares.append(one["memory_share"])
    assert min(shares) < 0.5 < max(shares)
    full = explained(recommender, asked_of(recommender, histories), lists)
    left = leave_out(recommender.engine, asked_of(recommender, histories), lists.rows, GATE.heat(gate))
    best = left.drops.max(2)[lists.rows >= 0]
    first = full["attribution"].list.first().struct.field("drop").to_numpy()
    assert first[best > 0] == pytest.approx(best[best > 0], abs=1e-4)


@pytest.mark.parametrize("rule", ["none", "filter", "candidates"])
def test_steps_multiply_to_the_model_part_of_the_served_score(world, rule):
    data, _, recommender, histories = world
    allowed = np.arange(data.catalogue) % 3 != 0 if rule == "filter" else None
    own = [np.arange(u, data.catalogue, 5) for u in range(len(histories))] if rule == "candidates" else None
    lists = recommender.recommend_histories(histories, K, allowed=allowed, candidates=own)
    asked = asked_of(recommender, histories, allowed=allowed, candidates=own)
    told = explained(recommender, asked, lists, explain=False, show_steps=True)
    assert told.columns == ["steps"] and told.height == (lists.rows >= 0).sum()
    support, gate = recommender.gated_support(histories.known, recommender.seen(asked), allowed, own)
    for (u, place), steps in zip(np.argwhere(lists.rows >= 0), told["steps"].to_list(), strict=True):
        row = lists.rows[u, place]
        assert [s["code"] for s in steps] == recommender.engine.codes[row].tolist()
        assert [s["level"] for s in steps] == list(range(1, data.levels + 1))
        p, mass = np.prod([s["probability"] for s in steps]), float(support.mass[u][support.rows[u] == row].sum())
        assert np.log((1 - gate[u]) * p + gate[u] * mass) == pytest.approx(lists.scores[u, place], abs=1e-4)
        may = np.ones(data.catalogue, bool) if allowed is None else allowed.copy()
        if own is not None:
            may &= np.isin(np.arange(data.catalogue), own[u])
        if not recommender.repeat:
            may[histories.known[u]] = False
        assert steps[0]["choices"] == len(np.unique(recommender.engine.codes[may, 0]))
        for s in steps:
            others = [o["probability"] for o in s["alternatives"]]
            assert s["code"] not in [o["code"] for o in s["alternatives"]]
            assert others == sorted(others, reverse=True) and len(others) == min(explain.OTHERS, s["choices"] - 1)
            assert (s["place"] == 1) == all(s["probability"] >= o for o in others)
        named = [o["item_id"] for o in steps[-1]["alternatives"]]
        assert all(may[data.item_ids.index(item)] for item in named)


def test_lists_that_no_model_made_have_no_model_to_explain(world):
    _, _, recommender, histories = world
    asked = asked_of(recommender, histories)
    lists = recommender.recommend_histories(histories, 30, engine="memory")
    told = explained(recommender, asked, lists, show_steps=True)
    assert told["attribution"].list.len().sum() == told["steps"].list.len().sum() == 0
    support = recommender.memory.support(histories.known, exclude=recommender.seen(asked))
    carried = np.array([row in set(rows.tolist()) for rows, listed in zip(support.rows, lists.rows, strict=True) for row in listed if row >= 0])  # fmt: skip
    assert told["memory_share"].to_numpy() == pytest.approx(carried.astype(float), abs=1e-6) and carried.any()
    assert np.array_equal(told["evidence"].list.len().to_numpy() > 0, carried)
    popular = recommender.recommend_histories(histories, K, engine="popularity")
    told = explained(recommender, asked, popular, show_steps=True)
    assert told.height == K * len(histories) and told["memory_share"].sum() == 0
    assert sum(told[name].list.len().sum() for name in ("evidence", "attribution", "steps")) == 0
    none = [np.zeros(0, np.int32)] * len(histories)
    nobody = recommender.recommend_histories(histories, K, candidates=none)
    assert (
        explained(recommender, asked_of(recommender, histories, candidates=none), nobody, show_steps=True).height == 0
    )
    empty = recommender.request([np.zeros(0, np.int32)], None, K)
    assert explained(recommender, empty, recommender.recommend_rows([np.zeros(0, np.int32)], k=K)).height == K


def test_one_history_is_explained_in_python(world):
    data, run, _, _ = world
    recommender = Recommender.load(run)
    recommender.gate, recommender.memory = GATE, Memory(data.transitions)
    history = [data.item_ids[3], "never heard", data.item_ids[8], data.item_ids[20]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = recommender.recommend(history, K)
        told = recommender.recommend(history, K, explain=True, show_steps=True)
    assert [one.item_id for one in plain] == [one.item_id for one in told]
    assert all(one.explanation is None and one.steps is None for one in plain)
    for one in told:
        assert {(e["event"], e["item_id"]) for e in one.explanation["attribution"]} == {(i, history[i]) for i in (0, 2, 3)}  # fmt: skip
        assert len(one.steps) == data.levels and json.dumps([one.explanation, one.steps])


def test_generate_adds_the_columns_that_were_asked_for(world, tmp_path):
    data, run, _, histories = world
    few, many = (f([len(h) for h in histories.items]) for f in (np.argmin, np.argmax))
    ids, out = data.users["user_id"].gather(histories.users).to_list(), tmp_path / "why.parquet"
    users = [ids[few], ids[many], "stranger"]
    generate(run, data, users, k=K, out=out)
    plain = pl.read_parquet(out)
    generate(run, data, users, k=K, out=out, explain=True)
    table = pl.read_parquet(out)
    assert table.columns == [*plain.columns, "memory_share", "evidence", "attribution"]
    assert table.select(plain.columns).drop("score").equals(plain.drop("score"))
    manifest = json.loads((tmp_path / "why.parquet.parts" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["job"]["explain"] is True
    lengths = table.group_by("user_id", maintain_order=True).agg(pl.col("attribution").list.len().max())
    assert lengths["attribution"].to_list() == [len(histories.items[few]), MOST, 0]
    generate(run, data, users, k=K, out=out, explain=True, show_steps=True)
    table = pl.read_parquet(out)
    assert table.columns[-1] == "steps" and table["steps"].list.len().to_list() == [data.levels] * 2 * K + [0] * K
    assert [json.loads(line)["user_id"] for line in table.write_ndjson().splitlines()] == table["user_id"].to_list()
