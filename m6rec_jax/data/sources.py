"""Raw tables, whatever their format, as polars frames with canonical columns; user ids hidden if the card says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import polars as pl

from m6rec_jax.data import values
from m6rec_jax.data.card import Card, Corpus, Events, Impressions, Items, Users
from m6rec_jax.data.card_checks import format_of, is_frame
from m6rec_jax.data.formats import read_raw, read_sequences
from m6rec_jax.data.privacy import hide_ids, read_key
from m6rec_jax.errors import InputError

REJECTED_SCHEMA = {"table": pl.String, "row": pl.Int64, "rule": pl.String, "content": pl.String}
EVENT_SCHEMA = {
    "user_id": pl.String,
    "item_id": pl.String,
    "time": pl.Int64,
    "fraction": pl.Float64,
    "kind": pl.String,
    "value": pl.Float64,
    "text": pl.String,
    "row": pl.Int64,
}
CONTENT_LIMIT = 1000  # characters of a rejected row that are kept


@dataclass(frozen=True)
class Tables:
    """Canonical tables, source order kept in `row`; a column that the card does not name is there, all null.

    events: user_id, item_id, time (whole seconds since 1970, or the order), fraction (what the source says of the time
    beyond that, in [0, 1)), kind, value, text.
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
    counts = {"bad_value": 0, "bad_number": 0}
    found = {name: read_table(card, name, counts) for name in READERS}
    frames = {name: one[0] if one else None for name, one in found.items()}
    return Tables(**frames, rejected=pl.concat([one[1] for one in found.values() if one]), counts=counts)


def read_table(card: Card, section: str, counts: dict[str, int]) -> tuple[pl.DataFrame, pl.DataFrame] | None:
    """One table of a card, and its rows whose time says nothing as rejected rows; None when the card has no such table."""
    if (table := getattr(card, section)) is None:
        return None
    key = read_key(card)
    try:
        frame, bad_times = READERS[section](card, table, counts)
    except pl.exceptions.PolarsError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{card.origin}: {section}: a column is of no usable type ({reason}); convert it") from None
    return hide_ids(frame, key), rejected_rows(section, "bad_time", hide_ids(bad_times, key))


def rejected_rows(table: str, rule: str, rows: pl.DataFrame) -> pl.DataFrame:
    """Rows (with a `row` column) as entries of rejected.parquet: table, row, rule, content (JSON, cut)."""
    content = rows.drop("row")
    cut = [pl.col(c).str.slice(0, CONTENT_LIMIT) for c, t in content.schema.items() if t == pl.String]
    as_json = pl.struct(content.columns).struct.json_encode().str.slice(0, 4 * CONTENT_LIMIT).alias("content")
    return content.with_columns(cut).select(
        pl.lit(table).alias("table"), rows["row"].cast(pl.Int64), pl.lit(rule).alias("rule"), as_json
    )


def _read_events(card: Card, table: Events, counts: dict[str, int]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Canonical events, and those whose time could not be understood (user_id, item_id, time, row)."""
    if not is_frame(table.path) and format_of(table) == "sequences":
        return _histories(read_sequences(card)), _no_bad_times()
    raw = read_raw(card, "events")
    if isinstance(table.item, tuple):
        return _histories(_joined_lists(raw, table.user, table.item)), _no_bad_times()
    return canonical_events(raw, table, counts)


def canonical_events(raw: pl.DataFrame, table: Events, counts: dict[str, int]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Raw rows as canonical events, and those whose time could not be understood; each row by itself."""
    columns = {"user_id": values.ids(raw[table.user]), "item_id": values.ids(raw[table.item])}
    columns["row"] = pl.int_range(raw.height, dtype=pl.Int64, eager=True)
    columns["time"] = columns["row"]
    if table.time:
        columns["time"], columns["fraction"] = values.moments(raw[table.time], table.time_unit)
    for name in ("kind", "text"):
        if column := getattr(table, name):
            columns[name] = values.texts(raw[column])
    if table.value:
        columns["value"], counts["bad_value"] = values.numbers(raw[table.value])
    events = _canonical(pl.DataFrame(columns))
    return _without_bad_times(events, raw[table.time]) if table.time else (events, _no_bad_times())


def _canonical(events: pl.DataFrame) -> pl.DataFrame:
    """The columns of EVENT_SCHEMA in their order; those that are not there, null (no fraction is 0)."""
    absent = {"fraction": 0.0}
    return events.select(
        (pl.col(name) if name in events.columns else pl.lit(absent.get(name))).cast(kind).alias(name)
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


def _joined_lists(raw: pl.DataFrame, user: str, columns: tuple[str, ...]) -> pl.DataFrame:
    """user, items (list): the lists or single ids of `columns`, end to end."""
    none = pl.Series([[]], dtype=pl.List(pl.String))
    lists = [values.sequences(raw[c], ",").fill_null(none).alias(str(i)) for i, c in enumerate(columns)]
    return pl.DataFrame({"user": raw[user]}).with_columns(pl.concat_list(lists).alias("items"))


def _histories(frame: pl.DataFrame) -> pl.DataFrame:
    """Events of whole histories (user, items): time is the position in the history.

    Rows of one user continue each other; where a row begins with what the one before ended with (windows that
    slide over a history), the common part counts once.
    """
    frame = frame.with_columns(values.ids(frame["user"]).alias("user"))
    if frame["user"].is_duplicated().any():
        joined = frame.group_by("user", maintain_order=True).agg("items")
        rows = [windows[0] if len(windows) == 1 else _continued(windows) for windows in joined["items"].to_list()]
        frame = pl.DataFrame({"user": joined["user"], "items": pl.Series(rows, dtype=pl.List(pl.String))})
    flat = frame.explode("items", empty_as_null=True).with_row_index("row")
    made = flat.select(
        pl.col("user").alias("user_id"),
        values.ids(flat["items"]).alias("item_id"),
        pl.col("row").cast(pl.Int64),
    ).with_columns(pl.int_range(pl.len()).over("user_id").alias("time"))
    return _canonical(made)


def _continued(windows: list[list[str]]) -> list[str]:
    whole: list[str] = []
    for window in windows:
        longest = min(len(whole), len(window))
        common = next((n for n in range(longest, 0, -1) if whole[-n:] == window[:n]), 0)
        whole += window[common:]
    return whole


def _read_items(card: Card, table: Items, counts: dict[str, int]) -> tuple[pl.DataFrame, pl.DataFrame]:
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


def _read_users(card: Card, table: Users, counts: dict[str, int]) -> tuple[pl.DataFrame, pl.DataFrame]:
    raw = read_raw(card, "users")
    attributes = values.merged([values.said(raw[c], table.list_separator) for c in table.attributes], raw.height)
    return _numbered([values.ids(raw[table.id]).alias("user_id"), attributes.alias("attributes")]), _no_bad_times()


def _read_corpus(card: Card, table: Corpus, counts: dict[str, int]) -> tuple[pl.DataFrame, pl.DataFrame]:
    raw = read_raw(card, "corpus")
    return _numbered([values.joined([values.texts(raw[c]) for c in table.text], raw.height).alias("text")]), _no_bad_times()  # fmt: skip


def _read_impressions(card: Card, table: Impressions, counts: dict[str, int]) -> tuple[pl.DataFrame, pl.DataFrame]:
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


READERS: dict[str, Callable[..., tuple[pl.DataFrame, pl.DataFrame]]] = {
    "events": _read_events,
    "items": _read_items,
    "users": _read_users,
    "corpus": _read_corpus,
    "impressions": _read_impressions,
}
