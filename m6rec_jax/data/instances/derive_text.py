"""Instances made from what items say of themselves: topic, title, description, summary, the rest of a text.

Items are split by the hash of their id; those held out are held out of language training and of the tokenizer as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from m6rec_jax.data.instances.answers import begun, in_short, lead
from m6rec_jax.data.instances.wording import listed
from m6rec_jax.data.instances.world import sampled, split_names
from m6rec_jax.data.splits import TRAIN
from m6rec_jax.errors import InputError

if TYPE_CHECKING:
    from m6rec_jax.data.instances.derive import Asks, Made

MOST_CLASSES = 20


def _frame(asks: Asks, rows: np.ndarray, labels: np.ndarray | None, **fields: list[str]) -> pl.DataFrame:
    """Instances about catalogue rows `[k]`; `fields` are by place, `item`, `categories`, `attributes` by row."""
    world = asks.world
    of_items = {
        "item": world.titles,
        "categories": [listed(some, asks.language) for some in world.categories],
        "attributes": world.attributes,
        "description": world.descriptions,
    }
    columns = {name: [texts[i] for i in rows.tolist()] for name, texts in of_items.items()} | fields
    return pl.DataFrame(
        [
            pl.repeat(None, len(rows), dtype=pl.String, eager=True).alias("user_id"),
            world.items["item_id"].gather(rows).alias("item_id"),
            split_names(world.item_splits[rows]).alias("split"),
            pl.Series("label", np.full(len(rows), -1) if labels is None else labels, dtype=pl.Int32),
            *(pl.Series(name, texts, dtype=pl.String) for name, texts in columns.items()),
        ]
    )


def _those(asks: Asks, has: list[bool], what: str) -> np.ndarray:
    """Catalogue rows that have what a task needs, as many as are wanted."""
    rows = sampled(np.flatnonzero(has), asks.world.item_splits, asks.task.most)
    if not len(rows):
        raise asks.refuse(f"{asks.template.task} is made from {what}, and no item has that")
    return rows


def _topic(asks: Asks) -> Made:
    """The first category of an item, of those that training has and something held out too, the most frequent ones."""
    world = asks.world
    first = [some[0] if some else "" for some in world.categories]
    titled = [bool(title) for title in world.items["title"].to_list()]
    splits = world.item_splits.tolist()
    usable = [bool(topic) and known for topic, known in zip(first, titled, strict=True)]
    there: dict[str, set[int]] = {}
    counts: Counter[str] = Counter()
    for topic, split, ok in zip(first, splits, usable, strict=True):
        if ok:
            there.setdefault(topic, set()).add(split)
            counts[topic] += 1
    least = min(2, len(set(splits)))
    common = sorted((topic for topic in counts if TRAIN in there[topic] and len(there[topic]) >= least), key=lambda topic: (-counts[topic], topic))  # fmt: skip
    options = tuple(asks.task.options) or tuple(sorted(common[:MOST_CLASSES]))
    if len(options) < 2:
        raise asks.refuse(
            "topic is made from categories that items have, in training and held out, and there are fewer than two"
        )
    if missing := next((one for one in options if one not in there), None):
        raise InputError(f"{asks.where}.options: {missing!r}: no item's first category; the frequent ones are {', '.join(common[:MOST_CLASSES])}")  # fmt: skip
    numbers = {topic: number for number, topic in enumerate(options)}
    rows = _those(asks, [ok and topic in numbers for ok, topic in zip(usable, first, strict=True)], "titles and categories")  # fmt: skip
    return _frame(asks, rows, np.array([numbers[first[i]] for i in rows.tolist()], np.int32)), options


def _title(asks: Asks) -> Made:
    world = asks.world
    titles = world.items["title"].to_list()
    facts = zip(titles, world.categories, world.attributes, world.descriptions, strict=True)
    rows = _those(asks, [bool(title) and bool(c or a or d) for title, c, a, d in facts], "titles and what else is known")  # fmt: skip
    return _frame(asks, rows, None), ()


def _description(asks: Asks) -> Made:
    rows = _those(asks, [bool(text) for text in asks.world.descriptions], "running texts")
    return _frame(asks, rows, None), ()


def _summarise(asks: Asks) -> Made:
    """The first sentence of a text, from the others; where no item has a text of several, its facts in one line."""
    world = asks.world
    every = range(world.items.height)
    parts = [lead(world, i) for i in every]
    if not any(first for first, _ in parts):
        parts = [(in_short(world, i, asks.language), "") for i in every]
    rows = _those(asks, [bool(first) for first, _ in parts], "texts, categories or attributes of items")
    summary, rest = zip(*(parts[i] for i in rows.tolist()), strict=True)
    return _frame(asks, rows, None, summary=list(summary), description=list(rest)), ()


def _complete(asks: Asks) -> Made:
    """The second half of an item's title and text, from the first."""
    world = asks.world
    halves = [begun(world, i) for i in range(world.items.height)]
    rows = _those(asks, [bool(start and rest) for start, rest in halves], "titles or texts of two words")
    start, rest = zip(*(halves[i] for i in rows.tolist()), strict=True)
    return _frame(asks, rows, None, start=list(start), rest=list(rest)), ()


TEXT_RECIPES: dict[str, Callable[[Asks], Made]] = {
    "topic": _topic,
    "title": _title,
    "description": _description,
    "summarise": _summarise,
    "complete": _complete,
}
