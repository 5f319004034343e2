"""Cells of raw tables as typed columns: ids, times, numbers, dates, lists, "name: value" phrases."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl

NAMELESS = {"attribute", "attributes", "features", "details", "properties", "tags"}  # names that say nothing of a value
MICRO = 1_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TRUE, FALSE = ("1", "true", "t", "yes", "y", "click", "clicked"), ("0", "false", "f", "no", "n", "")


def as_polars(frame: Any) -> pl.DataFrame:
    """A polars, pandas or Arrow table as a polars DataFrame; columns of mixed Python values become text."""
    if isinstance(frame, pl.LazyFrame):
        frame = frame.collect()
    if hasattr(frame, "iloc"):
        return pl.DataFrame({str(name): _of_pandas(frame[name]) for name in frame.columns})
    frame = pl.DataFrame(frame)
    mixed = [name for name, kind in frame.schema.items() if kind == pl.Object]
    return frame.with_columns(pl.Series(c, [as_text(v) for v in frame[c]], dtype=pl.String) for c in mixed)


def _of_pandas(column: Any) -> pl.Series:
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "iufbM":
        return pl.Series(column.to_numpy())
    cells = column.tolist()
    try:
        return pl.Series(cells, dtype=pl.String, strict=True)
    except (TypeError, pl.exceptions.PolarsError):
        return pl.Series([as_text(cell) for cell in cells], dtype=pl.String)


def as_text(value: Any) -> str | None:
    """A Python value as the text a CSV file would hold; lists and mappings as JSON; None and NaN as None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return None if math.isnan(value) else str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    if hasattr(value, "tolist"):
        return as_text(value.tolist())
    text = str(value)
    return None if text in ("nan", "NaT", "<NA>") else text


