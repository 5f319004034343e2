"""Raw tables of any accepted format, as polars frames with canonical columns.

A text file is read as text throughout, so an id `007` stays `007` and a column that mixes numbers with words
reads the same whichever comes first.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from m6rec_jax.data import values
from m6rec_jax.data.card import Card
from m6rec_jax.data.card_checks import format_of, is_frame, known, short
from m6rec_jax.data.privacy import hide_ids, read_key
from m6rec_jax.errors import InputError

REJECTED_SCHEMA = {"table": pl.String, "row": pl.Int64, "rule": pl.String, "content": pl.String}
EVENT_SCHEMA = {
    "user_id": pl.String,
    "item_id": pl.String,
    "time": pl.Int64,
    "kind": pl.String,
    "value": pl.Float64,
    "text": pl.String,
    "row": pl.Int64,
}
CONTENT_LIMIT = 1000  # characters of a rejected row that are kept


@dataclass(frozen=True)
class Tables:
    """Canonical tables, source order kept in `row`; a column that the card does not name is there, all null.

    events: user_id, item_id, time (seconds since 1970, or the order), kind, value, text.
    items: item_id, title, text, categories, attributes (lists), num_* (f64), published, type, image, audio, video.
    users: user_id, attributes. corpus: text. impressions: user_id, item_id, time, clicked.
    `rejected`: rows that could not be read. `counts`: cells set to null on reading.
    """

    events: pl.DataFrame
    items: pl.DataFrame | None = None
    users: pl.DataFrame | None = None
    corpus: pl.DataFrame | None = None
    impressions: pl.DataFrame | None = None
    rejected: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=REJECTED_SCHEMA))
    counts: dict[str, int] = field(default_factory=dict)


def read_tables(card: Card) -> Tables:
    """Read every table of a card; user ids are already hidden when the card asks for it.

    Raises InputError naming card, key, value and the columns there are, when a file cannot be read as its format,
    lacks a column, or holds no row.
    """
    key = read_key(card)
    counts = {"bad_value": 0, "bad_number": 0}
    rejected = []

    def read(section: str, function: Callable[..., tuple[pl.DataFrame, pl.DataFrame]]) -> pl.DataFrame | None:
        if getattr(card, section) is None:
            return None
        try:
            frame, bad_times = function(card, counts)
        except pl.exceptions.PolarsError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{card.origin}: {section}: a column is of no usable type ({reason}); convert it"
            ) from None
        rejected.append(rejected_rows(section, "bad_time", hide_ids(bad_times, key)))
        return hide_ids(frame, key)

    return Tables(
        events=read("events", _read_events),
        items=read("items", _read_items),
        users=read("users", _read_users),
        corpus=read("corpus", _read_corpus),
        impressions=read("impressions", _read_impressions),
        rejected=pl.concat(rejected),
        counts=counts,
    )


def rejected_rows(table: str, rule: str, rows: pl.DataFrame) -> pl.DataFrame:
    """Rows (with a `row` column) as entries of rejected.parquet: table, row, rule, content (JSON, cut)."""
    content = rows.drop("row")
    cut = [pl.col(c).str.slice(0, CONTENT_LIMIT) for c, t in content.schema.items() if t == pl.String]
    as_json = pl.struct(content.columns).struct.json_encode().str.slice(0, 4 * CONTENT_LIMIT).alias("content")
    return content.with_columns(cut).select(
        pl.lit(table).alias("table"), rows["row"].cast(pl.Int64), pl.lit(rule).alias("rule"), as_json
    )


def _read_events(card: Card, counts: dict[str, int]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Canonical events, and those whose time could not be understood (user_id, item_id, time, row)."""
    table = card.events
    if not is_frame(table.path) and format_of(table) == "sequences":
        return _histories(_read_sequences(card)), _no_bad_times()
    raw = read_raw(card, "events")
    if isinstance(table.item, tuple):
        return _histories(_joined_lists(raw, table.user, table.item)), _no_bad_times()
    columns = {"user_id": values.ids(raw[table.user]), "item_id": values.ids(raw[table.item])}
    columns["row"] = pl.int_range(raw.height, dtype=pl.Int64, eager=True)
    columns["time"] = values.times(raw[table.time], table.time_unit) if table.time else columns["row"]
    for name in ("kind", "text"):
        if column := getattr(table, name):
            columns[name] = values.texts(raw[column])
    if table.value:
        columns["value"], counts["bad_value"] = values.numbers(raw[table.value])
    events = _canonical(pl.DataFrame(columns))
    return _without_bad_times(events, raw[table.time]) if table.time else (events, _no_bad_times())


