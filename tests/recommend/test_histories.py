import os
import subprocess
import sys
import textwrap

import numpy as np
import polars as pl
import pytest

from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.prepare import prepare
from m6rec_jax.data.records import HISTORY
from m6rec_jax.recommend.histories import Past, held_out, interactions
from tests.fixtures import tiny_card, tiny_tables


@pytest.fixture(params=["tiny_dataset", "tiny_levels"])
def dataset(request):
    return open_dataset(request.getfixturevalue(request.param))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_nothing_at_or_after_the_target_is_in_a_history(dataset, split):
    asked = held_out(dataset, split)
    records = {r.row: r for r in dataset.records(split) if r.kind == HISTORY}
    assert len(asked) == len(records) > 0
    for i, user in enumerate(asked.users):
        record, n = records[user], len(asked.items[i])
        assert record.targets >= 1 and n == len(record.items) - record.targets
        assert asked.targets[i] == record.items[n] and asked.target_times[i] == record.times[n]
        assert np.array_equal(asked.items[i], record.items[:n]) and len(asked.times[i]) == len(asked.kinds[i]) == n
        assert all(p < n and asked.items[i][p] == -1 for p in asked.queries[i])


def test_interactions_are_training_events_only(dataset):
    counts = interactions(dataset)
    assert counts.shape == (dataset.users.height, dataset.catalogue)
    assert np.array_equal(np.asarray(counts.sum(0)).ravel(), dataset.items["events"].to_numpy())
    train = {r.row: r.items for r in dataset.records("train") if r.kind == HISTORY}
    for user in range(dataset.users.height):
        items = train.get(user, np.zeros(0, int))
        assert counts[user].sum() == (items >= 0).sum()


def test_everything_holds_each_user_once_with_all_events(dataset):
    whole, last = Past(dataset).all(), held_out(dataset, "test")
    assert np.array_equal(whole.users, np.unique(whole.users))
    at = {u: i for i, u in enumerate(whole.users)}
    for i, user in enumerate(last.users):
        items = whole.items[at[user]]
        assert items[len(last.items[i])] == last.targets[i]
    back = whole.take([2, 0])
    assert back.users.tolist() == [whole.users[2], whole.users[0]] and np.array_equal(back.items[1], whole.items[0])


def test_some_are_taken_as_they_are_among_all(dataset):
    """In any order, some of them often, without a break between them or with one; and nobody."""
    past = Past(dataset)
    whole, last = past.all(), len(past) - 1
    for chosen in ([3, 4, 5], [last, 0, 7, 7, 3], [last], range(2, len(past), 3), []):
        some, same = past.take(chosen), whole.take(chosen)
        assert np.array_equal(some.users, same.users) and len(some) == len(chosen)
        for name in ("items", "times", "kinds"):
            for one, other in zip(getattr(some, name), getattr(same, name), strict=True):
                assert np.array_equal(one, other) and one.dtype == other.dtype
        for one, other in zip(some.queries, same.queries, strict=True):
            assert {p: q.tolist() for p, q in one.items()} == {p: q.tolist() for p, q in other.items()}


READ = """
    import resource, sys
    from pathlib import Path
    from types import SimpleNamespace
    import numpy as np
    from m6rec_jax.recommend.histories import Past
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    past = Past(SimpleNamespace(path=Path(sys.argv[1]), tokenizer=SimpleNamespace(encode_batch=lambda texts: [])))
    before = peak()
    events = sum(len(one) for at in range(0, len(past), 4096) for one in past.take(range(at, min(at + 4096, len(past)))).items)
    print(events, peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_events(tmp_path):
    """Five million events of 100,000 users: 65 MB as arrays alone, some 110 MB with those of each user."""
    users, each = 100_000, 50
    n = users * each
    frame = pl.DataFrame({"user": np.repeat(np.arange(users, dtype=np.int32), each), "item": np.arange(n, dtype=np.int32) % 999,
                          "time": np.arange(n), "kind": np.zeros(n, np.uint8)}).with_columns(text=pl.lit(None, pl.String))  # fmt: skip
    frame.write_parquet(tmp_path / "events.parquet")
    env = os.environ | {"MALLOC_ARENA_MAX": "1", "POLARS_MAX_THREADS": "2"}
    argv = [sys.executable, "-c", textwrap.dedent(READ), str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    events, grown = map(float, done.stdout.split())
    assert events == n and grown < 60, grown


@pytest.mark.parametrize("rule", ["leave-one-out", "global-time"])
def test_everything_is_what_the_source_says_whatever_the_split(rule, tmp_path):
    tables = tiny_tables(kinds=True)
    late = tables["events"]["t"].max() + 100  # only in the last part of a split by time; u7 ends with a search
    more = [
        ("newcomer", "item-3", late, "buy", None),
        ("newcomer", "item-4", late + 1, "view", None),
        ("u7", None, late + 2, "search", "wool hat"),
    ]
    events = pl.concat([tables["events"].select("u", "i", "t", "k", "q"),
                        pl.DataFrame(more, schema=["u", "i", "t", "k", "q"], orient="row")])  # fmt: skip
    data = prepare(tiny_card(tables | {"events": events}, split=rule), tmp_path / "data", vocab_size=640)
    whole = Past(data).all()
    ids = data.users["user_id"].gather(whole.users).to_list()
    assert sorted(ids) == sorted(events["u"].unique().to_list())
    assert (whole.targets == -1).all()
    for place, user in enumerate(ids):
        own = events.filter(pl.col("u") == user).sort("t", maintain_order=True)
        assert [data.item_ids[i] if i >= 0 else None for i in whole.items[place]] == own["i"].to_list()
        assert whole.times[place].tolist() == own["t"].to_list()
        assert [data.kinds[k] for k in whole.kinds[place]] == own["k"].to_list()
        said = {n: data.tokenizer.encode(q) for n, q in enumerate(own["q"].to_list()) if q is not None}
        assert {n: q.tolist() for n, q in whole.queries[place].items()} == said
