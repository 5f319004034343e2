"""Histories of users out of a dataset: what evaluation asks with, what generation continues, what baselines count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.records import HISTORY, Record

Queries = Mapping[int, np.ndarray]


@dataclass(frozen=True)
class Histories:
    """U histories, each cut before its first target.

    `users [U]` user rows; `items`, `times`, `kinds`: one array a user (`items` are catalogue rows, -1 = a query);
    `queries`: event position -> text tokens; `targets [U]` catalogue row of the first held-out event (-1 = none) and
    `target_times [U]` its time.
    """

    users: np.ndarray
    items: list[np.ndarray]
    times: list[np.ndarray]
    kinds: list[np.ndarray]
    queries: list[Queries]
    targets: np.ndarray
    target_times: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def take(self, chosen: Sequence[int] | np.ndarray) -> Histories:
        """The histories at these places, in this order."""
        at = [int(i) for i in chosen]
        return Histories(
            users=self.users[at],
            items=[self.items[i] for i in at],
            times=[self.times[i] for i in at],
            kinds=[self.kinds[i] for i in at],
            queries=[self.queries[i] for i in at],
            targets=self.targets[at],
            target_times=self.target_times[at],
        )


def held_out(dataset: Dataset, split: str) -> Histories:
    """The users of `valid` or `test` with what came before their first target there."""
    return _histories([(r, len(r.items) - r.targets) for r in _records(dataset, split)])


def everything(dataset: Dataset) -> Histories:
    """All events of every user, in user order: what a list for tomorrow is made from. No targets."""
    last: dict[int, Record] = {}
    for split in ("train", "valid", "test"):  # each later record contains the earlier one of the same user
        last |= {record.row: record for record in _records(dataset, split)}
    return _histories([(last[row], len(last[row].items)) for row in sorted(last)])


def interactions(dataset: Dataset) -> sp.csr_matrix:
    """Training events counted as users x items, CSR float64 `[users, C]`."""
    users, items = [], []
    for record in _records(dataset, "train"):
        known = record.items[record.items >= 0]
        items.append(known)
        users.append(np.full(len(known), record.row))
    shape = (dataset.users.height, dataset.catalogue)
    if not items:
        return sp.csr_matrix(shape)
    rows, columns = np.concatenate(users), np.concatenate(items)
    return sp.csr_matrix((np.ones(len(rows)), (rows, columns)), shape)


def _records(dataset: Dataset, split: str) -> list[Record]:
    return dataset.records(split).take(np.flatnonzero(dataset.index[f"{split}_kind"] == HISTORY))


def _histories(cut: Sequence[tuple[Record, int]]) -> Histories:
    ends = [(r, n, r.items[n:], r.times[n:]) for r, n in cut]
    return Histories(
        users=np.array([r.row for r, _ in cut], np.int64),
        items=[r.items[:n] for r, n in cut],
        times=[r.times[:n] for r, n in cut],
        kinds=[r.kinds[:n] for r, n in cut],
        queries=[{p: q for p, q in r.queries.items() if p < n} for r, n in cut],
        targets=np.array([items[0] if len(items) else -1 for _, _, items, _ in ends], np.int64),
        target_times=np.array([times[0] if len(times) else 0 for *_, times in ends], np.int64),
    )
