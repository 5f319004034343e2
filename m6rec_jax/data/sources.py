"""Raw tables of any accepted format, as polars frames with canonical columns.

A text file is read as text throughout, so an id `007` stays `007` and a column that mixes numbers with words
reads the same whichever comes first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from m6rec_jax.data import values
from m6rec_jax.data.card import Card, format_of, is_frame, known
from m6rec_jax.data.privacy import hide_ids, read_key
from m6rec_jax.errors import InputError

REJECTED_SCHEMA = {"table": pl.String, "row": pl.Int64, "rule": pl.String, "content": pl.String}
EVENT_SCHEMA = {
    **{"user_id": pl.String, "item_id": pl.String, "time": pl.Int64, "kind": pl.String},
    **{"value": pl.Float64, "text": pl.String, "row": pl.Int64},
}
CONTENT_LIMIT = 1000  # characters of a rejected row that are kept


@dataclass(frozen=True)
class Tables:
    """Canonical tables; `rejected` rows could not be read at all, `counts` says what was set to null on reading.

    events: user_id, item_id, time (seconds since 1970, or the order), kind, value, text, row (source row order).
    items: item_id, title, text, categories, attributes (lists), num_* (f64), published, type, image, audio, video.
    users: user_id, attributes. corpus: text. impressions: user_id, item_id, time, clicked. All but corpus and
    events may lack optional columns' content (null), never the columns.
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
    events, rejected = _read_events(card, counts)
    events, rejected = hide_ids(events, key), [rejected_rows("events", "bad_time", hide_ids(rejected, key))]
    impressions = None
    if card.impressions:
        impressions, bad = _read_impressions(card)
        impressions = hide_ids(impressions, key)
        rejected.append(rejected_rows("impressions", "bad_time", hide_ids(bad, key)))
    return Tables(
        events=events,
        items=_read_items(card, counts) if card.items else None,
        users=hide_ids(_read_users(card), key) if card.users else None,
        corpus=_read_corpus(card) if card.corpus else None,
        impressions=impressions,
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
    row = pl.int_range(raw.height, dtype=pl.Int64, eager=True)
    made = {"user_id": values.ids(raw[table.user]), "item_id": values.ids(raw[table.item])}
    made["time"] = values.times(raw[table.time], table.time_unit) if table.time else row
    made["kind"] = values.texts(raw[table.kind]) if table.kind else None
    made["value"], made["text"] = None, values.texts(raw[table.text]) if table.text else None
    if table.value:
        made["value"], counts["bad_value"] = values.numbers(raw[table.value])
    made["row"] = row
    events = pl.DataFrame(
        [
            (
                pl.Series(c, made[c], dtype=t)
                if made[c] is not None
                else pl.repeat(None, raw.height, dtype=t, eager=True)
            ).alias(c)
            for c, t in EVENT_SCHEMA.items()
        ]
    )
    if not table.time:
        return events, _no_bad_times()
    return _without_bad_times(events, raw[table.time])


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
    try:
        lines = pl.read_csv(
            path, has_header=False, separator="\n", quote_char=None, infer_schema=False, new_columns=["line"]
        )  # noqa: E501
    except pl.exceptions.NoDataError:
        raise InputError(_empty(card, "events", path)) from None
    except pl.exceptions.PolarsError as error:
        raise InputError(_unreadable(card, "events", path, error)) from None
    words = lines.select(pl.col("line").str.extract_all(r"\S+").alias("words")).filter(pl.col("words").list.len() > 0)
    if words.height == 0:
        raise InputError(_empty(card, "events", path))
    return words.select(pl.col("words").list.first().alias("user"), pl.col("words").list.slice(1).alias("items"))


def _joined_lists(raw: pl.DataFrame, user: str, columns: tuple[str, ...]) -> pl.DataFrame:
    """user, items (list): the lists or single ids of `columns`, end to end."""
    lists = [pl.Series(c, values.sequences(raw[c], ",")) for c in columns]
    return pl.DataFrame({"user": raw[user]}).with_columns(pl.concat_list(lists).alias("items"))


def _histories(frame: pl.DataFrame) -> pl.DataFrame:
    """Events of whole histories: time is the position in the user's history, over all of the user's rows."""
    flat = frame.explode("items").with_row_index("row").drop_nulls("items")
    made = flat.select(
        values.ids(flat["user"]).alias("user_id"),
        values.ids(flat["items"]).alias("item_id"),
        pl.col("row").cast(pl.Int64),
    ).with_columns(pl.int_range(pl.len()).over("user_id").alias("time"))
    return made.select(
        [pl.col(c) if c in made.columns else pl.lit(None, dtype=t).alias(c) for c, t in EVENT_SCHEMA.items()]
    )


def _read_items(card: Card, counts: dict[str, int]) -> pl.DataFrame:
    table = card.items
    raw = read_raw(card, "items")
    separator = table.list_separator or (" " if not is_frame(table.path) and format_of(table) == "recbole" else "|")
    none = pl.repeat(None, raw.height, dtype=pl.String, eager=True)
    columns = [
        values.ids(raw[table.id]).alias("item_id"),
        (values.texts(raw[table.title]) if table.title else none).alias("title"),
        values.joined([values.texts(raw[c]) for c in table.text], raw.height).alias("text"),
        values.merged([values.lists(raw[c], separator) for c in table.categories], raw.height).alias("categories"),
        values.merged([values.said(raw[c], table.list_separator) for c in table.attributes], raw.height).alias(
            "attributes"
        ),  # noqa: E501
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
    return pl.DataFrame(columns).with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("row"))


def _read_users(card: Card) -> pl.DataFrame:
    table = card.users
    raw = read_raw(card, "users")
    attributes = values.merged([values.said(raw[c], table.list_separator) for c in table.attributes], raw.height)
    return pl.DataFrame([values.ids(raw[table.id]).alias("user_id"), attributes.alias("attributes")]).with_columns(
        pl.int_range(pl.len(), dtype=pl.Int64).alias("row")
    )


def _read_corpus(card: Card) -> pl.DataFrame:
    raw = read_raw(card, "corpus")
    text = values.joined([values.texts(raw[c]) for c in card.corpus.text], raw.height)
    return pl.DataFrame([text.alias("text")]).with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("row"))


