"""The same table reads the same from every format, and what cannot be read is refused in one line."""

import datetime
import gzip
import json

import pandas as pd
import polars as pl
import pytest

from m6rec_jax.data.card import load_card
from m6rec_jax.data.sources import EVENT_SCHEMA, read_tables
from m6rec_jax.errors import InputError

ROWS = [("u1", "007", 1_600_000_000, 4.5), ("u2", "7", 1_600_000_060, None), ("u1", "x y", 1_600_000_000, 1.0)]
COLUMNS = ("user", "item", "t", "stars")
EVENTS = {"user": "user", "item": "item", "time": "t", "value": "stars"}


def read(folder, events=None, **sections):
    base = {"name": "t", "events": events or {"path": pl.DataFrame({"u": ["a"], "i": ["b"]}), **ORDER}}
    located = {
        name: {k: (folder / v if k == "path" and isinstance(v, str) else v) for k, v in section.items()}
        for name, section in {**base, **sections}.items()
        if isinstance(section, dict)
    }
    return read_tables(load_card({**base, **sections, **located}))


ORDER = {"user": "u", "item": "i", "time_unit": "order"}


def refusal(folder, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        read(folder, *args, **kwargs)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("card: ")
    return str(caught.value)


def write_rows(folder, kind):
    """The rows of ROWS as a file (or frame) of a format; returns its path (or the frame)."""
    frame = pl.DataFrame(ROWS, schema=list(COLUMNS), orient="row")
    cells = [["" if v is None else str(v) for v in row] for row in ROWS]
    if kind == "polars":
        return frame
    if kind == "pandas":
        return pd.DataFrame(ROWS, columns=list(COLUMNS))
    if kind == "parquet":
        frame.write_parquet(folder / "e.parquet")
    if kind in ("csv", "tsv"):
        separator = "," if kind == "csv" else "\t"
        lines = [separator.join(row) for row in [list(COLUMNS), *cells]]
        (folder / f"e.{kind}").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    if kind == "csv.gz":
        (folder / "e.csv.gz").write_bytes(
            gzip.compress("\n".join(",".join(r) for r in [list(COLUMNS), *cells]).encode())
        )
    if kind == "inter":
        header = "user:token\titem:token\tt:float\tstars:float"
        (folder / "e.inter").write_text("\n".join([header, *("\t".join(row) for row in cells)]))
    if kind == "jsonl":
        lines = [json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in ROWS]
        (folder / "e.jsonl").write_text("\n".join(lines) + "\n\n")
    if kind == "json":
        (folder / "e.json").write_text(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in ROWS], indent=1))
    return f"e.{kind}"


@pytest.mark.parametrize("kind", ["polars", "pandas", "parquet", "csv", "tsv", "csv.gz", "inter", "jsonl", "json"])
def test_every_format_reads_the_same_in_source_order(tmp_path, kind):
    events = read(tmp_path, {"path": write_rows(tmp_path, kind), **EVENTS}).events
    assert dict(events.schema) == EVENT_SCHEMA
    assert events.select("user_id", "item_id", "time", "value").rows() == ROWS
    assert events["row"].to_list() == [0, 1, 2] and events["kind"].null_count() == 3


def test_sequences(tmp_path):
    (tmp_path / "s.txt").write_text("7 1 2  1\n\n8 5\n7 9\n9\n")
    tables = read(tmp_path, {"path": "s.txt", "format": "sequences"})
    rows = tables.events.select("user_id", "item_id", "time").rows()
    assert rows == [("7", "1", 0), ("7", "2", 1), ("7", "1", 2), ("7", "9", 3), ("8", "5", 0), ("9", None, 0)]


@pytest.mark.parametrize("native", [True, False])
def test_whole_histories_and_windows_over_them(tmp_path, native):
    rows = [("a", [1, 2], 3), ("b", [5], 5), ("a", [2, 3], 4), ("a", [9, 9], 8), ("c", [], 1)]
    cells = [(u, h if native else str(h), n) for u, h, n in rows]
    frame = pl.DataFrame(cells, schema=["u", "h", "n"], orient="row", strict=False)
    events = read(tmp_path, {"path": frame, "user": "u", "item": ["h", "n"]}).events
    found = events.group_by("user_id", maintain_order=True).agg("item_id").rows()
    assert found == [("a", ["1", "2", "3", "4", "9", "9", "8"]), ("b", ["5", "5"]), ("c", ["1"])]
    assert events.filter(user_id="a")["time"].to_list() == list(range(7))


