"""What can be wrong with a data card before any table is opened, said in one line each."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import polars as pl

from m6rec_jax.errors import InputError
from m6rec_jax.vocab import N_KINDS

if TYPE_CHECKING:
    from m6rec_jax.data.card_types import Card

FORMATS = ("parquet", "csv", "tsv", "jsonl", "json", "recbole", "sequences")
TIME_UNITS = ("s", "ms", "iso", "order")
SPLIT_RULES = ("leave-one-out", "global-time", "ratio")
TABLE_NAMES = ("events", "items", "users", "corpus", "impressions")
REQUIRED = {
    "events": ("user", "item", "time"),
    "items": ("id",),
    "users": ("id",),
    "corpus": ("text",),
    "impressions": ("user", "item", "time", "clicked"),
}
ENDINGS = {
    "parquet": (".parquet", ".pq"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "recbole": (".inter", ".item", ".user"),
}
CONTENT_FIELDS = ("title", "categories", "attributes", "numbers", "text")
COMPRESSED = (".gz", ".zst")


def is_frame(value: Any) -> bool:
    """Whether a table was given as a DataFrame (polars, pandas, or anything that polars can take over)."""
    frame = isinstance(value, pl.DataFrame | pl.LazyFrame)
    return frame or hasattr(value, "__arrow_c_stream__") or hasattr(value, "iloc")


def paths_of(table: Any) -> tuple[Path, ...]:
    """The files of a table, one or several of the same columns, in the order in which they are read."""
    return tuple(Path(path) for path in (table.path if isinstance(table.path, list | tuple) else (table.path,)))


def format_of(table: Any) -> str:
    """The format of a file table: declared, or guessed from its ending; "" when neither says."""
    return table.format or guess_format(paths_of(table)[0])


def guess_format(path: Path | str) -> str:
    """The format that a file's ending stands for; "" when none."""
    suffixes = [s.lower() for s in Path(path).suffixes if s.lower() not in COMPRESSED]
    return next((name for name, endings in ENDINGS.items() if suffixes and suffixes[-1] in endings), "")


