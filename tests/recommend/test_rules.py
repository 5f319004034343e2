"""Rules of lists: what may stand in them, how often, in what variety, and which share is new."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.candidates import candidate_table, candidates_of, read_candidates
from m6rec_jax.recommend.filters import filter_mask
from m6rec_jax.recommend.gate import Gate
from m6rec_jax.recommend.generate import generate
from m6rec_jax.recommend.histories import held_out
from m6rec_jax.recommend.lists import Lists
from m6rec_jax.recommend.recommender import Recommender
from m6rec_jax.recommend.reranking import Rules, chosen, kept, values_of

K, C = 10, 40
ENGINES = ("auto", "memory", "popularity")


@pytest.fixture(scope="module", params=["plain", "levels"])
def world(request):
    """(dataset, run, recommender whose memory and model both matter and to whom every fourth item is new, histories)."""
    names = {"plain": ("tiny_dataset", "tiny_run"), "levels": ("tiny_levels", "levels_run")}[request.param]
    data, run = open_dataset(request.getfixturevalue(names[0])), request.getfixturevalue(names[1])
    recommender = Recommender.load(run, dataset=data)
    recommender.gate = Gate(bias=0.3, length=-0.2, mass=0.5)
    recommender.items = data.items.with_columns(seen=pl.int_range(pl.len()) % 4 != 0)
    return data, run, recommender, held_out(data, "test").take(range(8))


def same(a: Lists, b: Lists) -> None:
    assert np.array_equal(a.rows, b.rows) and np.array_equal(a.sources, b.sources) and (a.routes == b.routes).all()
    np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5, atol=1e-4)


# -- choosing ------------------------------------------------------------------------------------------------------


def slowly(rules: Rules, pool: list[int], scores: list[float], fresh: list[int], worth: list[float], k: int) -> list[int]:  # fmt: skip
    """The rules of the module's first lines, one item at a time."""
    score = dict(zip(fresh, worth, strict=True)) | dict(zip(pool, scores, strict=True))
    unit = None if rules.content is None else rules.content / np.linalg.norm(rules.content, axis=1, keepdims=True)
    made: list[int] = []
    for place in range(1, k + 1):

        def lets_through(item):
            full = rules.values is not None and any(
                sum(value in rules.values[other] for other in made) >= rules.cap for value in rules.values[item] if value >= 0
            )  # fmt: skip
            return item not in made and not full

        def gain(item):
            if not rules.diversity:
                return 0.0  # the first in order
            alike = max((float(unit[item] @ unit[other]) for other in made), default=-1.0)
            return (1 - rules.diversity) * np.exp(score[item] - max(scores)) - rules.diversity * alike

        open_ = [i for i in pool if lets_through(i)]
        if rules.new is not None and sum(rules.new[i] for i in made) < np.floor(rules.share * place + 1e-9):
            due = [i for i in dict.fromkeys([*pool, *fresh]) if rules.new[i] and lets_through(i)]
            open_ = due or open_
        if not open_:
            break
        made.append(max(open_, key=gain))
    return made


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32 - 1), cap=st.integers(0, 3), D=st.sampled_from([0.0, 0.4, 1.0]), share=st.sampled_from([0.0, 0.2, 0.3, 1.0]),
       n=st.integers(1, C))  # fmt: skip
def test_choosing_is_the_slow_way_at_once(seed, cap, D, share, n):
    rng = np.random.default_rng(seed)
    order, scores = rng.permutation(C), -np.sort(rng.exponential(size=C)).astype(np.float32)
    new, values = rng.random(C) < 0.3, rng.integers(-1, 4, (C, 2)).astype(np.int32)
    values[values[:, 0] == values[:, 1], 1] = -1  # an item has a value once
    rules = Rules(
        np.ones(C, bool), values=values if cap else None, cap=cap, diversity=D, share=share,
        content=rng.normal(size=(C, 3)).astype(np.float32) if D else None, new=new if share else None,
    )  # fmt: skip
    pool, late = np.arange(C) < n, new[order]
    first, second = order[pool], order[late][:n]
    as_lists = lambda rows, s: replace(Lists.empty(1, len(rows)), rows=rows[None].astype(np.int32), scores=s[None])  # noqa: E731
    fresh = as_lists(second, scores[late][:n]) if share and len(second) else None
    places = chosen(rules, as_lists(first, scores[pool]), fresh, K)[0]
    assert (np.diff(places[places >= 0]) > 0).all() or D or share  # with a cap alone, order is kept
    made = np.concatenate([first, second])[places[places >= 0]].tolist()
    assert made == slowly(rules, first.tolist(), scores[pool].tolist(), second.tolist(), scores[late][:n].tolist(), K)
    assert (places[len(made) :] == -1).all()