def _canonical(events: pl.DataFrame) -> pl.DataFrame:
    """The columns of EVENT_SCHEMA in their order; those that are not there, null."""
    return events.select(
        (pl.col(name) if name in events.columns else pl.lit(None)).cast(kind).alias(name)
        for name, kind in EVENT_SCHEMA.items()
    )


def _without_bad_times(frame: pl.DataFrame, raw_time: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
    raw_time = values.texts(raw_time)
    bad = frame["time"].is_null() & raw_time.is_not_null()
    if not bad.any():
        return frame, _no_bad_times()
    shown = frame.select("user_id", "item_id", raw_time.alias("time"), "row").filter(bad)
    return frame.filter(~bad), shown


def _no_bad_times() -> pl.DataFrame:
    return pl.DataFrame(schema={"user_id": pl.String, "item_id": pl.String, "time": pl.String, "row": pl.Int64})


def _read_sequences(card: Card) -> pl.DataFrame:
    """user, items (list) of each line `user item item ...`."""
    path = Path(card.events.path)
    options = {"has_header": False, "separator": "\n", "quote_char": None, "infer_schema": False}
    lines = _guarded(
        card, "events", lambda: pl.read_csv(_utf8(path, card.events.encoding), new_columns=["line"], **options)
    )
    words = lines.select(pl.col("line").str.extract_all(r"\S+").alias("words")).filter(pl.col("words").list.len() > 0)
    return _filled(card, "events", words).select(
        pl.col("words").list.first().alias("user"), pl.col("words").list.slice(1).alias("items")
    )


def _joined_lists(raw: pl.DataFrame, user: str, columns: tuple[str, ...]) -> pl.DataFrame:
    """user, items (list): the lists or single ids of `columns`, end to end."""
    none = pl.Series([[]], dtype=pl.List(pl.String))
    lists = [values.sequences(raw[c], ",").fill_null(none).alias(str(i)) for i, c in enumerate(columns)]
    return pl.DataFrame({"user": raw[user]}).with_columns(pl.concat_list(lists).alias("items"))


def _histories(frame: pl.DataFrame) -> pl.DataFrame:
    """Events of whole histories: time is the position in the user's history, over all of the user's rows."""
    flat = frame.explode("items").with_row_index("row")
    made = flat.select(
        values.ids(flat["user"]).alias("user_id"),
        values.ids(flat["items"]).alias("item_id"),
        pl.col("row").cast(pl.Int64),
    ).with_columns(pl.int_range(pl.len()).over("user_id").alias("time"))
    return _canonical(made)


def _read_items(card: Card, counts: dict[str, int]) -> tuple[pl.DataFrame, pl.DataFrame]:
    table = card.items
    raw = read_raw(card, "items")
    separator = table.list_separator or (" " if not is_frame(table.path) and format_of(table) == "recbole" else "|")
    none = pl.repeat(None, raw.height, dtype=pl.String, eager=True)
    categories = [values.lists(raw[c], separator) for c in table.categories]
    attributes = [values.said(raw[c], table.list_separator) for c in table.attributes]
    columns = [
        values.ids(raw[table.id]).alias("item_id"),
        (values.texts(raw[table.title]) if table.title else none).alias("title"),
        values.joined([values.texts(raw[c]) for c in table.text], raw.height).alias("text"),
        values.merged(categories, raw.height).alias("categories"),
        values.merged(attributes, raw.height).alias("attributes"),
    ]
    for name in table.numbers:
        series, bad = values.numbers(raw[name])
        counts["bad_number"] += bad
        columns.append(series.alias(f"num_{name}"))
    published = values.dates(raw[table.published]) if table.published else none.cast(pl.Int64)
    columns.append(published.alias("published"))
    for name in ("type", "image", "audio", "video"):
        column = getattr(table, name)
        columns.append((values.texts(raw[column]) if column else none).alias(name))
    return _numbered(columns), _no_bad_times()


def _read_users(card: Card, counts: dict[str, int]) -> tuple[pl.DataFrame, pl.DataFrame]:
    table = card.users
    raw = read_raw(card, "users")
    attributes = values.merged([values.said(raw[c], table.list_separator) for c in table.attributes], raw.height)
    return _numbered([values.ids(raw[table.id]).alias("user_id"), attributes.alias("attributes")]), _no_bad_times()


def _read_corpus(card: Card, counts: dict[str, int]) -> tuple[pl.DataFrame, pl.DataFrame]:
    raw = read_raw(card, "corpus")
    return _numbered([values.joined([values.texts(raw[c]) for c in card.corpus.text], raw.height).alias("text")]), _no_bad_times()  # fmt: skip


def _read_impressions(card: Card, counts: dict[str, int]) -> tuple[pl.DataFrame, pl.DataFrame]:
    table = card.impressions
    raw = read_raw(card, "impressions")
    frame = _numbered(
        [
            values.ids(raw[table.user]).alias("user_id"),
            values.ids(raw[table.item]).alias("item_id"),
            values.times(raw[table.time], table.time_unit or card.events.time_unit).alias("time"),
            values.flags(raw[table.clicked]).alias("clicked"),
        ]
    )
    return _without_bad_times(frame, raw[table.time])


def _numbered(columns: list[pl.Series]) -> pl.DataFrame:
    return pl.DataFrame(columns).with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("row"))


