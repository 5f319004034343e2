import itertools
import shutil
import warnings
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from flax import nnx

from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.prepare import prepare
from m6rec_jax.decoding.wave import Wave
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.baselines import CountingFloor, ItemKNN, Popularity
from m6rec_jax.recommend.coldstart import SOURCES
from m6rec_jax.recommend.evaluate import evaluate
from m6rec_jax.recommend.gate import Gate
from m6rec_jax.recommend.gating import with_gate
from m6rec_jax.recommend.histories import held_out, interactions
from m6rec_jax.recommend.lists import MEMORY, MODEL, POPULARITY
from m6rec_jax.recommend.memory import FLOOR, Memory
from m6rec_jax.recommend.recommender import Recommender
from tests.fixtures import tiny_card, tiny_tables


@pytest.fixture(scope="module", params=["plain", "levels"])
def world(request):
    """(dataset, run, recommender with its gate) for one and for three code levels."""
    names = {"plain": ("tiny_dataset", "tiny_run"), "levels": ("tiny_levels", "levels_run")}[request.param]
    data, run = open_dataset(request.getfixturevalue(names[0])), request.getfixturevalue(names[1])
    return data, run, with_gate(Recommender.load(run, dataset=data), run, data)


def test_one_line_gives_ranked_new_items(world):
    data, run, _ = world
    history = data.item_ids[3:7]
    got = Recommender.load(run).recommend(history, k=10)
    assert [r.rank for r in got] == list(range(1, 11)) and len({r.item_id for r in got}) == 10
    assert not {r.item_id for r in got} & set(history) and {r.item_id for r in got} <= set(data.item_ids)
    assert all(a.score >= b.score > 0 for a, b in itertools.pairwise(got)) and got[0].score <= 1
    assert {r.source for r in got} <= set(SOURCES[1:]) and {r.route for r in got} == {"model+memory"}
    titles = dict(zip(data.item_ids, data.items["title"].to_list(), strict=True))
    assert all(r.title == titles[r.item_id] for r in got)
    assert all(bool(r.because) == (r.source == "memory") for r in got)
    assert all(title in {titles[i] for i in history} for r in got for title in r.because)


def test_a_run_serves_alone_as_with_its_dataset(world):
    data, run, recommender = world
    asked = held_out(data, "test")
    alone = Recommender.load(run).recommend_histories(asked)
    beside = recommender.recommend_histories(asked)
    assert np.array_equal(alone.rows, beside.rows) and np.allclose(alone.scores, beside.scores, atol=1e-5)


def test_a_run_writes_texts_of_its_own_tokenizer(world):
    data, run, recommender = world
    for engine in (Recommender.load(run).engine, recommender.engine):
        [text] = engine.write(["red shoes"], most=4, temperature=0.0)
        assert text.text == data.tokenizer.decode(text.tokens) and len(text.tokens) <= 4
        assert "".join(engine.stream("red shoes", most=4, temperature=0.0)) == text.text


def test_lists_are_the_mixture_of_model_and_memory(world):
    """Equal to enumerating the catalogue: (1-g) p_model + g p_memory for every item, sorted."""
    data, _, recommender = world
    asked = held_out(data, "test").take(range(8))
    known = [h[h >= 0] for h in asked.items]
    old, recommender.gate = recommender.gate, Gate(bias=0.3, length=-0.2, mass=0.5)
    try:
        lists = recommender.recommend_histories(asked, 10, beams=data.catalogue)
        support, gate = recommender.gated_support(known, known)
    finally:
        recommender.gate = old
    assert gate.min() > 0.05 and gate.max() < 0.95
    for u in range(len(asked)):
        one = asked.take([u] * data.catalogue)
        every = np.arange(data.catalogue)
        p = np.exp(recommender.engine.score(one.items, every, times=one.times, kinds=one.kinds, queries=one.queries))
        mass = np.zeros(data.catalogue)
        there = support.rows[u] >= 0
        mass[support.rows[u][there]] = support.mass[u][there]
        mixed = (1 - gate[u]) * p + gate[u] * mass
        by_memory = gate[u] * mass > (1 - gate[u]) * p
        mixed[known[u]] = -1
        best = np.sort(mixed)[::-1][:10]
        assert lists.exact[u]
        assert np.exp(lists.scores[u]) == pytest.approx(best, rel=1e-3)
        assert mixed[lists.rows[u]] == pytest.approx(best, rel=1e-3)
        assert np.array_equal(lists.sources[u] == MEMORY, by_memory[lists.rows[u]])


