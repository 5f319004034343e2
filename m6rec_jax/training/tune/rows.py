"""Instances of one task as unpacked rows: batches of few widths, whose order is a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from m6rec_jax.data.instances import Instances
from m6rec_jax.errors import InputError

WIDTH_STEP = 16  # every width is a multiple of it
WIDTHS = 4  # programs compiled at most: of a quarter, half, three quarters and all of the rows
POOL = 32  # batches whose rows are sorted by length together


@dataclass(frozen=True)
class TuneRows:
    """n instances. Lists hold one int32 array an instance, `item_rows` -1 where no item is completed.

    `source`: all that is read before the answer. Of a task with options `labels [n]` names the right one, predicted at the
    source's last token, and `target` is empty; of a text task `target` is the answer with its
    `</s>`, predicted left to right.
    """

    source: list[np.ndarray]
    source_rows: list[np.ndarray]
    labels: np.ndarray
    target: list[np.ndarray]
    target_rows: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> np.ndarray:
        """[n] tokens read of each: the last token of an answer is predicted only."""
        return np.array([len(s) + max(len(t) - 1, 0) for s, t in zip(self.source, self.target, strict=True)], np.int32)

    @classmethod
    def with_options(cls, source: list[np.ndarray], source_rows: list[np.ndarray], labels: np.ndarray) -> TuneRows:
        """Rows of a task with options."""
        nothing = [np.zeros(0, np.int32)] * len(source)
        return cls(source, source_rows, np.asarray(labels, np.int32), nothing, nothing)

    @classmethod
    def with_texts(
        cls, source: list[np.ndarray], source_rows: list[np.ndarray], target: list[np.ndarray],
        target_rows: list[np.ndarray],
    ) -> TuneRows:  # fmt: skip
        """Rows of a text task."""
        return cls(source, source_rows, np.full(len(source), -1, np.int32), target, target_rows)

    @classmethod
    def of(cls, instances: Instances, room: int) -> TuneRows:
        """The instances of a dataset's own task, each in at most `room` tokens. Raises InputError for a retrieval."""
        if instances.objective == "retrieval":
            raise InputError(f"task {instances.about['name']}: a retrieval has no options and no answer; tune tasks of scoring, classify and text")  # fmt: skip
        laid = instances.laid_out(room)
        source, rows = [one.source for one in laid], [one.source_rows for one in laid]
        if instances.about["options"]:
            return cls.with_options(source, rows, instances.labels)
        return cls.with_texts(source, rows, [one.target for one in laid], [one.target_rows for one in laid])

    def check(self, options: int, split: str) -> None:
        """Raise InputError unless there are rows, and labels (or answers, of a text task) for `options` classes."""
        if not len(self):
            raise InputError(f"{split}: no instance of the task in it; name a task that has some")
        if options and not (self.labels.min() >= 0 and self.labels.max() < options):
            wrong = self.labels[(self.labels < 0) | (self.labels >= options)][0]
            raise InputError(f"{split}: label {wrong} and the task has {options} options, 0 to {options - 1}; name as many options as classes")  # fmt: skip
        if not options and not all(map(len, self.target)):
            raise InputError(f"{split}: an instance without an answer in a text task; leave it out, or name options")

    def batch(self, chosen: np.ndarray, rows: int, width: int) -> dict[str, np.ndarray]:
        """The chosen instances as arrays `[rows, width]`, spare rows of weight 0."""
        made = {name: np.zeros((rows, width), np.int32) for name in ("tokens", "targets")}
        made |= {"item_rows": np.full((rows, width), -1, np.int32), "weights": np.zeros((rows, width), np.float32)}
        made |= {"lengths": np.ones(rows, np.int32), "labels": np.zeros(rows, np.int32), "counts": np.zeros(rows, np.float32)}  # fmt: skip
        for at, i in enumerate(chosen):
            source, target = self.source[i], self.target[i]
            n, m = len(source), len(target)
            length = n + max(m - 1, 0)
            made["tokens"][at, :length] = np.concatenate([source, target[:-1]])
            made["item_rows"][at, :length] = np.concatenate([self.source_rows[i], self.target_rows[i][:-1]])
            if m:
                made["targets"][at, n - 1 : length], made["weights"][at, n - 1 : length] = target, 1.0
            made["lengths"][at], made["labels"][at], made["counts"][at] = length, max(self.labels[i], 0), 1.0
        return made


def widths_of(lengths: np.ndarray) -> np.ndarray:
    """The few widths that rows are padded to, rising; each holds at least the next quarter of the rows."""
    at = np.quantile(lengths, np.arange(1, WIDTHS + 1) / WIDTHS, method="higher").astype(np.int64)
    return np.unique(-(-at // WIDTH_STEP) * WIDTH_STEP)


def epoch(lengths: np.ndarray, rows: int, seed: int, number: int) -> list[np.ndarray]:
    """The batches of one epoch, each instance once: shuffled, rows of like length together, batches shuffled again."""
    rng = np.random.default_rng([seed, 17, number])
    order = rng.permutation(len(lengths))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), POOL * rows):
        pool = order[start : start + POOL * rows]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[at : at + rows] for at in range(0, len(pool), rows)]
    return [batches[i] for i in rng.permutation(len(batches))]


def in_order(lengths: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """All instances once, the longest first, in batches."""
    order = np.argsort(-lengths, kind="stable")
    yield from (order[start : start + rows] for start in range(0, len(order), rows))


def width_for(length: int, widths: np.ndarray) -> int:
    """The narrowest of the widths that holds a row; past all of them its own, rounded up."""
    at = int(np.searchsorted(widths, length))
    return int(widths[at]) if at < len(widths) else -(-int(length) // WIDTH_STEP) * WIDTH_STEP
