"""Cases: who a text is for and which item it is about, as the fields of templates, and what the facts alone would answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from m6rec_jax.data.events import Events
from m6rec_jax.data.instances.answers import begun, described, in_short, lead, reason, searched
from m6rec_jax.data.instances.behaviour import Moments, told_items, told_users
from m6rec_jax.data.instances.world import World
from m6rec_jax.data.rendering import render, said
from m6rec_jax.recommend.histories import Histories
from m6rec_jax.recommend.say.asking import Setting, Spoken, turns_of

KEPT = ("titles", "categories", "said_categories", "attributes", "descriptions", "item_splits")  # of the catalogue


@dataclass(frozen=True)
class Cases:
    """n texts to be written: `users [n]` the place of a history among those asked (-1: for nobody), `rows [n]` the
    catalogue row that it is about or, where it is about none, that suits the user best (-1: there is none)."""

    users: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.users)


def catalogue_world(items: pl.DataFrame, timed: bool, kinds: Sequence[str]) -> World:
    """A catalogue without any user."""
    return World(items, pl.DataFrame({"user_id": [], "attributes": []}), _events([], [], [], [], kinds), np.zeros(0, np.uint8), None, timed)  # fmt: skip


def world_of(base: World, asked: Histories, ids: Sequence[str], attributes: Sequence[Sequence[str]],
             decode: Callable[[np.ndarray], str]) -> World:  # fmt: skip
    """`base` with the U users that are asked for: user u of the world is history u. `decode`: text of a query's tokens."""
    texts = [[decode(queries[p]) if p in queries else None for p in range(len(items))] for items, queries in zip(asked.items, asked.queries, strict=True)]  # fmt: skip
    users = pl.DataFrame({"user_id": list(ids), "attributes": [list(some) for some in attributes]}, schema={"user_id": pl.String, "attributes": pl.List(pl.String)})  # fmt: skip
    events = _events(asked.items, asked.times, asked.kinds, texts, base.events.kind_names)
    made = replace(base, users=users, events=events, label=np.zeros(len(events.users), np.uint8))
    made.__dict__.update({name: getattr(base, name) for name in KEPT})  # as long as the catalogue: made once
    return made


def _events(items: Sequence[np.ndarray], times: Sequence[np.ndarray], kinds: Sequence[np.ndarray],
            texts: Sequence[Sequence[str | None]], names: Sequence[str]) -> Events:  # fmt: skip
    join = lambda parts, kind: np.concatenate([np.zeros(0, kind), *parts]).astype(kind)  # noqa: E731
    n = sum(map(len, items))
    none = pl.repeat(None, n, dtype=pl.String, eager=True)
    said_of = pl.Series([text for some in texts for text in some], dtype=pl.String)
    owners = np.repeat(np.arange(len(items)), [len(one) for one in items]).astype(np.int32)
    return Events(
        owners, join(items, np.int32), join(times, np.int64), none, join(kinds, np.uint8), none, said_of, list(names), []
    )  # fmt: skip


def fields_of(world: World, cases: Cases, task: Spoken, setting: Setting) -> list[dict[str, Any]]:
    """The fields of the template for every case, but for those of the answer."""
    language, n = task.template.language, len(cases)
    fields: list[dict[str, Any]] = [dict.fromkeys(task.template.fields) for _ in range(n)]
    there = np.flatnonzero(cases.users >= 0)
    if len(there):
        users = cases.users[there]
        ends = world.starts[users + 1]
        last = np.array([world.events.times[end - 1] if end > start else 0 for start, end in zip(world.starts[users].tolist(), ends.tolist(), strict=True)], np.int64)  # fmt: skip
        _put(fields, there, told_users(world, Moments(users, ends, last, np.zeros(len(users), np.uint8)), language))
    there = np.flatnonzero(cases.rows >= 0)
    if task.about_items and len(there):
        _put(fields, there, told_items(world, cases.rows[there], np.zeros(len(there), np.uint8), language))
    for one, row in zip(fields, cases.rows.tolist(), strict=True):
        if task.template.task == "complete":
            one["start"] = setting.prompt or (begun(world, row)[0] if row >= 0 else "")
        elif task.template.task == "chat":
            one["turns"] = turns_of(setting.prompt)
        elif task.template.task == "summarise" and row >= 0:
            one["description"] = lead(world, row)[1] or one["description"]
        elif task.options and setting.prompt:
            one["text"] = setting.prompt
    return fields


def _put(fields: list[dict[str, Any]], places: np.ndarray, columns: dict[str, pl.Series]) -> None:
    for name, series in columns.items():
        for place, value in zip(places.tolist(), series.to_list(), strict=True):
            fields[place][name] = value


def answers_of(world: World, cases: Cases, task: Spoken, setting: Setting, fields: Sequence[dict[str, Any]]) -> list[str]:  # fmt: skip
    """What the template's target says of each case, filled in with facts; "" where nothing is known."""
    topics = [set(some) for some in world.categories]
    made = []
    for user, row, own in zip(cases.users.tolist(), cases.rows.tolist(), fields, strict=True):
        before = world.events.items[world.starts[user] : world.starts[user + 1]].tolist() if user >= 0 else []
        answer = _answer(world, row, before, topics, task, setting) if row >= 0 else ""
        names = task.template.answer_fields
        target = render(task.template, {**own, **dict.fromkeys(names, answer)}).answer if len(names) == 1 else ()
        made.append(said(target) or answer)
    return made


def _answer(world: World, row: int, before: Sequence[int], topics: Sequence[set[str]], task: Spoken, setting: Setting) -> str:  # fmt: skip
    """What the facts of an item answer: the right answer of training, or what comes closest to it."""
    language, title = task.template.language, world.titles[row]
    facts = described(world, row, language)
    zh = language == "zh"
    match task.template.task:
        case "explain":
            return reason(world, row, before, topics, language) or (f"它是{facts or title}" if zh else f"it is {facts or title}")  # fmt: skip
        case "summarise":
            return lead(world, row)[0] or in_short(world, row, language) or title
        case "query":
            return searched(world, row)
        case "complete":
            return title if setting.prompt else begun(world, row)[1] or facts or title
        case "chat":
            return (f"可以看看{title}。{facts}" if zh else f"How about {title}? {facts}").strip()
        case "title":
            return title
        case _:
            return facts or title