def test_ids_of_mixed_type_are_one_id(tmp_path):
    (tmp_path / "e.jsonl").write_text(
        '{"u": 1, "i": "a"}\n{"u": "1", "i": 2}\n{"u": 1.0, "i": "2.0"}\n{"u": null, "i": " 2 "}\n'
    )
    mixed = pd.DataFrame({"u": [1, "1", 1.0, None], "i": ["a", 2, 2.0, "2"]}, dtype=object)
    (tmp_path / "e.csv").write_text("u,i\n1,a\n1,2\n1.0,2.0\n,2\n")
    for path in ("e.jsonl", mixed, "e.csv"):
        events = read(tmp_path, {"path": path, **ORDER}).events
        assert events["user_id"].to_list() == ["1", "1", "1", None]
        assert events["item_id"].to_list() == ["a", "2", "2", "2"]
    floats = read(tmp_path, {"path": pl.DataFrame({"u": [1.0, 2.5, float("nan")], "i": [1, 2, 3]}), **ORDER}).events
    assert floats["user_id"].to_list() == ["1", "2.5", None] and floats["item_id"].to_list() == ["1", "2", "3"]


def test_nul_bytes_do_not_survive_in_ids_and_do_no_harm(tmp_path):
    (tmp_path / "e.csv").write_bytes(b"u,i\nu\x00x,a\n\x00,b\n")
    (tmp_path / "e.jsonl").write_text('{"u": "u\\u0000x", "i": "a"}\n{"u": "\\u0000", "i": "b"}\n')
    for path in ("e.csv", "e.jsonl"):
        assert read(tmp_path, {"path": path, **ORDER}).events["user_id"].to_list() == ["ux", None]


@pytest.mark.parametrize(
    ("unit", "cells", "seconds"),
    [
        ("s", ["10", "10.9", "-5", "soon", None], [10, 10, -5, None]),
        ("s", [10, 20, None], [10, 20]),
        ("s", [10.7, float("nan"), None], [10]),
        ("ms", ["1600000000123", "1600000000999.5"], [1_600_000_000, 1_600_000_000]),
        ("ms", [1_600_000_000_999], [1_600_000_000]),
        ("order", ["3", "1", "x"], [3, 1, None]),
        (
            "iso",
            [
                "1970-01-02",
                "1970-01-01T00:01:00Z",
                "1970-01-01 00:01:00.5",
                "1970-01-01T01:00:00+01:00",
                "1970-01-01 00:02",
                "x",
            ],
            [86_400, 60, 60, 0, 120, None],
        ),
        ("s", [datetime.datetime(1970, 1, 1, 0, 1), None], [60]),
        ("iso", [datetime.date(1970, 1, 2)], [86_400]),
    ],
)
def test_time_units(tmp_path, unit, cells, seconds):
    frame = pl.DataFrame({"u": ["a"] * len(cells), "i": ["b"] * len(cells), "t": cells})
    tables = read(tmp_path, {"path": frame, "user": "u", "item": "i", "time": "t", "time_unit": unit})
    assert tables.events["time"].drop_nulls().to_list() == [s for s in seconds if s is not None]
    assert tables.rejected["rule"].to_list() == ["bad_time"] * seconds.count(None)
    if None in seconds:
        assert json.loads(tables.rejected["content"][0])["time"] == cells[seconds.index(None)]


def test_a_rating_that_is_no_number_is_no_value(tmp_path):
    (tmp_path / "e.jsonl").write_text(
        '{"u": 1, "i": 1, "v": NaN}\n{"u": 1, "i": 2, "v": 3}\n{"u": 1, "i": 3, "v": "bad"}\n{"u": 1, "i": 4}\n'
    )
    for path in (
        "e.jsonl",
        pd.DataFrame({"u": [1] * 4, "i": [1, 2, 3, 4], "v": [float("nan"), 3, float("inf"), None]}),
    ):
        tables = read(tmp_path, {"path": path, "value": "v", **ORDER})
        assert tables.events["value"].to_list() == [None, 3.0, None, None]
        assert tables.counts["bad_value"] >= 1


def test_items(tmp_path):
    items = [
        {"id": 1, "title": "Cup", "cat": [["A", "B"], ["A", ["C"]]], "brand": "X", "tags": ["t", "u"], "price": "$1,200.5", "year": 1999},
        {"id": "2", "title": None, "cat": "A|D", "brand": None, "tags": None, "price": "n/a", "year": "2001-02-03", "d": ["one", "two"]},
        {"id": 3, "title": "", "cat": None, "brand": 7.0, "tags": {"size": ["S", "M"]}, "price": 3, "year": 946684800000, "d": "plain"},
    ]  # fmt: skip
    (tmp_path / "i.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "i.json").write_text(
        json.dumps({str(i["id"]): {k: v for k, v in i.items() if k != "id"} for i in items})
    )
    columns = {"id": "id", "title": "title", "text": "d", "categories": "cat", "attributes": ["brand", "tags"]}
    for path in ("i.jsonl", "i.json"):
        tables = read(tmp_path, items={"path": path, **columns, "numbers": ["price"], "published": "year"})
        made = tables.items
        assert made["item_id"].to_list() == ["1", "2", "3"] and made["title"].to_list() == ["Cup", None, None]
        assert made["text"].to_list() == [None, "one two", "plain"]
        assert made["categories"].to_list() == [["A", "B", "C"], ["A", "D"], []]
        assert made["attributes"].to_list() == [["brand: X", "t", "u"], [], ["brand: 7", "size: S", "size: M"]]
        assert made["num_price"].to_list() == [1200.5, None, 3.0] and tables.counts["bad_number"] == 1
        assert made["published"].to_list() == [915_148_800, 981_158_400, 946_684_800]