def read_raw(card: Card, section: str) -> pl.DataFrame:
    """The columns of one table that its card names, unchanged; text formats give strings (nested values as JSON)."""
    table = getattr(card, section)
    wanted = _wanted(table)
    if is_frame(table.path):
        frame = values.as_polars(table.path)
        _check_columns(card, section, wanted, frame.columns)
        return _filled(card, section, frame.select(_columns(wanted)))
    reader = READERS[format_of(table)]
    return _filled(card, section, _guarded(card, section, lambda: reader(card, section, Path(table.path), wanted)))


def _guarded(card: Card, section: str, read: Callable[[], pl.DataFrame]) -> pl.DataFrame:
    """Run a reader; what it raises about the file becomes an InputError."""
    table = getattr(card, section)
    where = f"{card.origin}: {section}.path: {table.path}"
    try:
        return read()
    except pl.exceptions.NoDataError:
        raise InputError(f"{where}: holds no row; give a table with at least one") from None
    except LookupError:
        why = f"{card.origin}: {section}.encoding: {table.encoding!r}: no such encoding"
        raise InputError(f"{why}; name one such as utf-8, gb18030 or latin-1") from None
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        if "utf-8" in reason.lower() or "utf8" in reason.lower():
            raise InputError(f"{where}: not UTF-8; add `encoding:`, such as gb18030 or latin-1, to {section}") from None
        raise InputError(
            f"{where}: not readable as {format_of(table)} ({reason}); correct the file or `format:`"
        ) from None


def _filled(card: Card, section: str, frame: pl.DataFrame) -> pl.DataFrame:
    if frame.height == 0:
        what = short(getattr(card, section).path)
        raise InputError(f"{card.origin}: {section}.path: {what}: holds no row; give a table with at least one")
    return frame


def _utf8(path: Path, encoding: str) -> Path | bytes:
    """The file itself when it is UTF-8, else its bytes converted."""
    if encoding.lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig"):
        return path
    return path.read_bytes().decode(encoding).encode("utf-8")


