"""What every peer is asked and answers: arrays, and the .npz files that carry them into another environment.

Imported by scripts that other environments run, so it needs numpy alone and nothing of the project.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 512

Rank = Callable[[], np.ndarray]  # () -> rows int32 [U,k]: catalogue rows, best first, -1 where there is nothing to say


@dataclass(frozen=True)
class Task:
    """Learn from E training events, rank the catalogue for U users.

    `user, item [E]`: user and catalogue rows, by user, then in the order in which things happened (ties as in the
    source). `users [U]`: user rows; `histories`: U arrays of catalogue rows in the same order, which at test time hold
    the validation item too. `user_count`, `catalogue`: rows there are; `settings`: those of the peer.
    """

    user: np.ndarray
    item: np.ndarray
    users: np.ndarray
    histories: list[np.ndarray]
    user_count: int
    catalogue: int
    k: int
    seed: int
    settings: dict[str, Any]

    @property
    def sequences(self) -> list[np.ndarray]:
        """The training items of every user who has any."""
        return np.split(self.item, np.unique(self.user, return_index=True)[1][1:]) if len(self.item) else []

    @property
    def cold(self) -> np.ndarray:
        """Users to rank for who have no training event, bool `[U]`."""
        return ~np.isin(self.users, self.user)

    def save(self, path: Path) -> None:
        """Write the task as .npz."""
        numbers = {name: np.array(getattr(self, name)) for name in ("user_count", "catalogue", "k", "seed")}
        flat = np.concatenate([np.zeros(0, np.int64), *self.histories])
        lengths = np.array([len(h) for h in self.histories], np.int64)
        settings = np.array(json.dumps(self.settings))
        np.savez(path, user=self.user, item=self.item, users=self.users, history=flat, lengths=lengths, settings=settings, **numbers)  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Task:
        """The task that `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            numbers = {name: int(file[name]) for name in ("user_count", "catalogue", "k", "seed")}
            ends = np.cumsum(file["lengths"])
            histories = np.split(file["history"], ends[:-1]) if len(ends) else []
            arrays = {name: file[name] for name in ("user", "item", "users")}
            return cls(**arrays, **numbers, histories=histories, settings=json.loads(str(file["settings"])))


def timed(fit: Callable[[Task], Rank], task: Task) -> tuple[np.ndarray, float]:
    """Lists `[U,k]` of a peer, and the seconds that its training took."""
    start = time.monotonic()
    rank = fit(task)
    trained = time.monotonic() - start
    return rank(), trained


def answer(fit: Callable[[Task], Rank]) -> None:
    """What a script in another environment does: `script.py TASK.npz ANSWER.npz` writes `rows [U,k]` and `train`, s."""
    rows, trained = timed(fit, Task.load(Path(sys.argv[1])))
    np.savez(sys.argv[2], rows=rows.astype(np.int32), train=trained)


def ranked(score: Callable[[slice], np.ndarray], task: Task) -> np.ndarray:
    """Lists int32 `[U,k]` by `score(users of a batch) -> [B,C]`; no users x items table of everybody ever exists."""
    lists = [np.zeros((0, task.k), np.int32)]
    for start in range(0, len(task.users), BATCH):
        part = slice(start, start + BATCH)
        lists.append(best(score(part), task.histories[part], task.k))
    return np.concatenate(lists)


def best(scores: np.ndarray, histories: list[np.ndarray], k: int) -> np.ndarray:
    """The k best rows of scores `[B,C]`, int32 `[B,k]`: history left out, equal scores by the lower catalogue row."""
    rows = np.full((len(scores), k), -1, np.int32)
    for row, own, history in zip(rows, -np.asarray(scores, np.float32), histories, strict=True):
        own[history] = np.inf
        # A full sort takes ten times as long. All that equal the k-th stay in, or chance would decide between them.
        last = np.partition(own, min(k, len(own)) - 1)[:k].max()
        near = np.flatnonzero((own <= last) & (own < np.inf))
        near = near[np.argsort(own[near], kind="stable")][:k]
        row[: len(near)] = near
    return rows
