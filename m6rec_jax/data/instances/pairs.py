"""What a retrieval must know of its pairs beside their text: which item, how often asked for, what else the user has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import polars as pl

from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.examples import Example
from m6rec_jax.data.instances.layout import Laid, lay_out
from m6rec_jax.data.instances.read import FOLDER
from m6rec_jax.data.records import HISTORY, Record
from m6rec_jax.data.splits import SPLITS
from m6rec_jax.data.tasks import Facts, Piece, Task


@dataclass(frozen=True)
class Pairs:
    """Of the n instances of a retrieval, all splits: `items [n]`, a number of each one's item; `users [n]`, that of its
    user (-1: none); `times [items]`, training instances of each item; `own`: numbers of the items that each user has in
    training, the most asked for first."""

    items: np.ndarray
    users: np.ndarray
    times: np.ndarray
    own: Mapping[int, tuple[int, ...]]

    def told(self, example: Example, row: int) -> Example:
        """The example of instance `row` with what is known of its item and user."""
        item = int(self.items[row])
        own = tuple(i for i in self.own.get(int(self.users[row]), ()) if i != item)
        return replace(example, item=item, times=max(int(self.times[item]), 1), own=own)


def pairs_of(dataset: Dataset, task: str) -> Pairs:
    """The pairs of a task. An item is known by its id, one without an id by its text; what a user has is what stands in
    training histories and in training instances."""
    fields = pl.read_parquet(
        dataset.path / FOLDER / f"{task}.parquet", columns=["instance", "user_id", "item_id", "split", "answer"]
    ).sort("instance")
    said = pl.concat_str(pl.lit("text:"), pl.col("answer").fill_null(""))
    keys = fields.select(pl.coalesce(pl.concat_str(pl.lit("id:"), "item_id"), said))[:, 0].to_list()
    numbers: dict[str, int] = {}
    items = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
    train = (fields["split"] == "train").to_numpy()
    times = np.bincount(items[train], minlength=len(numbers))
    rows = {user: row for row, user in enumerate(dataset.users["user_id"].to_list())}
    users = np.array([rows.get(user, -1) for user in fields["user_id"].to_list()], np.int64)
    has: dict[int, set[int]] = {}
    for user, item in zip(users[train].tolist(), items[train].tolist(), strict=True):
        has.setdefault(user, set()).add(item)
    ids, reader = dataset.item_ids, dataset.records("train")
    by_row = np.array([numbers.get(f"id:{item}", -1) for item in ids], np.int64)
    for record in reader.take(np.flatnonzero(dataset.index["train_kind"] == HISTORY)):
        known = by_row[record.items[record.items >= 0]]
        has.setdefault(record.row, set()).update(known[known >= 0].tolist())
    has.pop(-1, None)
    own = {user: tuple(sorted(some, key=lambda i: (-times[i], i))) for user, some in has.items()}
    return Pairs(items, users, times, own)


@dataclass(frozen=True)
class Catalogue:
    """The items that a retrieval names in any split: one record that says each, by its number in `pairs`."""

    pairs: Pairs
    records: list[Record]

    def laid_out(self, room: int) -> list[Laid]:
        """An instance of each item, whose target is the item's text, in at most `room` tokens."""
        return [lay_out(record, "retrieval", room) for record in self.records]


def catalogue_of(dataset: Dataset, task: str) -> Catalogue:
    """What a retrieval is asked of: its items, each as training says it, else as the earliest split that does."""
    pairs, number = pairs_of(dataset, task), [entry["name"] for entry in dataset.tasks].index(task)
    found: dict[int, Record] = {}
    for split in SPLITS:
        reader = dataset.records(split)
        at = np.flatnonzero(dataset.index[f"{split}_task"] == number)
        rows = _rows_of(dataset, task, split)
        _, first = np.unique(pairs.items[rows], return_index=True)
        new = [int(i) for i in first if int(pairs.items[rows[i]]) not in found]
        for place, record in zip(new, reader.take(at[new]), strict=True):
            found[int(pairs.items[rows[place]])] = record
    return Catalogue(pairs, [found[i] for i in range(len(pairs.times))])


def _rows_of(dataset: Dataset, task: str, split: str) -> np.ndarray:
    """Instances of a split, in the order of their records."""
    table = pl.scan_parquet(dataset.path / FOLDER / f"{task}.parquet", glob=False)
    return table.filter(pl.col("split") == split).select("instance").collect()["instance"].to_numpy()


def with_pairs(tasks: Mapping[str, Task], dataset: Dataset) -> dict[str, Task]:
    """The tasks of a dataset, retrievals among them with what their pairs are; read when the first is built."""
    known = cache(lambda name: pairs_of(dataset, name))

    def told(task: Task) -> Task:
        def build(record: Record, piece: Piece, facts: Facts) -> Example:
            return known(task.name).told(task.build(record, piece, facts), record.row)

        return replace(task, build=build)

    return {name: told(task) if task.objective == "retrieval" else task for name, task in tasks.items()}