def _read_impressions(card: Card) -> tuple[pl.DataFrame, pl.DataFrame]:
    table = card.impressions
    raw = read_raw(card, "impressions")
    frame = pl.DataFrame(
        [
            values.ids(raw[table.user]).alias("user_id"),
            values.ids(raw[table.item]).alias("item_id"),
            values.times(raw[table.time], table.time_unit or card.events.time_unit).alias("time"),
            values.flags(raw[table.clicked]).alias("clicked"),
        ]
    ).with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("row"))
    return _without_bad_times(frame, raw[table.time])


def read_raw(card: Card, section: str) -> pl.DataFrame:
    """The columns of one table that its card names, unchanged; text formats give strings (nested values as JSON)."""
    table = getattr(card, section)
    wanted = _wanted(table)
    if is_frame(table.path):
        frame = values.as_polars(table.path)
        _check_columns(card, section, wanted, frame.columns, "the DataFrame")
        return _filled(card, section, frame.select(dict.fromkeys(wanted.values())), "the DataFrame")
    path, kind = Path(table.path), format_of(table)
    try:
        frame = READERS[kind](card, section, path, wanted)
    except pl.exceptions.NoDataError:
        raise InputError(_empty(card, section, path)) from None
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError, LookupError) as error:
        raise InputError(_unreadable(card, section, path, error)) from None
    return _filled(card, section, frame, path)


def _filled(card: Card, section: str, frame: pl.DataFrame, where: Any) -> pl.DataFrame:
    if frame.height == 0:
        raise InputError(_empty(card, section, where))
    return frame


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


def _check_columns(card: Card, section: str, wanted: dict[str, str], there: list[str], where: Any) -> None:
    for key, column in wanted.items():
        if column not in there:
            raise InputError(f"{card.origin}: {section}.{key}: {column!r}: no such column in {where}; {known(column, list(there), 'its columns')}")  # fmt: skip


