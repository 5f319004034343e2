"""What a card may not ask of the Beam path, said before anything is read."""

from __future__ import annotations

import polars as pl

from m6rec_jax.data.card import Card
from m6rec_jax.data.card_checks import COMPRESSED, format_of, is_frame, paths_of
from m6rec_jax.errors import InputError

FORMATS = ("parquet", "csv", "tsv", "recbole", "jsonl")


def check_accepted(card: Card) -> None:
    """Raise InputError for what only the runner `local` does."""

    def refuse(key: str, why: str) -> None:
        raise InputError(f"{card.origin}: {key}: {why}, which --runner beam does not do; use --runner local, or leave it out")  # fmt: skip

    for section in ("events", "items", "users", "corpus", "impressions"):
        if (table := getattr(card, section)) is not None and is_frame(table.path):
            refuse(f"{section}.path", "a DataFrame, held by one process")
    events = card.events
    if isinstance(events.item, tuple) or format_of(events) not in FORMATS:
        what = "item is a list of columns" if isinstance(events.item, tuple) else f"format {format_of(events)}"
        refuse("events", f"{what}, not one event a row in {', '.join(FORMATS)}")
    if card.users is not None:
        refuse("users", "a table of what is known of users")
    if card.impressions is not None:
        refuse("impressions", "a table of what was shown")
    if card.tasks:
        refuse("tasks", f"{', '.join(card.tasks)}: behaviour as text")
    if events.value:
        refuse("events.value", f"{events.value!r}: values, whose mean depends on their order")
    if events.encoding.lower().replace("_", "-") not in ("utf-8", "utf8", "utf-8-sig"):
        refuse("events.encoding", f"{events.encoding}, not UTF-8")
    paths = paths_of(events)
    if packed := next((path for path in paths if path.suffix.lower() in COMPRESSED), None):
        refuse("events.path", f"{packed}: compressed text")
    if format_of(events) == "parquet":
        _check_schemas(card)


def _check_schemas(card: Card) -> None:
    """Columns are there and of one type throughout: what is read of one file must not depend on the others."""
    events, known = card.events, None
    columns = {key: getattr(events, key) for key in ("user", "item", "time", "kind", "text") if getattr(events, key)}
    for path in paths_of(events):
        schema = pl.scan_parquet(path).collect_schema()
        for key, column in columns.items():
            if column not in schema:
                raise InputError(f"{card.origin}: events.{key}: {column!r}: no such column in {path}; its columns: {', '.join(schema)}")  # fmt: skip
        types = {column: schema[column] for column in columns.values()}
        for column, kind in types.items():
            if known and known[column] != kind:
                raise InputError(f"{card.origin}: events.path: {path}: {column!r} is {kind}, and {known[column]} in the files before; write both as one type, or use --runner local")  # fmt: skip
        known = types