def _wanted(table: Any) -> dict[str, str]:
    """key of the card -> column, for every column that a table section names."""
    wanted: dict[str, str] = {}
    for key in table.__dataclass_fields__:
        value = getattr(table, key)
        if key in ("path", "format", "time_unit", "encoding", "list_separator") or not value:
            continue
        for i, column in enumerate((value,) if isinstance(value, str) else value):
            wanted[key if isinstance(value, str) else f"{key}[{i}]"] = column
    return wanted


def _check_columns(card: Card, section: str, wanted: dict[str, str], there: list[str]) -> None:
    where = short(getattr(card, section).path)
    for key, column in wanted.items():
        if column not in there:
            raise InputError(f"{card.origin}: {section}.{key}: {column!r}: no such column in {where}; {known(column, list(there), 'its columns')}")  # fmt: skip


def _columns(wanted: dict[str, str]) -> list[str]:
    return list(dict.fromkeys(wanted.values()))


def _delimited(card: Card, section: str, path: Path, wanted: dict[str, str]) -> pl.DataFrame:
    table = getattr(card, section)
    kind, source = format_of(table), _utf8(path, table.encoding)
    quote = None if kind == "recbole" else '"'  # atomic files have no quoting
    options: dict[str, Any] = {"separator": "," if kind == "csv" else "\t", "infer_schema": False, "quote_char": quote}
    header = pl.read_csv(source, n_rows=0, **options).columns
    names = {name.split(":")[0] if kind == "recbole" else name.strip(): name for name in header}
    _check_columns(card, section, wanted, list(names))
    columns = _columns(wanted)
    frame = pl.read_csv(source, columns=[names[c] for c in columns], **options)
    return frame.rename({names[c]: c for c in columns}).select(columns)


def _parquet(card: Card, section: str, path: Path, wanted: dict[str, str]) -> pl.DataFrame:
    scan = pl.scan_parquet(path)
    _check_columns(card, section, wanted, scan.collect_schema().names())
    return scan.select(_columns(wanted)).collect()


def _jsonl(card: Card, section: str, path: Path, wanted: dict[str, str]) -> pl.DataFrame:
    columns, source = _columns(wanted), _utf8(path, getattr(card, section).encoding)
    try:
        frame = pl.read_ndjson(source, schema=dict.fromkeys(columns, pl.String))
    except pl.exceptions.ComputeError:
        return _slow_jsonl(card, section, source, wanted)  # names the line; and takes NaN, which Python writes
    if any(frame[c].null_count() == frame.height for c in columns):
        there = pl.read_ndjson(source, infer_schema_length=None).columns
        _check_columns(card, section, wanted, there)
    return frame.select(columns)


def _slow_jsonl(card: Card, section: str, source: Path | bytes, wanted: dict[str, str]) -> pl.DataFrame:
    lines = (source if isinstance(source, bytes) else source.read_bytes()).decode("utf-8-sig").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return _of_records(card, section, wanted, records)


def _json(card: Card, section: str, path: Path, wanted: dict[str, str]) -> pl.DataFrame:
    source = _utf8(path, getattr(card, section).encoding)
    data = json.loads((source if isinstance(source, bytes) else source.read_bytes()).decode("utf-8-sig"))
    if isinstance(data, dict):  # id -> record
        data = [{"id": key, **value} for key, value in data.items() if isinstance(value, dict)]
    return _of_records(card, section, wanted, data)


def _of_records(card: Card, section: str, wanted: dict[str, str], records: Any) -> pl.DataFrame:
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise ValueError("a row has to be a JSON object")
    columns = _columns(wanted)
    if records:
        _check_columns(card, section, wanted, list(dict.fromkeys(key for one in records for key in one)))
    cells = {c: [values.as_text(one.get(c)) for one in records] for c in columns}
    return pl.DataFrame(cells, schema=dict.fromkeys(columns, pl.String))


READERS = {
    "csv": _delimited,
    "tsv": _delimited,
    "recbole": _delimited,
    "parquet": _parquet,
    "jsonl": _jsonl,
    "json": _json,
}