def texts(series: pl.Series) -> pl.Series:
    """As strings, white space at the ends removed, empty as null; whole floats without their `.0`."""
    kind = series.dtype
    if kind.is_float():
        whole = series.is_finite() & (series == series.floor()) & (series.abs() < 2**53)
        number = series.fill_nan(None)
        if whole.fill_null(True).all():
            return number.cast(pl.Int64, strict=False).cast(pl.String)
        return pl.select(
            pl.when(whole).then(number.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(number.cast(pl.String))
        ).to_series()
    if kind.is_nested():
        return pl.Series([as_text(v) for v in series.to_list()], dtype=pl.String)
    if kind != pl.String:
        return series.cast(pl.String)
    return series.to_frame("x").select(pl.col("x").str.strip_chars().replace("", None)).to_series()


def ids(series: pl.Series) -> pl.Series:
    """Ids as strings: 1, "1" and 1.0 are the same id; control characters are removed; empty is null."""
    made = texts(series)
    if series.dtype != pl.String:
        return made
    column = pl.col("x")
    made = made.to_frame("x")
    if made.select(column.str.contains(r"\p{Cc}").any()).item():
        made = made.select(column.str.replace_all(r"\p{Cc}", "").replace("", None))
    if made.select(column.str.ends_with("0").and_(column.str.contains(r"^-?\d+\.0+$")).any()).item():
        made = made.select(column.str.replace(r"^(-?\d+)\.0+$", "$1"))
    return made.to_series()


def times(series: pl.Series, unit: str) -> pl.Series:
    """Seconds since 1970 (i64), or the plain order number, rounded down; null where it cannot be understood.

    A column of dates needs no unit; a date without a zone is taken as UTC.
    """
    return moments(series, unit)[0]


def moments(series: pl.Series, unit: str) -> tuple[pl.Series, pl.Series]:
    """`times`, and what rounding down took from each (f64 in [0, 1)): what sorts within a second."""
    if series.dtype.is_temporal():
        return _parted(*_ticks(series))
    if unit == "iso":
        return _parted(_iso(texts(series)), MICRO)
    scale, rest = 1000 if unit == "ms" else 1, None
    if series.dtype.is_integer():
        number = series.cast(pl.Int64, strict=False)
    elif series.dtype.is_float():
        number, rest = series.floor().cast(pl.Int64, strict=False), series - series.floor()
    else:
        text = texts(series)
        number = text.cast(pl.Int64, strict=False)
        if number.null_count() > text.null_count():
            exact = text.cast(pl.Float64, strict=False)
            number, rest = number.fill_null(exact.floor().cast(pl.Int64, strict=False)), exact - exact.floor()
    return _parted(number, scale, rest)


def _parted(ticks: pl.Series, a_second: int, rest: pl.Series | None = None) -> tuple[pl.Series, pl.Series]:
    """Whole seconds, and the fraction left; `rest` is the fraction of a tick."""
    seconds = ticks // a_second
    left = (ticks - seconds * a_second).cast(pl.Float64)
    if rest is not None:
        left = left + rest.cast(pl.Float64).fill_nan(0).fill_null(0)
    return seconds, (left / a_second).fill_null(0)


def _ticks(series: pl.Series) -> tuple[pl.Series, int]:
    """Whole ticks since 1970 of a column of dates or datetimes, and how many make a second."""
    if series.dtype == pl.Date:
        series = series.cast(pl.Datetime("us"))
    if not isinstance(series.dtype, pl.Datetime):
        return pl.repeat(None, len(series), dtype=pl.Int64, eager=True), 1
    return series.to_physical(), {"ms": 1000, "us": MICRO, "ns": 1000 * MICRO}[series.dtype.time_unit]


def _iso(text: pl.Series) -> pl.Series:
    """Microseconds since 1970."""
    made = pl.repeat(None, len(text), dtype=pl.Int64, eager=True)
    for form in ("%Y-%m-%dT%H:%M:%S%.fZ", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f"):
        if made.null_count() == text.null_count():
            return made
        made = made.fill_null(text.str.to_datetime(form, strict=False, time_unit="us").dt.epoch("us"))
    if made.null_count() == text.null_count():
        return made
    left = text.filter(made.is_null()).drop_nulls().unique()
    found = pl.Series([_iso_micros(one) for one in left.to_list()], dtype=pl.Int64)
    return made.fill_null(text.replace_strict(left, found, default=None, return_dtype=pl.Int64))


def _iso_micros(text: str) -> int | None:
    try:
        moment = datetime.fromisoformat(text)
        return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        return None


def _iso_seconds(text: str) -> int | None:
    micros = _iso_micros(text)
    return None if micros is None else micros // MICRO


def dates(series: pl.Series) -> pl.Series:
    """Seconds since 1970 of years (1995), days (19950131, 1995-01-31), seconds or milliseconds; null otherwise."""
    if series.dtype.is_temporal():
        return _parted(*_ticks(series))[0]
    return _mapped(texts(series), _date_seconds, pl.Int64)


def _date_seconds(text: str) -> int | None:
    try:
        number = math.floor(float(text))
    except (ValueError, OverflowError):
        return _iso_seconds(text)
    if 1000 <= number <= 2999:
        return _iso_seconds(f"{number:04d}-01-01")
    if 10_000_101 <= number <= 29_991_231 and (seconds := _iso_seconds(str(number))) is not None:
        return seconds
    return number // 1000 if abs(number) >= 100_000_000_000 else number


def numbers(series: pl.Series) -> tuple[pl.Series, int]:
    """f64 column (currency signs and thousands commas understood; NaN and infinities null), and how many were not."""
    filled = len(series) - series.null_count()
    if series.dtype.is_numeric() or series.dtype == pl.Boolean:
        made = series.cast(pl.Float64)
    else:
        text = texts(series)
        filled = len(text) - text.null_count()
        made = text.cast(pl.Float64, strict=False)
        if made.null_count() > text.null_count():
            bare = text.str.replace_all(r"[\s$€£¥￥₹,]", "")
            made = made.fill_null(bare.cast(pl.Float64, strict=False))
    made = pl.select(pl.when(made.is_finite()).then(made)).to_series()
    return made, filled - (len(made) - made.null_count())


def flags(series: pl.Series) -> pl.Series:
    """Booleans of 0/1, true/false, yes/no; null where it is neither."""
    if series.dtype == pl.Boolean:
        return series
    if series.dtype.is_numeric():
        return series > 0
    return _mapped(
        texts(series), lambda t: True if t.lower() in TRUE else False if t.lower() in FALSE else None, pl.Boolean
    )


def lists(series: pl.Series, separator: str) -> pl.Series:
    """Lists of strings: nested lists flattened, a text cell parsed (JSON or Python list) or parted at `separator`."""
    if series.dtype.is_nested():
        return pl.Series([_distinct(_flat(v)) for v in series.to_list()], dtype=pl.List(pl.String))
    return _mapped(texts(series), lambda t: _distinct(_flat(_parsed(t, separator))), pl.List(pl.String))


def sequences(series: pl.Series, separator: str) -> pl.Series:
    """As `lists`, every value kept in its place, repeats included: whole histories in a cell."""
    if series.dtype.is_nested():
        return pl.Series([_flat(v) for v in series.to_list()], dtype=pl.List(pl.String))
    return _mapped(texts(series), lambda t: _flat(_parsed(t, separator)), pl.List(pl.String))


def said(series: pl.Series, separator: str = "") -> pl.Series:
    """Lists of phrases "name: value", one a value; a mapping says its own names."""
    prefix = "" if series.name.lower() in NAMELESS else f"{series.name.replace('_', ' ')}: "

    def phrases(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [f"{name}: {one}" for name, inner in value.items() for one in _flat(inner)]
        return [prefix + one for one in _flat(value)]

    if series.dtype.is_nested():
        return pl.Series([_distinct(phrases(v)) for v in series.to_list()], dtype=pl.List(pl.String))
    return _mapped(texts(series), lambda t: _distinct(phrases(_parsed(t, separator))), pl.List(pl.String))


def merged(columns: list[pl.Series], height: int) -> pl.Series:
    """Several list columns as one, each value once; an empty list where there is none."""
    empty = pl.Series([[]], dtype=pl.List(pl.String))
    if not columns:
        return empty.new_from_index(0, height)
    whole = pl.select(pl.concat_list([c.fill_null(empty) if c.null_count() else c for c in columns])).to_series()
    return whole if len(columns) == 1 else whole.list.unique(maintain_order=True)


def joined(columns: list[pl.Series], height: int) -> pl.Series:
    """Text columns joined by a space, lists among them spelled out; null where all are."""
    plain = [
        _mapped(c, lambda t: " ".join(_flat(_parsed(t, ""))) if t[0] == "[" else t, pl.String) if _listlike(c) else c
        for c in columns
    ]
    if not plain:
        return pl.repeat(None, height, dtype=pl.String, eager=True)
    if len(plain) == 1:
        return plain[0]
    return pl.select(pl.concat_str(plain, separator=" ", ignore_nulls=True).replace("", None)).to_series()


def _listlike(series: pl.Series) -> bool:
    return bool(series.str.starts_with("[").any())


def _mapped(text: pl.Series, function: Callable[[str], Any], kind: Any) -> pl.Series:
    """`function` of every string, computed once for each distinct one."""
    unique = text.drop_nulls().unique()
    made = pl.DataFrame({"x": unique, "y": pl.Series([function(t) for t in unique.to_list()], dtype=kind)})
    return text.to_frame("x").join(made, on="x", how="left", maintain_order="left")["y"]


def _parsed(text: str, separator: str) -> Any:
    """A cell as the list or mapping it spells (JSON, or Python's way of writing one), else parted at `separator`."""
    if text[0] in "[{" and text[-1] in "]}":
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text
    return text.split(separator) if separator else text


def _flat(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"{name}: {one}" for name, inner in value.items() for one in _flat(inner)]
    if isinstance(value, list | tuple | set):
        return [text for one in value for text in _flat(one)]
    text = as_text(value)
    return [text.strip()] if text and text.strip() else []


def _distinct(found: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(found))