def _columns(wanted: dict[str, str]) -> list[str]:
    return list(dict.fromkeys(wanted.values()))


def _delimited(card: Card, section: str, path: Path, wanted: dict[str, str]) -> pl.DataFrame:
    kind, encoding = format_of(getattr(card, section)), getattr(card, section).encoding
    options: dict[str, Any] = {"separator": "," if kind == "csv" else "\t", "infer_schema": False}
    if kind == "recbole":
        options["quote_char"] = None  # atomic files have no quoting
    source: Any = path
    if encoding.lower().replace("_", "-") not in ("utf-8", "utf8", "utf-8-sig"):
        source = path.read_bytes().decode(encoding).encode("utf-8")
    header = pl.read_csv(source, n_rows=0, **options).columns
    names = {name.split(":")[0] if kind == "recbole" else name.strip(): name for name in header}
    _check_columns(card, section, wanted, list(names), path)
    columns = _columns(wanted)
    frame = pl.read_csv(source, columns=[names[c] for c in columns], **options)
    return frame.rename({names[c]: c for c in columns}).select(columns)


def _parquet(card: Card, section: str, path: Path, wanted: dict[str, str]) -> pl.DataFrame:
    scan = pl.scan_parquet(path)
    _check_columns(card, section, wanted, scan.collect_schema().names(), path)
    return scan.select(_columns(wanted)).collect()


def _jsonl(card: Card, section: str, path: Path, wanted: dict[str, str]) -> pl.DataFrame:
    columns = _columns(wanted)
    try:
        frame = pl.read_ndjson(path, schema=dict.fromkeys(columns, pl.String))
    except pl.exceptions.ComputeError:
        return _slow_jsonl(card, section, path, wanted)  # names the line; and takes NaN, which Python writes
    if any(frame[c].null_count() == frame.height for c in columns):
        there = pl.scan_ndjson(path, infer_schema_length=None).collect_schema().names()
        _check_columns(card, section, wanted, there, path)
    return frame.select(columns)


def _slow_jsonl(card: Card, section: str, path: Path, wanted: dict[str, str]) -> pl.DataFrame:
    records = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{card.origin}: {section}.path: {path}, line {number}: not JSON ({error}); correct or remove that line") from None  # fmt: skip
            records.append(record)
    return _of_records(card, section, path, wanted, records)


def _json(card: Card, section: str, path: Path, wanted: dict[str, str]) -> pl.DataFrame:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(_unreadable(card, section, path, error)) from None
    if isinstance(data, dict):  # id -> record
        data = [{"id": key, **value} for key, value in data.items() if isinstance(value, dict)]
    return _of_records(card, section, path, wanted, data)


def _of_records(card: Card, section: str, path: Path, wanted: dict[str, str], records: Any) -> pl.DataFrame:
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise InputError(
            f"{card.origin}: {section}.path: {path}: its JSON is no list of objects; write one object a row"
        )
    there = list(dict.fromkeys(key for one in records for key in one))
    if records:
        _check_columns(card, section, wanted, there, path)
    columns = _columns(wanted)
    return pl.DataFrame(
        {c: [values.as_text(one.get(c)) for one in records] for c in columns}, schema=dict.fromkeys(columns, pl.String)
    )  # noqa: E501


READERS = {
    "csv": _delimited,
    "tsv": _delimited,
    "recbole": _delimited,
    "parquet": _parquet,
    "jsonl": _jsonl,
    "json": _json,
}  # noqa: E501


def _empty(card: Card, section: str, where: Any) -> str:
    return f"{card.origin}: {section}.path: {where}: holds no row; give a table with at least one"


def _unreadable(card: Card, section: str, path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    if "utf-8" in reason.lower() or "utf8" in reason.lower():
        return f"{card.origin}: {section}.path: {path}: not UTF-8; add `encoding:` to {section}, such as gb18030 or latin-1"
    return f"{card.origin}: {section}.path: {path}: not readable as {format_of(getattr(card, section))} ({reason}); correct the file or `format:`"  # fmt: skip