def test_new_items_stand_where_the_share_puts_them():
    """None is good enough by itself: the j-th stands at ceil(j / share), and the others keep their order."""
    rows = np.arange(30, dtype=np.int32)[None]
    pool = replace(Lists.empty(1, 20), rows=rows[:, :20], scores=-rows[:, :20].astype(np.float32))
    fresh = replace(Lists.empty(1, 10), rows=rows[:, 20:], scores=-rows[:, 20:].astype(np.float32))
    assert 0.29 * 100 < 29 == Rules(np.ones(30, bool), new=np.arange(30) >= 20, share=0.29).due(100)
    for share, at in ((0.2, [5, 10]), (0.3, [4, 7, 10]), (0.1, [10]), (0.05, []), (1.0, list(range(1, 11)))):
        places = chosen(Rules(np.ones(30, bool), new=np.arange(30) >= 20, share=share), pool, fresh, 10)[0]
        assert (np.flatnonzero(places >= 20) + 1).tolist() == at
        assert places[places < 20].tolist() == list(range(10 - len(at)))
        assert places[places >= 20].tolist() == list(range(20, 20 + len(at)))


# -- from model and memory to lists --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_rules_that_forbid_nothing_change_nothing(world, engine):
    _, _, recommender, asked = world
    plain = recommender.recommend_histories(asked, K, engine=engine, beams=64)
    assert (np.diff(plain.scores, axis=1) <= 0).all()
    for rules in ({"per": "category", "cap": K}, {"new_items": 0.01}, {"diversity": 1e-12}):
        same(recommender.recommend_histories(asked, K, engine=engine, beams=64, **rules), plain)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("per", "cap"), [("category", 1), ("brand", 2), ("price", 1)])
def test_no_list_breaks_a_cap_and_each_is_the_longest_in_order(world, engine, per, cap):
    data, _, recommender, asked = world
    items = data.items.with_columns(brand=pl.col("attributes").list.first())
    recommender, whole = rules_over(recommender, items), recommender.recommend_histories(asked, data.catalogue, engine=engine)  # fmt: skip
    lists = recommender.recommend_histories(asked, K, engine=engine, beams=64, per=per, cap=cap)
    cells = {"category": items["categories"].list.first(), "price": items["num_price"], "brand": items["brand"]}[per]  # fmt: skip
    for user, row in enumerate(lists.rows):
        expected, taken = [], []
        for item in whole.rows[user][whole.rows[user] >= 0].tolist():
            if len(expected) < K and (cells[item] is None or taken.count(cells[item]) < cap):
                expected.append(item)
                taken.append(cells[item])
        assert row[row >= 0].tolist() == expected
        assert len(expected) == K or per == "category"  # there are six categories, so deeper lists were asked for
        assert not set(expected) & set(asked.items[user].tolist())


def rules_over(recommender: Recommender, items: pl.DataFrame) -> Recommender:
    """A recommender like this one over other facts of its items."""
    made = Recommender.__new__(Recommender)
    made.__dict__.update(recommender.__dict__ | {"items": items})
    return made


def test_a_deep_list_is_asked_for_only_as_deep_as_helps():
    widths = []
    values = np.zeros((1000, 1), np.int32)
    values[-3:] = 1

    def ask(users, width, within):
        widths.append((len(users), width))
        return replace(Lists.empty(len(users), width), rows=np.tile(np.arange(width, dtype=np.int32), (len(users), 1)))

    nobody = [np.zeros(0, np.int32), np.array([997, 998, 999])]  # the second had all of the other kind
    lists = kept(Rules(np.ones(1000, bool), values=values, cap=2), ask, nobody, 10)
    assert lists.rows[0, :4].tolist() == [0, 1, 997, 998] and lists.rows[1, :3].tolist() == [0, 1, -1]
    assert widths == [(2, 20), (1, 40), (1, 80), (1, 160), (1, 320), (1, 640), (1, 1000)]
    widths.clear()
    root = np.stack(
        [np.zeros(1000, np.int32), np.arange(1, 1001)], 1
    )  # all in one category, and each in one of its own
    assert (kept(Rules(np.ones(1000, bool), values=root, cap=2), ask, nobody, 10).rows >= 0).sum() == 4
    assert widths == [(2, 20)]


