"""Files of every accepted format as polars frames, only the columns that a card names, cells unchanged.

A text file is read as text throughout, so an id `007` stays `007` and a column that mixes numbers with words
reads the same whichever comes first; nested JSON comes as its text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import polars as pl

from m6rec_jax.data import values
from m6rec_jax.data.card import Card
from m6rec_jax.data.card_checks import format_of, is_frame, known, paths_of, short
from m6rec_jax.errors import InputError


def read_raw(card: Card, section: str) -> pl.DataFrame:
    """The columns of one table that its card names, unchanged; text formats give strings (nested values as JSON)."""
    table = getattr(card, section)
    wanted = _wanted(table)
    if is_frame(table.path):
        frame = values.as_polars(table.path)
        _check_columns(card, section, wanted, frame.columns, "the DataFrame")
        return _filled(card, section, frame.select(_columns(wanted)))
    parts = [read_file(card, section, path) for path in paths_of(table)]
    return _filled(card, section, pl.concat(parts, how="vertical_relaxed") if len(parts) > 1 else parts[0])


def read_file(card: Card, section: str, path: Path) -> pl.DataFrame:
    """`read_raw` of one file of a table, which may hold no row."""
    table = getattr(card, section)
    reader = READERS[format_of(table)]
    return _guarded(card, section, path, lambda p: reader(card, section, p, _wanted(table)))


def read_whole(card: Any, section: str, path: Path) -> pl.DataFrame:
    """All columns of one file of a table, unchanged; text formats give strings (nested values as JSON)."""
    table = getattr(card, section)

    def read(path: Path) -> pl.DataFrame:
        kind = format_of(table)
        if kind == "parquet":
            return pl.read_parquet(path)
        source = _utf8(path, table.encoding)
        if kind in ("jsonl", "json"):
            raw = source if isinstance(source, bytes) else source.read_bytes()
            records = json_records(raw) if kind == "json" else json_lines(raw.decode("utf-8-sig").split("\n"))
            return records_frame(records, record_columns(records))
        quote = None if kind == "recbole" else '"'
        frame = pl.read_csv(source, separator="," if kind == "csv" else "\t", infer_schema=False, quote_char=quote)
        return frame.rename({c: c.split(":")[0] if kind == "recbole" else c.strip() for c in frame.columns})

    return _guarded(card, section, path, read)


def read_sequences(card: Card) -> pl.DataFrame:
    """user, items (list) of each line `user item item ...`."""
    options = {"has_header": False, "separator": "\n", "quote_char": None, "infer_schema": False}

    def lines(path: Path) -> pl.DataFrame:
        return pl.read_csv(_utf8(path, card.events.encoding), new_columns=["line"], **options)

    whole = pl.concat([_guarded(card, "events", path, lines) for path in paths_of(card.events)])
    words = whole.select(pl.col("line").str.extract_all(r"\S+").alias("words")).filter(pl.col("words").list.len() > 0)
    return _filled(card, "events", words).select(
        pl.col("words").list.first().alias("user"), pl.col("words").list.slice(1).alias("items")
    )


def _guarded(card: Card, section: str, path: Path, read: Callable[[Path], pl.DataFrame]) -> pl.DataFrame:
    """Run a reader; what it raises about the file becomes an InputError."""
    table = getattr(card, section)
    where = f"{card.origin}: {section}.path: {path}"
    try:
        return read(path)
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


def _check_columns(card: Card, section: str, wanted: dict[str, str], there: list[str], where: Any) -> None:
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
    _check_columns(card, section, wanted, list(names), path)
    columns = _columns(wanted)
    frame = pl.read_csv(source, columns=[names[c] for c in columns], **options)
    return frame.rename({names[c]: c for c in columns}).select(columns)


def _parquet(card: Card, section: str, path: Path, wanted: dict[str, str]) -> pl.DataFrame:
    scan = pl.scan_parquet(path)
    _check_columns(card, section, wanted, scan.collect_schema().names(), path)
    return scan.select(_columns(wanted)).collect()


def _jsonl(card: Card, section: str, path: Path, wanted: dict[str, str]) -> pl.DataFrame:
    columns, source = _columns(wanted), _utf8(path, getattr(card, section).encoding)
    try:
        frame = pl.read_ndjson(source, schema=dict.fromkeys(columns, pl.String))
    except pl.exceptions.ComputeError:
        return _slow_jsonl(card, section, path, wanted)  # names the line; and takes NaN, which Python writes
    if frame.height and any(frame[c].null_count() == frame.height for c in columns):
        there = pl.read_ndjson(source, infer_schema_length=None).columns
        _check_columns(card, section, wanted, there, path)
    return frame.select(columns)


def _slow_jsonl(card: Card, section: str, path: Path, wanted: dict[str, str]) -> pl.DataFrame:
    source = _utf8(path, getattr(card, section).encoding)
    lines = (source if isinstance(source, bytes) else source.read_bytes()).decode("utf-8-sig").split("\n")
    return _of_records(card, section, path, wanted, json_lines(lines))


def _json(card: Card, section: str, path: Path, wanted: dict[str, str]) -> pl.DataFrame:
    source = _utf8(path, getattr(card, section).encoding)
    return _of_records(card, section, path, wanted, json_records(source if isinstance(source, bytes) else source.read_bytes()))  # fmt: skip


def json_records(raw: bytes) -> list[dict[str, Any]]:
    """The rows of one JSON value: a list of objects, or an object of them by id. Raises ValueError otherwise."""
    data = json.loads(raw.decode("utf-8-sig"))
    if isinstance(data, dict):
        data = [{"id": key, **value} for key, value in data.items() if isinstance(value, dict)]
    if not isinstance(data, list):
        raise ValueError("a row has to be a JSON object")
    return data


def json_lines(lines: Iterable[str]) -> list[Any]:
    """The values of JSON Lines, blank lines left out. Raises ValueError naming the line."""
    records = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return records


def record_columns(records: list[dict[str, Any]]) -> list[str]:
    """Every key of any record, in the order of their first appearance. Raises ValueError for what is no object."""
    if not all(isinstance(one, dict) for one in records):
        raise ValueError("a row has to be a JSON object")
    return list(dict.fromkeys(key for one in records for key in one))


def records_frame(records: list[dict[str, Any]], columns: list[str]) -> pl.DataFrame:
    """Records as text columns, nested values as JSON."""
    cells = {c: [values.as_text(one.get(c)) for one in records] for c in columns}
    return pl.DataFrame(cells, schema=dict.fromkeys(columns, pl.String))


def _of_records(card: Card, section: str, path: Path, wanted: dict[str, str], records: list[Any]) -> pl.DataFrame:
    there = record_columns(records)
    if records:
        _check_columns(card, section, wanted, there, path)
    return records_frame(records, _columns(wanted))


READERS = {
    "csv": _delimited,
    "tsv": _delimited,
    "recbole": _delimited,
    "parquet": _parquet,
    "jsonl": _jsonl,
    "json": _json,
}
