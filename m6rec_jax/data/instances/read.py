"""What a dataset holds of a task: fields as they were told, tokens as they are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from m6rec_jax.data.card_checks import known
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.instances.layout import Laid, lay_out
from m6rec_jax.data.records import Record
from m6rec_jax.data.splits import SPLITS
from m6rec_jax.errors import InputError

FOLDER = "instances"


@dataclass(frozen=True)
class Instances:
    """The n instances of a task in one split, in the order of their rows.

    `about`: the task's entry in the manifest. `fields`: instance (row in the task's table), user_id, item_id, split,
    label, answer, then the fields of the template; histories are lists of structs. `records` [n]: their tokens.
    `option_task`: the task's number among those with options, -1 for another.
    """

    about: dict[str, Any]
    fields: pl.DataFrame
    records: list[Record]
    option_task: int

    def __len__(self) -> int:
        return len(self.records)

    @property
    def objective(self) -> str:
        """scoring, classify, retrieval, plausibility or text."""
        return self.about["objective"]

    @property
    def labels(self) -> np.ndarray:
        """[n] int32: the right option of each; -1 where the task has none."""
        return np.array([record.label for record in self.records], np.int32)

    def laid_out(self, room: int) -> list[Laid]:
        """Each in at most `room` tokens of source and target together."""
        return [lay_out(record, self.objective, room) for record in self.records]

    def take(self, chosen: Sequence[int] | np.ndarray) -> Instances:
        """The instances at these places, in this order."""
        at = [int(i) for i in chosen]
        return replace(self, fields=self.fields[at], records=[self.records[i] for i in at])


def read_instances(dataset: Dataset, task: str, split: str) -> Instances:
    """The instances of a task of `dataset`. Raises InputError when it has no such task, or no such split."""
    entries = {entry["name"]: (number, entry) for number, entry in enumerate(dataset.tasks)}
    if task not in entries:
        raise InputError(f"task {task}: {dataset.path} has no such task; {known(task, list(entries), 'its tasks')}")
    number, about = entries[task]
    option_task = sum(1 for entry in dataset.tasks[:number] if entry["options"]) if about["options"] else -1
    reader = dataset.records(split)  # checks the split
    path = dataset.path / FOLDER / f"{task}.parquet"
    try:
        fields = pl.read_parquet(path).filter(pl.col("split") == split)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{path}: not readable ({' '.join(str(error).split())}); prepare the dataset again") from None
    records = reader.take(np.flatnonzero(dataset.index[f"{split}_task"] == number))
    if [record.row for record in records] != fields["instance"].to_list():
        raise InputError(f"{path}: not the instances that the records of {split} hold; prepare the dataset again")
    return Instances(about, fields, records, option_task)


def options_of(entries: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """How many options each task with options has: what `Vocab.options` is."""
    return tuple(len(entry["options"]) for entry in entries if entry["options"])


def split_numbers(splits: pl.Series) -> np.ndarray:
    """[n]: the number of each split's name."""
    return splits.replace_strict(list(SPLITS), range(len(SPLITS)), return_dtype=pl.UInt8).to_numpy()