def test_what_was_read_of_a_known_user_is_kept_and_the_list_is_the_same(world, monkeypatch):
    data, _, recommender = world
    ran = []
    for name in ("read", "keep", "append"):
        original = getattr(Wave, name)
        monkeypatch.setattr(Wave, name, lambda *args, name=name, way=original: ran.append(name) or way(*args))
    recommender.engine.cache.clear()
    history = data.item_ids[3:7]
    for asked, way in ((history, "keep"), ([*history, data.item_ids[20]], "append")):
        known, stranger = recommender.recommend(asked, 5, user="ann"), recommender.recommend(asked, 5)
        assert ran == [way, "read"] and recommender.engine.cache.users == ["ann"]
        assert [r.item_id for r in known] == [r.item_id for r in stranger]
        assert [r.score for r in known] == pytest.approx([r.score for r in stranger], rel=1e-4)
        ran.clear()
    recommender.recommend_rows([np.zeros(0, int), np.array([1, 2])], k=5, users=["eve", "bob"])
    assert recommender.engine.cache.users == ["ann", "bob"]  # each way takes its own users along
    with pytest.raises(InputError, match="1 histories, 2 users"):
        recommender.recommend_rows([np.array([1])], users=["bob", "eve"])


def test_unknown_items_are_left_out_with_a_warning(world):
    data, _, recommender = world
    known = data.item_ids[5:8]
    with pytest.warns(UserWarning, match="2 of 5 history items"):
        some = recommender.recommend(["never-heard", *known, "gone"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [r.item_id for r in some] == [r.item_id for r in recommender.recommend(known)]
    rows, unknown = recommender.rows_of(["x", known[0]])
    assert rows.tolist() == [5] and unknown == 1


@pytest.mark.parametrize("history", [[], ["only", "unknown"]])
@pytest.mark.filterwarnings("ignore:.*history items")
def test_without_a_known_item_the_list_is_by_popularity(world, history):
    """What was taken lately beside the dataset, which has times; of all time where the run is alone."""
    data, run, recommender = world
    train = pl.read_parquet(data.path / "events.parquet").filter((pl.col("split") == 0) & (pl.col("item") >= 0))
    age = (train["time"].max() - train["time"]).to_numpy()
    recent = np.zeros(data.catalogue)
    np.add.at(recent, train["item"].to_numpy(), 0.5 ** (age / np.median(age)))
    events = data.items["events"].to_numpy()
    got = Recommender.load(run).recommend(history, 5)
    assert [r.item_id for r in got] == [data.item_ids[i] for i in np.lexsort((np.arange(len(events)), -events))[:5]]
    got, events = recommender.recommend(history, 5), recent
    assert [r.item_id for r in got] == [data.item_ids[i] for i in np.lexsort((np.arange(len(events)), -events))[:5]]
    assert {(r.source, r.route) for r in got} == {("popularity", "popularity")}
    assert all(a.score >= b.score for a, b in itertools.pairwise(got))


def test_k_beyond_the_catalogue_returns_what_there_is(world):
    data, _, recommender = world
    got = recommender.recommend(data.item_ids[:2], 1000)
    assert len(got) == data.catalogue - 2 and all(a.score >= b.score for a, b in itertools.pairwise(got))
    assert len(recommender.recommend([], 1000)) == data.catalogue
    assert recommender.recommend(data.item_ids, 10) == []
    lists = recommender.recommend_rows([np.array([1, 2])], k=1000)
    assert lists.rows.shape == (1, 1000) and (lists.rows[0, data.catalogue - 2 :] == -1).all()
    with pytest.raises(InputError, match="k=0"):
        recommender.recommend([], 0)


@pytest.mark.parametrize("engine", ["auto", "model", "memory", "popularity"])
def test_filters_hold_on_every_way(world, engine):
    data, _, recommender = world
    asked, allowed = held_out(data, "test"), np.arange(data.catalogue) % 3 == 0
    lists = recommender.recommend_histories(asked, 10, engine=engine, allowed=allowed)
    for history, row in zip(asked.items, lists.rows, strict=True):
        assert allowed[row[row >= 0]].all() and not set(row.tolist()) & set(history[history >= 0].tolist())
        assert (row >= 0).sum() == min(10, (allowed & ~np.isin(np.arange(data.catalogue), history)).sum())
    expected = {"model": {MODEL, MEMORY, POPULARITY}, "memory": {MEMORY, POPULARITY}, "popularity": {POPULARITY}}
    assert set(lists.sources[lists.rows >= 0].tolist()) <= expected.get(engine, expected["model"])


def test_order_and_batch_do_not_change_a_list(world):
    data, run, recommender = world
    asked = held_out(data, "test")
    whole = recommender.recommend_histories(asked)
    mixed = np.random.default_rng(0).permutation(len(asked))
    small = with_gate(Recommender.load(run, dataset=data, batch=32), run, data).recommend_histories(asked.take(mixed))
    assert np.allclose(small.scores, whole.scores[mixed], atol=1e-4)
    assert (small.rows == whole.rows[mixed]).mean() > 0.99


def test_memory_off_leaves_the_model_alone(world):
    data, _, recommender = world
    asked = held_out(data, "test")
    alone = recommender.recommend_histories(asked, memory=False)
    assert set(alone.routes.tolist()) == {"model"} and set(np.unique(alone.sources)) == {MODEL}
    model = recommender.engine.recommend(
        asked.items,
        times=asked.times,
        kinds=asked.kinds,
        queries=asked.queries,
        exclude=[h[h >= 0] for h in asked.items],
    )
    assert np.array_equal(alone.rows, model.rows)


def test_an_observed_event_shows_in_the_next_list(world):
    data, run, _ = world
    recommender = with_gate(Recommender.load(run, dataset=data), run, data)
    recommender.gate = Gate(bias=3.0, length=0.0, mass=0.0)
    history, new = np.array([4, 9, 20]), 33
    before = recommender.recommend_rows([history]).rows[0].tolist()
    for _ in range(60):
        recommender.memory.observe(history, new)
    after = recommender.recommend([data.item_ids[i] for i in history])
    assert before[0] != new and after[0].item_id == data.item_ids[new] and after[0].source == "memory"
    assert set(after[0].because) <= {data.items["title"][i] for i in history.tolist()}


def test_without_a_checkpoint_memory_and_item_knn_answer(world, tmp_path):
    data, run, _ = world
    shutil.copytree(run, tmp_path / "young", ignore=shutil.ignore_patterns("checkpoints", "gate.json"))
    young = Recommender.load(tmp_path / "young", dataset=data)
    young.memory = Memory(
        data.transitions, FLOOR
    )  # one that does not know everything, so that something is left to add
    lists = young.recommend_histories(held_out(data, "test"), 40)
    assert set(lists.routes.tolist()) == {"memory"} and (lists.rows >= 0).all()
    assert {SOURCES[s] for s in np.unique(lists.sources)} <= {"memory", "popularity"}
    assert (np.diff(lists.sources.astype(int), axis=1) >= 0).all()  # popularity last, and what item-kNN adds is memory
    asked = held_out(data, "test")
    known = [h[h >= 0] for h in asked.items]
    support, neighbours = young.memory.support(known, exclude=known), young.knn.rank(known, 40)
    added = 0
    for user, row in enumerate(lists.rows):
        beyond = ~np.isin(row, support.rows[user]) & np.isin(row, neighbours[user]) & (lists.sources[user] == MEMORY)
        added += beyond.sum()
    assert added > 0
    young.memory = None
    alone = young.recommend_histories(asked, 5)
    assert set(alone.routes.tolist()) == {"item-knn"} and (alone.sources == MEMORY).any()
    assert set(young.table(["x"] * len(asked), asked.items, alone)["reason"]) == {""}  # nobody counted what is behind
    assert (np.diff(lists.scores, axis=1) <= 0).all()
    assert young.model_version == "young@none"
    assert Recommender.load(tmp_path / "young").recommend(data.item_ids[:1])[0].route == "memory"
    with pytest.raises(InputError, match="no usable checkpoint"):
        Recommender.load(tmp_path / "young", engine="model")


def test_the_memory_answers_alone_when_asked_to(world):
    data, run, _ = world
    recommender, asked = Recommender.load(run, dataset=data), held_out(data, "test")
    recommender.gate = None
    lists = recommender.recommend_histories(asked, engine="memory")
    known = [h[h >= 0] for h in asked.items]
    ranked = recommender.memory.support(known, exclude=known).rows[:, :10]
    assert (
        np.array_equal(lists.rows[ranked >= 0], ranked[ranked >= 0]) and (lists.sources[ranked < 0] == POPULARITY).all()
    )
    assert set(lists.routes.tolist()) == {"memory"}
    assert set(recommender.recommend_histories(asked).routes.tolist()) == {"model"}
    light = Recommender.load(run, engine="memory")
    assert light.engine is None and np.array_equal(light.recommend_histories(asked, engine="memory").rows, lists.rows)


def test_a_dataset_of_another_make_is_refused(tiny_run, tiny_levels, tmp_path):
    with pytest.raises(InputError, match="prepare it with --like"):
        Recommender.load(tiny_run, dataset=tiny_levels)
    with pytest.raises(InputError, match="not a run|no such folder"):
        Recommender.load(tmp_path)


@pytest.mark.parametrize("levels", [1, 3])
def test_codes_that_mean_other_things_are_refused(levels, request, tmp_path):
    """Same tokenizer, same widths, same sizes: only the rows (or the codebooks) are others."""
    dataset, run = (("tiny_dataset", "tiny_run"), ("tiny_levels", "levels_run"))[levels == 3]
    dataset, run = request.getfixturevalue(dataset), request.getfixturevalue(run)
    made = tmp_path / "other"
    shutil.copytree(dataset, made)
    if levels == 1:
        items = pl.read_parquet(made / "items.parquet")
        items[np.random.default_rng(0).permutation(items.height)].write_parquet(made / "items.parquet")
    else:
        with np.load(made / "codes.npz", allow_pickle=False) as stored:
            arrays = dict(stored)
        arrays["codebook_1"] = arrays["codebook_1"][::-1]
        np.savez(made / "codes.npz", **arrays)
    with pytest.raises(InputError, match=f"other.*prepare it with --like {run}"):
        Recommender.load(run, dataset=made)


def test_an_item_that_came_after_training_is_its_content_alone(world, tmp_path):
    data, run, _ = world
    new = [f"new-{n}" for n in range(4)]
    tables = tiny_tables(kinds=data.levels > 1)
    events = tables["events"].drop_nulls("i")
    bought = pl.concat([events.head(4).with_columns(i=pl.Series(new), t=pl.lit(n), u=pl.lit(f"v{m}"))
                        for m in range(3) for n in range(4)], how="vertical_relaxed")  # fmt: skip
    items = pl.concat([tables["items"], tables["items"].head(4).with_columns(id=pl.Series(new))])
    card = tiny_card(tables | {"events": pl.concat([tables["events"], bought], how="vertical_relaxed"), "items": items})
    grown = prepare(card, tmp_path / "grown", like=run)
    assert grown.item_ids[-4:] == new and grown.seen[-4:].all()
    engine = Recommender.load(run, dataset=grown).engine
    seen = np.asarray(engine.items.seen)
    assert seen[: data.catalogue].tolist() == data.seen.tolist() and not seen[data.catalogue :].any()
    if data.levels > 1:
        return
    model = nnx.merge(engine._define, engine.params)
    table = np.asarray(model.embeddings.table(1, engine.items))
    content = np.asarray(engine.items.content) @ np.asarray(model.embeddings.content[...])
    assert table[data.catalogue : grown.catalogue] == pytest.approx(content[data.catalogue : grown.catalogue], abs=1e-5)


def test_what_has_left_the_shop_is_not_shown(world, tmp_path):
    data, run, _ = world
    events = data.items["events"].to_numpy()
    gone = {data.item_ids[i] for i in np.argsort(-events)[:6]}  # the most popular ones, no less
    tables = tiny_tables(kinds=data.levels > 1)
    less = tables | {
        "items": tables["items"].filter(~pl.col("id").is_in(gone)),
        "events": tables["events"].filter(~pl.col("i").is_in(gone) | pl.col("i").is_null()),
    }
    later = prepare(tiny_card(less), tmp_path / "later", like=run)
    off = np.array([item in gone for item in later.item_ids])
    assert later.catalogue == data.catalogue and off.sum() == 6
    rows = np.flatnonzero(off)
    # The shop forgot them, the memory and the counts need not have: they do as they did.
    items = later.items.with_columns(events=data.items["events"], seen=data.items["seen"])
    later = replace(later, items=items)
    recommender = with_gate(Recommender.load(run, dataset=later), run, later)
    recommender.memory = Memory(data.transitions)
    asked = held_out(later, "test")
    some = np.arange(later.catalogue) % 2 == 0
    for engine in ("auto", "memory", "popularity"):
        for allowed in (None, some):
            lists = recommender.recommend_histories(asked, 10, engine=engine, allowed=allowed)
            assert (lists.rows >= 0).all() and not np.isin(lists.rows, rows).any()
            assert allowed is None or allowed[lists.rows].all()
    popularity, known = Popularity.of(items), [h[h >= 0] for h in asked.items]
    for ranker in (popularity, CountingFloor.of(data.transitions, popularity), ItemKNN(interactions(data), popularity)):
        listed = ranker.rank(known, 10)
        assert (listed >= 0).all() and not np.isin(listed, rows).any()
    assert recommender.recommend([data.item_ids[i] for i in rows], 3)[0].route == "model+memory"  # known, not shown
    report = evaluate(run, "test", dataset=later)
    assert report["metrics"]["valid_id_rate"] == report["baselines"]["item_knn"]["valid_id_rate"] == 1.0
    assert f"{later.catalogue - 6} listed items of a catalogue of {later.catalogue}" in report["protocol"]


def test_table_has_the_columns_of_the_contract(world):
    data, _, recommender = world
    asked = held_out(data, "test")
    lists = recommender.recommend_histories(asked)
    table = recommender.table(data.users["user_id"].gather(asked.users).to_list(), asked.items, lists)
    assert table.columns == ["user_id", "item_id", "rank", "score", "source", "route", "reason", "model_version"]
    assert table.height == (lists.rows >= 0).sum() and table.null_count().sum_horizontal().item() == 0
    first = table.filter(pl.col("user_id") == data.users["user_id"][int(asked.users[3])])
    assert first["item_id"].to_list() == [data.item_ids[i] for i in lists.rows[3] if i >= 0]
    assert first["rank"].to_list() == list(range(1, 11))
    assert ((table["source"] == "memory") == (table["reason"] != "")).all()
