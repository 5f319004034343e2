"""Histories of users out of a dataset: what evaluation asks with, what generation continues, what baselines count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import scipy.sparse as sp

from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.records import HISTORY, Record
from m6rec_jax.errors import InputError

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

    @property
    def known(self) -> list[np.ndarray]:
        """The items of each history, queries left out."""
        return [h[h >= 0] for h in self.items]

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


def of_items(items: Sequence[np.ndarray]) -> Histories:
    """Histories of catalogue rows of which nothing else is known: one time, one kind, users -1."""
    zeros = lambda kind: [np.zeros(len(one), kind) for one in items]  # noqa: E731
    none = np.full(len(items), -1, np.int64)
    return Histories(none, list(items), zeros(np.int64), zeros(np.uint8), [{} for _ in items], none, none * 0)


def held_out(dataset: Dataset, split: str) -> Histories:
    """The users of `valid` or `test` with what came before their first target there."""
    return _histories([(r, len(r.items) - r.targets) for r in _records(dataset, split)])


class Past:
    """All events of every user who has any, whatever their split: what a list for tomorrow is made from.

    `users [U]` are their rows, rising. Only these are held: events.parquet is read for those that are taken, and of its
    row groups those where they may lie (it is sorted by user), so take neighbours together. A record of a split holds
    only what that split asks and its past. Raises InputError when the file is unreadable.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._path, self._tokenizer = dataset.path / "events.parquet", dataset.tokenizer
        users = self._read(lambda rows: rows.select("user").unique().sort("user").collect(engine="streaming"))
        self.users = users["user"].to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.users)

    def all(self) -> Histories:
        """Every user's."""
        return self.take(range(len(self)))

    def take(self, chosen: Sequence[int] | np.ndarray) -> Histories:
        """The histories of the users at these places, in this order; no targets (-1)."""
        places, back = np.unique(np.asarray(chosen, np.int64), return_inverse=True)
        users = self.users[places]
        wanted = pl.lit(False)
        if len(users):
            wanted = pl.col("user").is_between(int(users[0]), int(users[-1]))
            if places[-1] - places[0] >= len(places):  # with others between them
                wanted &= pl.col("user").is_in(users.tolist())
        names = ["user", "item", "time", "kind", "text"]
        events = self._read(lambda rows: rows.filter(wanted).select(names).collect())
        starts = np.searchsorted(events["user"].to_numpy(), users)
        items, cuts = events["item"].to_numpy().astype(np.int32), starts[1:]
        asked = np.flatnonzero(items < 0)
        tokens = self._tokenizer.encode_batch(events["text"].gather(asked).fill_null("").to_list())
        queries: list[dict[int, np.ndarray]] = [{} for _ in users]
        for at, owner, ids in zip(asked, np.searchsorted(starts, asked, side="right") - 1, tokens, strict=True):
            queries[owner][int(at - starts[owner])] = np.array(ids, np.int32)
        split = lambda column, kind: np.split(column.astype(kind), cuts) if len(users) else []  # noqa: E731
        return Histories(
            users=users,
            items=split(items, np.int32),
            times=split(events["time"].to_numpy(), np.int64),
            kinds=split(events["kind"].to_numpy(), np.uint8),
            queries=list(queries),
            targets=np.full(len(users), -1, np.int64),
            target_times=np.zeros(len(users), np.int64),
        ).take(back)

    def _read(self, read: Callable[[pl.LazyFrame], pl.DataFrame]) -> pl.DataFrame:
        try:
            return read(pl.scan_parquet(self._path, glob=False))
        except (OSError, pl.exceptions.PolarsError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{self._path}: not readable ({reason}); prepare the dataset again") from None


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
