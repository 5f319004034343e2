"""`prepare` on Apache Beam: the same bytes as in one process, for every split, format and rule; what it refuses."""

import filecmp
import json
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from m6rec_jax.cli import main
from m6rec_jax.data.beam.accepted import check_accepted
from m6rec_jax.data.beam.rows import Job, clean_partition, gather_range
from m6rec_jax.data.card import load_card
from m6rec_jax.data.prepare import prepare
from m6rec_jax.data.records import RecordWriter
from m6rec_jax.data.sources import EVENT_SCHEMA
from m6rec_jax.errors import InputError
from tests.fixtures import tiny_card, tiny_tables

SIZES = {"codebook": 16, "vocab_size": 640}


@pytest.fixture
def on_beam():
    pytest.importorskip("apache_beam", reason="apache-beam is not installed here: make test-beam")
    from m6rec_jax.data.beam.prepare import prepare_on_beam

    return prepare_on_beam


def files(tables, folder, cuts=(200,), ending="parquet"):
    """The tables as files, the events in several; a card that names them."""
    folder.mkdir()
    write = pl.DataFrame.write_parquet if ending == "parquet" else pl.DataFrame.write_csv
    bounds, paths = [0, *cuts, tables["events"].height], []
    for low, high in pairwise(bounds):
        paths.append(str(folder / f"events-{len(paths)}.{ending}"))
        write(tables["events"][low:high], paths[-1])
    card = tiny_card(tables)
    del card["users"]
    card["events"]["path"] = paths
    for section, name in (("items", "items"), ("corpus", "docs")):
        card[section]["path"] = str(folder / f"{name}.parquet")
        tables[name].write_parquet(card[section]["path"])
    return card


def assert_same(one, other):
    """Every file byte for byte; of the manifest all but how long it took, and its own seal."""
    names = sorted(path.name for path in one.path.iterdir())
    assert names == sorted(path.name for path in other.path.iterdir())
    assert [
        n for n in names if n != "manifest.json" and not filecmp.cmp(one.path / n, other.path / n, shallow=False)
    ] == []
    bodies = [json.loads((data.path / "manifest.json").read_text()) for data in (one, other)]
    for body in bodies:
        assert body.pop("seconds") and body.pop("seal")
    assert bodies[0] == bodies[1]


@pytest.mark.parametrize("split", ["leave-one-out", {"rule": "ratio", "valid": 0.2, "test": 0.2}, "global-time"])
def test_the_tiny_dataset_is_the_same(tmp_path, on_beam, split):
    card = files(tiny_tables(kinds=True), tmp_path / "raw") | {"split": split}
    card["kinds"] = {"view": 0.3, "buy": 1.0, "search": 0}
    assert_same(prepare(card, tmp_path / "one", **SIZES), on_beam(card, tmp_path / "beam", partition_rows=90, **SIZES))


def crowd(seed=5, users=5000):
    """Events of 5,000 users, in no order, with every fault that cleaning knows; a robot among them."""
    rng = np.random.default_rng(seed)
    n = users * 8
    owner = np.where(rng.random(n) < 0.02, 0, rng.integers(users, size=n))
    item = (rng.pareto(1.0, n) * 12).astype(int) % 900
    times = 1_600_000_000 + rng.integers(0, 400 * 86_400, n)
    events = pl.DataFrame(
        {
            "u": [f"user {u}" for u in owner],
            "i": [f"item-{i}" for i in item],
            "t": [str(t) + ("" if t % 3 else ".5") for t in times],
            "k": pl.Series(rng.choice(["view", "buy", "search", "odd"], n, p=[0.5, 0.3, 0.18, 0.02])),
            "q": pl.Series(rng.choice(["red <b>shoes</b>", "wool &amp; hat", "小米手机", "mug  "], n)),
        }
    )
    search, at = pl.col("k") == "search", pl.int_range(pl.len())
    events = events.with_columns(
        i=pl.when(search).then(None).otherwise("i"),
        q=pl.when(search).then("q"),
        t=pl.when(at % 701 == 0).then(pl.lit("soon")).when(at % 809 == 0).then(pl.lit("99999999999")).when(at % 907 == 0).then(None).otherwise("t"),
        u=pl.when(at % 1009 == 0).then(None).otherwise("u"),
        k=pl.when(at % 1103 == 0).then(None).otherwise("k"),
    )  # fmt: skip
    events = pl.concat([events, events[::50]]).sample(fraction=1.0, shuffle=True, seed=seed)
    items = tiny_tables()["items"]
    more = [items.with_columns(id=pl.format("item-{}", pl.int_range(pl.len()) + 56 * k), title=pl.col("title") + f" v{k}") for k in range(15)]  # fmt: skip
    return tiny_tables() | {"events": events, "items": pl.concat([*more, items[:2]])}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "changes"),
    [
        ("csv", {"split": "global-time", "clean": {"min_user_events": 4, "min_item_events": 5}}),
        ("parquet", {"split": "ratio", "clean": {"unknown_items": "keep", "min_item_events": 3}, "privacy": "hmac"}),
    ],
)
def test_five_thousand_users_are_the_same(tmp_path, on_beam, monkeypatch, ending, changes):
    """Partitions, ranges, pieces and shards all cut; shuffled rows, faults, rare items and short users."""
    tables = crowd()
    card = files(tables, tmp_path / "raw", (9_000, 9_001, 30_000), ending) | changes
    card["kinds"] = {"view": 0.3, "buy": 1.0, "search": 0}
    if changes.get("privacy"):
        (tmp_path / "key").write_bytes(bytes(range(32)))
        card["privacy"] = {"ids": "hmac", "key": str(tmp_path / "key")}
    monkeypatch.setattr(RecordWriter.__init__, "__defaults__", (1500,))
    one = prepare(card, tmp_path / "one", levels=3, **SIZES)
    beam = on_beam(card, tmp_path / "beam", levels=3, partition_rows=6_000, shard_records=1500, **SIZES)
    met = one.manifest["counts"]
    wanted = ["missing_user", "missing_time", "bad_time", "future_time", "missing_kind", "unknown_kind", "duplicate_event", "duplicate_item", "few_item_events"]  # fmt: skip
    assert all(met[rule] for rule in wanted) and met["unknown_item" if ending == "csv" else "added_item"]
    assert len(list(one.path.glob("train-*"))) > 2
    assert_same(one, beam)