@pytest.mark.parametrize("engine", ENGINES)
def test_new_items_keep_the_scores_of_the_whole_list(world, engine, monkeypatch):
    data, _, recommender, asked = world
    ranked, found = Recommender._ranked, []
    monkeypatch.setattr(Recommender, "_ranked", lambda *given: found.append((given[-1], ranked(*given))) or found[-1][1] if len(given) > 3 else ranked(*given))  # fmt: skip
    new = ~recommender.items["seen"].to_numpy()
    whole = recommender.recommend_histories(asked, data.catalogue, engine=engine)
    lists = recommender.recommend_histories(asked, K, engine=engine, beams=64, new_items=0.5)
    assert (
        all(within[made.rows[made.rows >= 0]].all() for within, made in found if within is not None) and len(found) > 1
    )
    for user, row in enumerate(lists.rows):
        order = whole.rows[user][whole.rows[user] >= 0].tolist()
        news, olds = [i for i in order if new[i]], [i for i in order if not new[i]]
        assert all(new[row[:p]].sum() >= p // 2 for p in range(1, K + 1)) and (row >= 0).all()
        assert [i for i in row if new[i]] == news[: new[row].sum()]  # their own order, none left out
        assert [i for i in row if not new[i]] == olds[: (~new[row]).sum()]
        if engine == "auto":
            score = dict(zip(whole.rows[user].tolist(), whole.scores[user], strict=True))
            np.testing.assert_allclose(lists.scores[user], [score[i] for i in row.tolist()], rtol=1e-4, atol=1e-3)
        assert not set(row.tolist()) & set(asked.items[user].tolist())


def test_too_few_new_items_leave_the_rest_as_it_was(world):
    _, _, recommender, asked = world
    allowed = recommender.items["seen"].to_numpy().copy()
    same(recommender.recommend_histories(asked, K, beams=64, new_items=1.0, allowed=allowed), recommender.recommend_histories(asked, K, beams=64, allowed=allowed))  # fmt: skip
    allowed[0] = True
    lists = recommender.recommend_histories(asked, K, beams=64, new_items=1.0, allowed=allowed).rows
    whole = recommender.recommend_histories(asked, len(allowed), allowed=allowed).rows
    for row, rest in zip(lists, whole.tolist(), strict=True):
        assert (
            row.tolist() == sorted(rest, key=lambda item: item != 0)[:K]
        )  # the one new item there is, then the others


def test_diversity_trades_score_for_unlikeness(world):
    data, _, recommender, asked = world
    unit = data.content / np.maximum(np.linalg.norm(data.content, axis=1, keepdims=True), 1e-12)

    def alike(rows):
        return np.mean([(unit[row] @ unit[row].T)[np.triu_indices(K, 1)].mean() for row in rows])

    lists = [recommender.recommend_histories(asked, K, beams=64, diversity=D) for D in (0.0, 0.5, 1.0)]
    assert alike(lists[0].rows) > alike(lists[1].rows) > alike(lists[2].rows)
    assert (lists[0].scores.sum(1) >= lists[1].scores.sum(1) - 1e-3).all()
    assert all(
        np.array_equal(one.rows[:, 0], lists[0].rows[:, 0]) for one in lists
    )  # the best comes first all the same
    alone = Recommender.load(world[1])  # its content is read from the run
    alone.gate = recommender.gate
    same(alone.recommend_histories(asked, K, beams=64, diversity=0.5), lists[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rules", [{}, {"per": "category", "cap": 2, "diversity": 0.3, "new_items": 0.2}])
def test_candidates_of_a_user_are_a_filter_of_their_own(world, engine, rules):
    data, _, recommender, asked = world
    rng = np.random.default_rng(1)
    own = [np.flatnonzero(rng.random(data.catalogue) < share) for share in np.resize([0.0, 0.1, 0.5, 1.0], len(asked))]
    allowed, sessions = np.arange(data.catalogue) % 5 != 0, np.arange(len(asked)) % 3 == 0
    lists = recommender.recommend_histories(asked, K, engine=engine, candidates=own, allowed=allowed, sessions=sessions, **rules)  # fmt: skip
    for user in range(len(asked)):
        mask = allowed & np.isin(np.arange(data.catalogue), own[user])
        one = recommender.recommend_histories(asked.take([user]), K, engine=engine, beams=64, allowed=mask, sessions=sessions[[user]], **rules)  # fmt: skip
        assert lists.rows[user].tolist() == one.rows[0].tolist()
        assert lists.routes[user] == one.routes[0] or not mask.any()
        assert lists.sources[user].tolist() == one.sources[0].tolist()
        np.testing.assert_allclose(lists.scores[user], one.scores[0], rtol=1e-5, atol=1e-4)
        left = mask[~np.isin(np.arange(data.catalogue), asked.items[user])].sum() if mask.any() else 0
        assert (lists.rows[user] >= 0).sum() <= left
        assert rules or (lists.rows[user] >= 0).sum() == min(K, (mask & ~np.isin(np.arange(data.catalogue), asked.items[user])).sum())  # fmt: skip


def test_the_python_face_takes_every_rule(tiny_run, tiny, capsys):
    data, recommender = tiny, Recommender.load(tiny_run, engine="memory")
    history = data.item_ids[20:24]
    cheap = filter_mask(data.items, "price < 25")
    got = recommender.recommend(history, 5, filter="price < 25", per="category", cap=1)
    assert len(got) == 5 and all(cheap[data.row_of(r.item_id)] for r in got)
    with pytest.warns(UserWarning, match="1 of 4 candidates are not"):
        some = recommender.recommend(history, 5, candidates=[*data.item_ids[:2], data.item_ids[20], "gone"])
    assert {r.item_id for r in some} == set(data.item_ids[:2])
    assert "k=5: only 3 items may be shown, and lists end there" in capsys.readouterr().err
    assert recommender.recommend(history, filter="price < -1") == []
    assert recommender.recommend(history, filter="price < -1", diversity=0.5, new_items=0.5, per="category", cap=1) == []  # fmt: skip
    assert capsys.readouterr().err.count("no item may be shown, so every list is empty") == 2
    for rules, says in (
        ({"filter": "prise < 3"}, "filter, character 1: unknown item column prise"),
        ({"candidates": ["gone"]}, "candidates: none of the 1 item ids"),
        ({"per": "category"}, "per category: says nothing without cap"),
        ({"cap": 2}, "cap 2: says nothing without per"),
        ({"per": "category", "cap": 0}, "cap=0: must be above 0"),
        ({"per": "colour", "cap": 1}, "per=colour: no such item column; there are attribute"),
        ({"diversity": 1.5}, "diversity=1.5: must lie between 0 and 1"),
        ({"new_items": -0.1}, "new_items=-0.1: must lie between 0 and 1"),
    ):
        with pytest.raises(InputError, match=says):
            recommender.recommend(history, **rules)


def test_values_of_a_column_are_codes():
    items = pl.DataFrame({"categories": [["b", "a", "b"], [], None, ["a"]], "num_price": [2.0, None, 2.0, float("nan")], "title": ["x", "y", "x", None]})  # fmt: skip
    assert [sorted(set(row)) for row in values_of(items, "category").tolist()] == [[0, 1], [-1], [-1], [-1, 0]]
    assert values_of(items, "price").tolist() == [[0], [-1], [0], [-1]]
    assert values_of(items, "title").tolist() == [[0], [1], [0], [-1]]


# -- files and jobs ------------------------------------------------------------------------------------------------


def lists_of(path) -> dict[str, list[str]]:
    table = pl.read_parquet(path)
    return {user: part["item_id"].to_list() for (user,), part in table.group_by("user_id", maintain_order=True)}


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_candidates_are_read_alike_from_every_kind_of_file(tmp_path, suffix):
    rows = [{"user_id": "b", "item_id": 7}, {"user_id": "a", "item_id": 5}, {"user_id": "b", "item_id": 3}, {"user_id": "b", "item_id": 7}]  # fmt: skip
    file = tmp_path / f"c.{suffix}"
    if suffix == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        getattr(pl.DataFrame(rows), f"write_{suffix}")(file)
    found = candidates_of(read_candidates(file), pl.Series(["3", "5", "7"]))
    assert found.of("a").tolist() == [1] and found.of("b").tolist() == [0, 2] and found.of("c").tolist() == []
    assert found.digest == candidates_of(candidate_table(pl.DataFrame(rows[::-1])), pl.Series(["3", "5", "7"])).digest
    assert found.digest != candidates_of(candidate_table(pl.DataFrame(rows[:3])[1:]), pl.Series(["3", "5", "7"])).digest


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("c.csv", "item\n1\n", "no column item_id .there are item."),
        ("c.csv", "user_id,item_id\nu,1\n,2\n", "no user_id in row 2"),
        ("c.csv", "user_id,item_id\n", "names no item"),
        ("c.txt", "\n \n", "names no item"),
        ("c.parquet", "PAR1", "not readable as parquet"),
    ],
)
def test_bad_files_of_candidates_are_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"--candidates {tmp_path / name}: {says}"):
        read_candidates(tmp_path / name)
    with pytest.raises(InputError, match="nowhere.txt: no such file"):
        read_candidates(tmp_path / "nowhere.txt")