def test_image_audio_and_video_are_carried(tmp_path):
    frame = pl.DataFrame({"i": [1], "p": ["a.jpg"], "s": ["a.wav"], "v": ["a.mp4"], "k": ["film"]})
    keys = {"id": "i", "image": "p", "audio": "s", "video": "v", "type": "k"}
    made = read(tmp_path, items={"path": frame, **keys}).items
    assert made.select("image", "audio", "video", "type").row(0) == ("a.jpg", "a.wav", "a.mp4", "film")


def test_the_other_tables(tmp_path):
    users = pl.DataFrame({"u": [1, 2], "age": [24.0, None], "home_town": ["Kyoto", "Oslo"]})
    shown = pl.DataFrame({"u": [1], "i": [2], "t": ["x"], "y": [1]}).vstack(
        pl.DataFrame({"u": [1, 1], "i": [3, 4], "t": ["5", "6"], "y": [0, 1]})
    )
    tables = read(
        tmp_path,
        users={"path": users, "id": "u", "attributes": ["age", "home_town"]},
        corpus={"path": pl.DataFrame({"a": ["one", None], "b": ["two", "three"]}), "text": ["a", "b"]},
        impressions={"path": shown, "user": "u", "item": "i", "time": "t", "clicked": "y"},
    )
    assert tables.users["attributes"].to_list() == [["age: 24", "home town: Kyoto"], ["home town: Oslo"]]
    assert tables.corpus["text"].to_list() == ["one two", "three"]
    assert tables.impressions.select("item_id", "time", "clicked").rows() == [("3", 5, False), ("4", 6, True)]
    assert tables.rejected.select("table", "row", "rule").rows() == [("impressions", 0, "bad_time")]


def test_several_files_are_read_one_after_the_other(tmp_path):
    (tmp_path / "b.csv").write_text("u,i\nx,1\n")
    (tmp_path / "a.csv").write_text("i,u,other\n2,y,z\n")
    events = read(tmp_path, {"path": [tmp_path / "b.csv", tmp_path / "a.csv"], **ORDER}).events
    assert events.select("user_id", "item_id", "row").rows() == [("x", "1", 0), ("y", "2", 1)]


def test_other_encodings(tmp_path):
    (tmp_path / "e.csv").write_bytes("u,i\n李,茶\n".encode("gb18030"))
    assert "encoding" in refusal(tmp_path, {"path": "e.csv", **ORDER})
    assert "gb2" in refusal(tmp_path, {"path": "e.csv", "encoding": "gb2", **ORDER})
    assert read(tmp_path, {"path": "e.csv", "encoding": "gb18030", **ORDER}).events["user_id"][0] == "李"


def test_a_column_that_is_not_there(tmp_path):
    for kind in ("polars", "parquet", "csv", "inter", "jsonl", "json"):
        message = refusal(tmp_path, {"path": write_rows(tmp_path, kind), **EVENTS, "item": "itm"})
        assert "events.item: 'itm'" in message and "user, item, t, stars" in message and "did you mean item?" in message
    message = refusal(tmp_path, items={"path": pl.DataFrame({"id": [1]}), "id": "id", "text": ["a", "b"]})
    assert "items.text[0]: 'a'" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("e.csv", b""),
        ("e.csv", b"u,i\n"),
        ("e.tsv", b"u\ti\n"),
        ("e.jsonl", b"\n\n"),
        ("e.json", b"[]"),
        ("e.txt", b" \n"),
    ],
)
def test_an_empty_table(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    events = {"path": name, "format": "sequences"} if name == "e.txt" else {"path": name, **ORDER}
    message = refusal(tmp_path, events)
    assert name in message and "no row" in message and "events.path" in message
    assert "no row" in refusal(tmp_path, {"path": pl.DataFrame({"u": [], "i": []}), **ORDER})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("e.jsonl", b'{"u": 1, "i": 2}\n{"u": 1, "i"\n', "line 2"),
        ("e.jsonl", b"[1, 2]\n", "JSON object"),
        ("e.json", b"{", "not readable as json"),
        ("e.csv", b"u,i\n1,2,3\n", "not readable as csv"),
        ("e.parquet", b"PAR1 no", "not readable as parquet"),
    ],
)
def test_a_file_that_is_not_what_it_says(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path, {"path": name, **ORDER})
    assert name in message and said in message
