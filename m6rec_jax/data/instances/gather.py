"""The tasks of a card, told: each from its own table, from the dataset's other tables, or as a dataset had it before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from m6rec_jax.data.card import Card
from m6rec_jax.data.card_types import CardTask
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.instances.derive import RECIPES, derived_rows
from m6rec_jax.data.instances.read import FOLDER
from m6rec_jax.data.instances.table import own_rows
from m6rec_jax.data.instances.told import COLUMNS, Told, tell
from m6rec_jax.data.instances.world import World
from m6rec_jax.data.template import Template, load_template, parse_template
from m6rec_jax.errors import InputError

KEPT = ("language", "options", "least", "most")  # what a task made from the other tables is asked for


@dataclass(frozen=True)
class Asked:
    """A task of a card with its template; `before`: its rows in the dataset that is appended to."""

    name: str
    task: CardTask
    template: Template
    before: pl.DataFrame | None = None
    table: bool = False


def asked_tasks(card: Card, grown: Dataset | None = None) -> list[Asked]:
    """What a card asks for; the tasks of a dataset that is appended to go on as they were, new ones follow.

    Raises InputError, naming the task, for a template that is not there or not right, for options where there are none,
    and for a task without a table that nothing says how to make.
    """
    made = []
    before = {entry["name"]: entry for entry in (grown.tasks if grown is not None else ())}
    for name, entry in before.items():
        made.append(_continued(card, grown, name, entry))  # type: ignore[arg-type]
    for name, task in card.tasks.items():
        if name in before:
            continue
        try:
            template = load_template(task.template or name, task.language)
        except InputError as error:
            raise InputError(f"{card.origin}: tasks.{name}: {error}") from None
        if task.options and not template.with_options:
            raise InputError(f"{card.origin}: tasks.{name}.options: its template is of objective {template.objective}, which has none; remove the key")  # fmt: skip
        if task.path is None and template.task not in RECIPES:
            raise InputError(f"{card.origin}: tasks.{name}: {template.task} cannot be made from events, items and users (that can be: {', '.join(RECIPES)}); give it a table with path:")  # fmt: skip
        made.append(Asked(name, task, template, table=task.path is not None))
    return made


def _continued(card: Card, grown: Dataset, name: str, entry: Mapping[str, Any]) -> Asked:
    """A task of the dataset, and the rows that the card adds to its table."""
    template = parse_template(entry["text"], f"{grown.path}: task {name}")
    said = grown.manifest["card"].get("tasks", {}).get(name, {})
    new = card.tasks.get(name)
    if not entry["table"]:
        if new is not None and new.path is not None:
            raise InputError(f"{card.origin}: tasks.{name}.path: the dataset {grown.path} makes this task from its events; leave the table out, or name another task")  # fmt: skip
        kept = {key: tuple(value) if key == "options" else value for key, value in said.items() if key in KEPT}
        return Asked(name, CardTask(**kept | ({"options": tuple(entry["options"])} if entry["options"] else {})), template)  # fmt: skip
    path = grown.path / FOLDER / f"{name}.parquet"
    try:
        rows = pl.read_parquet(path).drop("instance", "answer")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{path}: not readable ({' '.join(str(error).split())}); prepare the dataset again") from None
    task = replace(new or CardTask(), options=tuple(entry["options"]))
    return Asked(name, task, template, rows, table=True)


def tell_tasks(card: Card, asked: list[Asked], world: World) -> list[Told]:
    """Every task told: from its own table, or derived from what the world holds."""
    made, rows = [], None
    for one in asked:
        counts: dict[str, int] = {}
        whole = replace(card, tasks={one.name: one.task})
        if one.table:
            options = one.task.options
            frames = [] if one.before is None else [one.before]
            if one.task.path is not None:
                if rows is None:
                    rows = {item: row for row, item in enumerate(world.items["item_id"].to_list())}
                new, options = own_rows(whole, one.name, one.template, rows)
                frames.append(_splits_kept(new, one.before))
            frame = pl.concat(frames, how="diagonal_relaxed")
        else:
            frame, options = derived_rows(f"{card.origin}: tasks.{one.name}", one.task, one.template, world)
        fields = [field for field in one.template.fields if field in frame.columns]
        made.append(tell(whole, one.name, one.template, options, frame.select(*COLUMNS, *fields), counts, one.table))
    return made


def _splits_kept(new: pl.DataFrame, before: pl.DataFrame | None) -> pl.DataFrame:
    """Rows of a group that is known stay with it."""
    if before is None or new["user_id"].null_count() == new.height:
        return new
    known = before.select("user_id", known="split").drop_nulls("user_id").unique("user_id", keep="first", maintain_order=True)  # fmt: skip
    joined = new.join(known, on="user_id", how="left", maintain_order="left")
    return joined.with_columns(pl.coalesce("known", "split").alias("split")).drop("known")