def test_rows_in_their_own_order_are_the_same(tmp_path, on_beam):
    """No time at all: a row's number is its time, across files."""
    tables = tiny_tables()
    card = files(tables, tmp_path / "raw", (50, 300), "csv")
    card["events"] = {**card["events"], "time_unit": "order"}
    del card["events"]["time"], card["items"], card["corpus"]
    assert_same(prepare(card, tmp_path / "one", **SIZES), on_beam(card, tmp_path / "beam", partition_rows=90, **SIZES))


def test_a_dataset_made_here_is_known_there(tmp_path, on_beam):
    card = files(tiny_tables(), tmp_path / "raw")
    made = on_beam(card, tmp_path / "out", partition_rows=90, **SIZES)
    assert prepare(card, tmp_path / "out", **SIZES).digest == made.digest
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("events", {"value": "q"}, "events.value: 'q': values"),
        ("events", {"item": ["i", "q"], "time": "", "kind": "", "text": ""}, "events: item is a list of columns"),
        ("events", {"path": pl.DataFrame({"u": [1], "i": [1], "t": [1]})}, "events.path: a DataFrame"),
        ("events", {"encoding": "gb18030"}, "events.encoding: gb18030"),
        ("users", {"id": "u", "attributes": "i"}, "users: a table"),
        ("impressions", {"user": "u", "item": "i", "time": "t", "clicked": "k"}, "impressions: a table"),
    ],
)
def test_what_is_not_done_is_refused_in_one_line(tmp_path, section, change, said):
    card = files(tiny_tables(kinds=True), tmp_path / "raw")
    card.pop("kinds")
    card[section] = {"path": card["events"]["path"], **card.get(section, {}), **change}
    card[section] = {key: value for key, value in card[section].items() if isinstance(value, pl.DataFrame) or value}
    with pytest.raises(InputError, match=rf"^card: {said}.*--runner beam does not do; use --runner local"):
        check_accepted(load_card(card))


def test_files_of_different_types_are_refused(tmp_path):
    tables = tiny_tables()
    card = files(tables, tmp_path / "raw")
    tables["events"].with_columns(pl.col("t").cast(pl.Float64)).write_parquet(card["events"]["path"][1])
    with pytest.raises(InputError, match=r"'t' is Float64, and Int64 in the files before"):
        check_accepted(load_card(card))


@pytest.mark.parametrize("flags", [["--append"], ["--like", "run"], ["--borrow", "tokenizer"]])
def test_flags_of_one_machine_are_refused(tmp_path, capsys, flags):
    assert main(["prepare", "--card", "c.yaml", "--out", str(tmp_path / "o"), "--runner", "beam", *flags]) == 2
    assert f"{flags[0]}: not with --runner beam" in capsys.readouterr().err


def test_without_beam_the_way_out_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    assert main(["prepare", "--card", "c.yaml", "--out", str(tmp_path / "o"), "--runner", "beam"]) == 2
    assert "apache-beam is not installed here; make install-beam" in capsys.readouterr().err
    assert main(["prepare", "--card", "c.yaml", "--out", str(tmp_path / "o"), "--runner-options", "x"]) == 2
    assert "--runner-options x: has no effect" in capsys.readouterr().err


def test_the_order_in_which_rows_reach_a_worker_changes_nothing(tmp_path):
    """Runners hand over what is grouped in any order; the first of equal events stays, whichever came first."""
    rows = [("a", "x", n // 2, 0.0, None, None, None, n) for n in range(12)]
    events = pl.DataFrame(rows, schema=EVENT_SCHEMA, orient="row")
    job = Job(load_card(files(tiny_tables(), tmp_path / "raw")), tmp_path, 0, 100)
    made = []
    for number, frame in enumerate((events, events.sample(fraction=1.0, shuffle=True, seed=3))):
        clean_partition(job, number, frame)
        gather_range(job, number, frame)
        made.append([pl.read_parquet(job.file(*name, number)) for name in (("state", 0), ("range",), ("later", "duplicate_event"))])  # fmt: skip
    assert made[0][0]["row"].to_list() == [0, 2, 4, 6, 8, 10]
    assert all(one.equals(other) for one, other in zip(*made, strict=True))