def test_a_batch_keeps_to_its_rules(tiny, tiny_run, tmp_path, capsys):
    data, run = tiny, tiny_run
    users, out = ["u7", "u8", "u9"], tmp_path / "recs.parquet"
    (tmp_path / "stock.txt").write_text("\n".join([*data.item_ids[:20], "gone"]))
    cheap = {data.item_ids[row] for row in np.flatnonzero(filter_mask(data.items, "price < 30"))}
    everybody = {"candidates": read_candidates(tmp_path / "stock.txt"), "filter": "price < 30"}
    generate(run, data, users, out=out, engine="memory", k=4, **everybody)
    assert "candidates: 1 item ids are not in the catalogue; left out" in capsys.readouterr().err
    assert {len(items) for items in lists_of(out).values()} == {4}
    assert {item for items in lists_of(out).values() for item in items} <= cheap & set(data.item_ids[:20])
    generate(run, data, users, out=out, k=4, engine="popularity")
    plain = lists_of(out)
    for rules in ({"per": "category", "cap": 1}, {"diversity": 1.0}, {"new_items": 1.0}):
        generate(run, data, users, out=out, k=4, engine="popularity", **rules)
        groups = {item: group[0] for item, group in data.items.select("item_id", "categories").rows()}
        kinds = [len({groups[item] for item in items}) for items in lists_of(out).values()]
        assert "cap" not in rules or kinds == [4, 4, 4]
        assert (lists_of(out) == plain) == ("new_items" in rules)  # nothing is new there
    own = pl.DataFrame({"user_id": ["u7"] * 3 + ["u9"] * 2, "item_id": [*data.item_ids[30:33], *data.item_ids[40:42]]})
    generate(run, data, users, out=tmp_path / "own.parquet", engine="memory", k=4, candidates=own)
    assert "candidates: 1 of 3 users have none, and their lists are empty" in capsys.readouterr().err
    found = lists_of(tmp_path / "own.parquet")
    assert set(found) == {"u7", "u9"} and set(found["u7"]) <= set(data.item_ids[30:33])
    generate(run, data, users, out=tmp_path / "none.parquet", engine="memory", filter="price < -1")
    assert lists_of(tmp_path / "none.parquet") == {} and "no item may be shown" in capsys.readouterr().err
    with pytest.raises(InputError, match="candidates: none of the 1 item ids is in the catalogue"):
        generate(run, data, users, out=tmp_path / "x.parquet", engine="memory", candidates=["gone"])


RULES = (
    {"filter": "price < 30"}, {"filter": "price < 31"}, {"candidates": ["item-1", "item-2"]}, {"candidates": ["item-1"]},
    {"candidates": pl.DataFrame({"user_id": ["u7"], "item_id": ["item-1"]})}, {"per": "category", "cap": 1}, {"per": "category", "cap": 2},
    {"per": "attribute", "cap": 1}, {"diversity": 0.5}, {"diversity": 0.25}, {"new_items": 0.5}, {"new_items": 0.2},
)  # fmt: skip


def test_every_rule_belongs_to_the_job(tiny_dataset, tiny_run, tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr("m6rec_jax.recommend.generate.write_lists", lambda *_, job, **__: jobs.append(json.dumps(job, sort_keys=True)))  # fmt: skip
    every = [*RULES, {"explain": True}, {"show_steps": True}]
    for rules in ({}, *every):
        generate(tiny_run, tiny_dataset, ["u7"], out=tmp_path / "x.parquet", engine="popularity", **rules)
    assert len(set(jobs)) == len(jobs) == 1 + len(every)
    assert set(json.loads(jobs[0])) == {"k", "engine", "users", "dataset", "model", "params", "parts", "code"}
