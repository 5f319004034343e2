"""A task's own table: rows of any accepted format as fields of its template, labelled and split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import xxhash

from m6rec_jax.data import values
from m6rec_jax.data.card import Card
from m6rec_jax.data.card_checks import is_frame, known, paths_of, short
from m6rec_jax.data.card_types import CardTask
from m6rec_jax.data.formats import read_whole
from m6rec_jax.data.instances.wording import gap_of
from m6rec_jax.data.privacy import hide_ids, read_key
from m6rec_jax.data.splits import SPLITS
from m6rec_jax.data.template import Template
from m6rec_jax.errors import InputError

TITLE, TIME = "title", "time"  # fields of an event that mean something here: what it was, when it was


def own_rows(card: Card, name: str, template: Template, rows: Mapping[str, int]) -> tuple[pl.DataFrame, tuple[str, ...]]:  # fmt: skip
    """(user_id, item_id, split, label and the fields of a task's table; its options). `rows`: catalogue row of an item id.

    Raises InputError naming card, key, value and the columns there are.
    """
    task = card.tasks[name]
    where = f"{card.origin}: tasks.{name}"
    raw = _raw(card, name, task)
    columns = _columns(where, task, template, raw.columns)
    fields, newest = [], None
    now = values.times(raw[task.time], task.time_unit) if task.time else None
    for field in template.fields:
        if field not in columns:
            continue
        if field in template.histories:
            series, newest = _history(where, raw, field, columns[field], task, template.language)
            fields.append(_rows_for_ids(series, template.spelled_events(field), rows))
        elif field in template.spelled:
            found = [rows.get(one, -1) if one is not None else -1 for one in values.ids(raw[columns[field]]).to_list()]
            fields.append(pl.Series(field, found, dtype=pl.Int64))
        else:
            fields.append(_text(raw[columns[field]], task.list_separator).alias(field))
    if "since" in template.fields and "since" not in columns and now is not None and newest is not None:
        pauses = [gap_of(a - b, template.language) if a is not None and b is not None else "" for a, b in zip(now.to_list(), newest, strict=True)]  # fmt: skip
        fields.append(pl.Series("since", pauses, dtype=pl.String))
    label, options = _labels(where, raw, task, template)
    none = pl.repeat(None, raw.height, dtype=pl.String, eager=True)
    frame = pl.DataFrame(
        [
            (values.ids(raw[task.group]) if task.group else none).alias("user_id"),
            (values.ids(raw[task.item]) if task.item else none).alias("item_id"),
            _splits(where, raw, task, now).alias("split"),
            label.alias("label"),
            *fields,
        ]
    )
    return hide_ids(frame, read_key(card)), options


def _raw(card: Card, name: str, task: CardTask) -> pl.DataFrame:
    section = f"tasks.{name}"
    if is_frame(task.path):
        raw = values.as_polars(task.path)
    else:
        stand_in = SimpleNamespace(origin=card.origin, **{section: task})
        parts = [read_whole(stand_in, section, path) for path in paths_of(task)]
        raw = pl.concat(parts, how="diagonal_relaxed") if len(parts) > 1 else parts[0]
    if raw.height == 0:
        raise InputError(f"{card.origin}: {section}.path: {short(task.path)}: holds no row; give a table with at least one")  # fmt: skip
    return raw


def _columns(where: str, task: CardTask, template: Template, there: Sequence[str]) -> dict[str, Any]:
    """field of the template -> its column (of a history: field of an event -> column)."""
    for field in task.fields:
        if field not in template.fields:
            raise InputError(f"{where}.fields.{field}: the template has no such field; {known(field, template.fields, 'its fields')}")  # fmt: skip
    made: dict[str, Any] = {}
    for field in template.fields:
        given = task.fields.get(field, field)
        if isinstance(given, dict):
            if field not in template.histories or TITLE not in given:
                raise InputError(f"{where}.fields.{field}: {short(given)}: only a history has columns for the parts of its events, {TITLE} among them; name one column")  # fmt: skip
            for part, column in given.items():
                _check(where, f"fields.{field}.{part}", column, there)
            made[field] = dict(given)
        elif given in there:
            made[field] = given
        elif field in task.fields:
            _check(where, f"fields.{field}", given, there)
    if task.target and not template.with_options:
        _check(where, "target", task.target, there)
        free = [one for one in template.answer_fields if one not in task.fields]
        if len(free) != 1:
            raise InputError(f"{where}.target: {task.target}: the answer of the template is made of {', '.join(template.answer_fields)}; name their columns under fields")  # fmt: skip
        made[free[0]] = task.target
    for field in template.needed:
        if field not in made:
            raise InputError(f"{where}.fields.{field}: the template {template.task} needs it, and there is no such column; name one; {known(field, list(there), 'the columns')}")  # fmt: skip
    for key in ("group", "item", "split", "time"):
        if column := getattr(task, key):
            _check(where, key, column, there)
    return made


def _check(where: str, key: str, column: str, there: Sequence[str]) -> None:
    if column not in there:
        raise InputError(f"{where}.{key}: {column!r}: no such column; {known(column, list(there), 'the columns')}")


def _text(series: pl.Series, separator: str) -> pl.Series:
    """Cells as text; a list becomes its values one after the other."""
    if isinstance(series.dtype, pl.List):
        return values.lists(series, separator).list.join(", ")
    if series.dtype == pl.Boolean:
        return series.cast(pl.String)
    return values.texts(series)


def _history(where: str, raw: pl.DataFrame, field: str, columns: str | dict[str, str], task: CardTask,
             language: str) -> tuple[pl.Series, list[int | None]]:  # fmt: skip
    """Events of every row as structs of texts, `gap` among them where there are times; the time of the last of each."""
    if isinstance(columns, str):
        events = [_of_cell(cell, task.list_separator) for cell in raw[columns].to_list()]
    else:
        lists = {part: [_of_cell(cell, task.list_separator) for cell in raw[c].to_list()] for part, c in columns.items()}  # fmt: skip
        events = []
        for number in range(raw.height):
            row = {part: [event[TITLE] for event in cells[number]] for part, cells in lists.items()}
            if len({len(some) for some in row.values()}) > 1:
                sizes = ", ".join(f"{part} {len(some)}" for part, some in row.items())
                raise InputError(f"{where}.fields.{field}: row {number + 1}: lists of different lengths ({sizes}); give every event all of its parts")  # fmt: skip
            events.append([dict(zip(row, event, strict=True)) for event in zip(*row.values(), strict=True)])
    newest: list[int | None] = []
    flat = [event[TIME] for some in events for event in some if TIME in event]
    if flat:
        moments = iter(values.times(pl.Series(flat, dtype=pl.String), task.time_unit).to_list())
        for some in events:
            before = None
            for event in some:
                at = next(moments) if TIME in event else None
                event.pop(TIME, None)
                if at is not None and before is not None:
                    event["gap"] = gap_of(at - before, language)
                before = at if at is not None else before
            newest.append(before)
    else:
        newest = [None] * len(events)
    keys = sorted({key for some in events for event in some for key in event} | {TITLE})
    kind = pl.List(pl.Struct(dict.fromkeys(keys, pl.String)))
    full = [[{key: event.get(key) for key in keys} for event in some] for some in events]
    return pl.Series(field, full, dtype=kind), newest


def _rows_for_ids(events: pl.Series, spelled: Sequence[str], rows: Mapping[str, int]) -> pl.Series:
    """Events whose items to be spelled are catalogue rows instead of ids; an item that is in no catalogue is left out."""
    if not spelled:
        return events
    known = {item: str(row) for item, row in rows.items()}
    found = [
        [event | {part: known.get(event.get(part)) for part in spelled} for event in some] for some in events.to_list()
    ]
    return pl.Series(events.name, found, dtype=events.dtype)


def _of_cell(cell: Any, separator: str) -> list[dict[str, str]]:
    """The events that a cell lists: titles, or mappings of what is known of each."""
    if isinstance(cell, str):
        text = cell.strip()
        if text[:1] == "[" and text[-1:] == "]":
            try:
                cell = json.loads(text)
            except ValueError:
                cell = text.split(separator)
        else:
            cell = text.split(separator) if text else []
    made = []
    for one in cell if isinstance(cell, list | tuple) else [] if cell is None else [cell]:
        if isinstance(one, Mapping):
            event = {str(key): values.as_text(value) for key, value in one.items()}
            made.append({key: value for key, value in event.items() if value is not None})
        elif (text := values.as_text(one)) is not None and text.strip():
            made.append({TITLE: text.strip()})
    return made


def _labels(where: str, raw: pl.DataFrame, task: CardTask, template: Template) -> tuple[pl.Series, tuple[str, ...]]:
    """The number of the right option of each row (-1: none is said), and the options by number."""
    if template.objective == "plausibility" and task.target:
        _check(where, "target", task.target, raw.columns)
        return values.flags(raw[task.target]).cast(pl.Int32).fill_null(-1), ()
    if not template.with_options:
        return pl.repeat(-1, raw.height, dtype=pl.Int32, eager=True), ()
    if not task.target:
        raise InputError(f"{where}.target: missing; name the column with the right option, such as target: label")
    _check(where, "target", task.target, raw.columns)
    text = values.texts(raw[task.target])
    named = tuple(task.options) or template.options
    if raw[task.target].dtype == pl.Boolean or template.objective == "scoring":
        named = named or ("no", "yes")
        if len(named) != 2:
            raise InputError(f"{where}.options: {len(named)} options, and the labels are true or false; name two, the negative first")  # fmt: skip
        by_name = text.replace_strict(list(named), [0, 1], default=None, return_dtype=pl.Int32)
        label = by_name.fill_null(values.flags(text).cast(pl.Int32))
        _refuse_unknown(where, task, text, label, named)
        return label.fill_null(-1), named
    there = sorted(text.drop_nulls().unique().to_list(), key=lambda one: (not one.lstrip("-").isdigit(), int(one) if one.lstrip("-").isdigit() else 0, one))  # fmt: skip
    if not named:
        named = tuple(there)
    if len(named) < 2:
        raise InputError(f"{where}.target: {task.target}: one class alone ({', '.join(named) or 'none'}); at least two are needed")  # fmt: skip
    numbers = {str(number): number for number in range(len(named))}
    by_name = not all(one in numbers for one in there) or set(there) <= set(named)
    names = {one: number for number, one in enumerate(named)} if by_name else numbers
    label = text.replace_strict(list(names), list(names.values()), default=None, return_dtype=pl.Int32)
    _refuse_unknown(where, task, text, label, named)
    return label.fill_null(-1), named


def _refuse_unknown(where: str, task: CardTask, text: pl.Series, label: pl.Series, options: Sequence[str]) -> None:
    odd = text.filter(text.is_not_null() & label.is_null())
    if len(odd):
        classes = text.drop_nulls().n_unique()
        raise InputError(f"{where}.target: {task.target}: {odd[0]!r} is none of the {len(options)} options, and the column holds {classes} classes; {known(odd[0], list(options), 'the options')}")  # fmt: skip


# -- splits ------------------------------------------------------------------------------------------------------


def _splits(where: str, raw: pl.DataFrame, task: CardTask, now: pl.Series | None) -> pl.Series:
    """train, valid or test for each row: as the column says, else by time, else by whole groups, else by rows."""
    if task.split:
        said = values.texts(raw[task.split]).str.to_lowercase()
        said = said.replace({"validation": "valid", "dev": "valid", "training": "train"})
        odd = said.filter(~said.is_in(list(SPLITS)).fill_null(False))
        if len(odd):
            raise InputError(f"{where}.split: {task.split}: {odd[0]!r} in row {int((said.eq_missing(odd[0])).arg_max() or 0) + 1}; write train, valid or test in every row")  # fmt: skip
        return said
    if now is not None:
        if now.null_count():
            raise InputError(f"{where}.time: {task.time}: no time in row {int(now.is_null().arg_max() or 0) + 1}; look at time_unit, or fill it in")  # fmt: skip
        order = now.sort()
        cuts = [int(order[int(len(now) * share)]) for share in (1 - task.valid - task.test, 1 - task.test)]
        number = np.searchsorted(np.array(cuts), now.to_numpy(), side="right")
        return pl.Series([SPLITS[i] for i in number.tolist()], dtype=pl.String)
    if task.group:
        groups = values.ids(raw[task.group])
        if groups.null_count():
            raise InputError(f"{where}.group: {task.group}: nothing in row {int(groups.is_null().arg_max() or 0) + 1}; every row belongs to a group")  # fmt: skip
        return _by_hash(groups, task)
    return _by_hash(pl.Series([values.as_text(list(row)) or "" for row in raw.iter_rows()], dtype=pl.String), task)


def _by_hash(keys: pl.Series, task: CardTask) -> pl.Series:
    """The shares of distinct keys, in the order of their hash: rows of one key go together, in whatever order they come."""
    distinct = sorted(keys.unique().to_list(), key=lambda key: (xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogatepass")), key))  # fmt: skip
    n = len(distinct)
    test, valid = (max(1, round(n * share)) if n > 2 else 0 for share in (task.test, task.valid))
    named = ["test"] * test + ["valid"] * valid + ["train"] * (n - test - valid)
    return keys.replace_strict(distinct, named, return_dtype=pl.String)