def known(given: Any, choices: tuple[str, ...] | list[str], what: str) -> str:
    """The tail of a message: the choices, and the nearest one when the value looks like a slip."""
    near = difflib.get_close_matches(str(given), choices, 1)
    return f"{what}: {', '.join(choices) or 'none'}" + (f" (did you mean {near[0]}?)" if near else "")


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = "<table>" if is_frame(value) else str(value) if isinstance(value, Path) else _listed(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _listed(value: Any) -> str:
    paths = isinstance(value, tuple) and all(isinstance(one, Path) for one in value)
    return ", ".join(map(str, value)) if paths else repr(value)


def example(section: str, key: str) -> str:
    """The way out of a missing key."""
    if key == "path":
        return f"name its file, such as {section}: {{path: {section}.csv, ...}}"
    if key == "time":
        return "name the column with the time, or set time_unit: order to take the rows in the order they stand"
    return f"name the column that holds it, such as {key}: {({'user': 'user_id', 'item': 'item_id'}).get(key, key)}"


def check_card(card: Card) -> None:
    """Raise InputError for a missing file, a value out of its range, or settings that contradict each other."""
    for section in TABLE_NAMES:
        if (table := getattr(card, section)) is not None:
            _check_table(card, section, table)
    if not isinstance(card.repeat, bool):
        _refuse(card, "repeat", card.repeat, "write true or false")
    _check_split(card)
    clean = card.clean
    _choice(card, "clean.unknown_items", clean.unknown_items, ("drop", "keep"))
    for key in ("min_user_events", "min_item_events"):
        if getattr(clean, key) < 0:
            _refuse(card, f"clean.{key}", getattr(clean, key), "a count cannot be negative")
    for key in ("max_title", "max_text"):
        if getattr(clean, key) < 1:
            _refuse(card, f"clean.{key}", getattr(clean, key), "must be at least 1 character")
    privacy = card.privacy
    _choice(card, "privacy.ids", privacy.ids, ("plain", "hmac"))
    if privacy.ids == "hmac" and not privacy.key:
        _refuse(card, "privacy.ids", "hmac", "needs `key:`, a file of random bytes outside the dataset")
    if privacy.ids == "plain" and privacy.key:
        _refuse(card, "privacy.key", privacy.key, "has no effect while ids is plain; set ids: hmac, or remove key")
    _check_kinds(card)
    _check_tasks(card)
    for name in card.content.fields:
        _choice(card, "content.fields", name, CONTENT_FIELDS)
    if not card.content.fields:
        _refuse(card, "content.fields", (), "name at least one field; model.content=false trains without content")
    for key, limit in vars(card.quality).items():
        if limit is not None and (limit < 0 or (key.startswith("max_") and limit > 1)):
            what = "a share lies between 0 and 1" if key.startswith("max_") else "a count cannot be negative"
            _refuse(card, f"quality.{key}", limit, what)


def _refuse(card: Card, key: str, value: Any, why: str) -> NoReturn:
    raise InputError(f"{card.origin}: {key}: {short(value)}: {why}")


def _choice(card: Card, key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        _refuse(card, key, value, known(value, choices, "choose one of"))


def _check_table(card: Card, section: str, table: Any) -> None:
    if table.format:
        _choice(card, f"{section}.format", table.format, FORMATS)
    if not is_frame(table.path):
        for path in paths_of(table):
            if not path.is_file():
                _refuse(card, f"{section}.path", path, f"no such file; {_files_beside(path)}")
        if not format_of(table):
            what = f"the ending says no format; add {section}.format: {', '.join(FORMATS)}"
            _refuse(card, f"{section}.path", paths_of(table)[0], what)
    if section in ("events", "impressions") and table.time_unit:
        _choice(card, f"{section}.time_unit", table.time_unit, TIME_UNITS)
    if table.format == "sequences":
        if section != "events":
            _refuse(card, f"{section}.format", "sequences", "only events can be sequences; choose another format")
        for key in ("user", "item", "time", "kind", "value", "text"):
            if getattr(table, key):
                why = "a sequences file has no columns (a line is: user item item ...); remove this key"
                _refuse(card, f"events.{key}", getattr(table, key), why)
        return
    if section == "events" and isinstance(table.item, tuple):
        for key in ("time", "kind", "value", "text"):
            if getattr(table, key):
                why = "item is a list of columns, so a row is a whole history in its order; remove this key"
                _refuse(card, f"events.{key}", getattr(table, key), why)
    for key in REQUIRED[section]:
        if not getattr(table, key) and not (key == "time" and section == "events" and table.time_unit == "order"):
            raise InputError(f"{card.origin}: {section}.{key}: missing; {example(section, key)}")


def _check_split(card: Card) -> None:
    split = card.split
    _choice(card, "split.rule", split.rule, SPLIT_RULES)
    if split.rule == "global-time" and card.events.time_unit == "order":
        why = "events.time_unit is order, no common clock; choose leave-one-out or ratio, or give real times"
        _refuse(card, "split.rule", split.rule, why)
    for key in ("valid", "test"):
        if not 0 < getattr(split, key) < 1:
            _refuse(card, f"split.{key}", getattr(split, key), "a share must lie between 0 and 1")
    if split.valid + split.test >= 1:
        why = f"with split.test {split.test} nothing is left for training; lower one of them"
        _refuse(card, "split.valid", split.valid, why)


def _check_kinds(card: Card) -> None:
    kinds = card.kinds
    if not isinstance(kinds, dict):
        _refuse(card, "kinds", kinds, "write kind: weight pairs, such as {view: 0.3, buy: 1.0}")
    for kind, weight in kinds.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            _refuse(card, f"kinds.{kind}", weight, "a weight is a number of at least 0")
    if kinds and not any(kinds.values()):
        _refuse(card, "kinds", kinds, "every weight is 0, so no event could be a target; give one a weight above 0")
    if len(kinds) > N_KINDS:
        _refuse(card, "kinds", f"{len(kinds)} kinds", f"at most {N_KINDS} are possible; merge some")


def _check_tasks(card: Card) -> None:
    for name, task in card.tasks.items():
        where = f"tasks.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            _refuse(card, where, name, "letters, digits, - and _ alone: a file is named after it")
        for key in ("valid", "test"):
            if not 0 < getattr(task, key) < 1:
                _refuse(card, f"{where}.{key}", getattr(task, key), "a share must lie between 0 and 1")
        if task.valid + task.test >= 1:
            _refuse(card, f"{where}.valid", task.valid, f"with test {task.test} nothing is left for training; lower one of them")  # fmt: skip
        if task.most < 1:
            _refuse(card, f"{where}.most", task.most, "must be at least 1")
        if task.path is None:
            for key in ("fields", "target", "group", "item", "split", "time"):
                if getattr(task, key):
                    _refuse(card, f"{where}.{key}", getattr(task, key), "names a column, and the task has no table; add path:, or remove the key")  # fmt: skip
            continue
        if task.least is not None:
            _refuse(card, f"{where}.least", task.least, "the own table says what is right; remove the key")
        _choice(card, f"{where}.time_unit", task.time_unit, TIME_UNITS)
        if task.split and task.time:
            _refuse(card, f"{where}.split", task.split, f"and time: {task.time} both part the rows; remove one of them")
        if task.format:
            _choice(card, f"{where}.format", task.format, FORMATS[:-1])
        if not is_frame(task.path):
            for path in paths_of(task):
                if not path.is_file():
                    _refuse(card, f"{where}.path", path, f"no such file; {_files_beside(path)}")
            if not format_of(task):
                _refuse(card, f"{where}.path", paths_of(task)[0], f"the ending says no format; add format: {', '.join(FORMATS[:-1])}")  # fmt: skip


def _files_beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either; paths are relative to the card"
    names = sorted(p.name for p in path.parent.iterdir() if p.is_file() and not p.name.startswith("."))
    return known(path.name, names[:20], f"files in {path.parent}")
