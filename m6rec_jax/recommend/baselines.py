"""What a model has to beat: popularity, item-kNN, and the counting floor, each on the same histories (EVALUATION.md).

Every one ranks all that is listed: `rank(histories, k, repeat) -> rows [U,k]`, history items left out unless
`repeat`, ties by the lower catalogue row, places that a method has nothing for filled by popularity, -1 when the
catalogue is used up. Users go through in batches, so no users x items table of everybody ever exists.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import polars as pl
import scipy.sparse as sp

from m6rec_jax.data.transitions import Transitions
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.memory import FLOOR, Memory
from m6rec_jax.recommend.metrics import flatten, member

BATCH = 512
Histories = Sequence[np.ndarray]


class Ranker(Protocol):
    """Anything that turns histories (catalogue rows in time order) into ranked lists."""

    def rank(self, histories: Histories, k: int, repeat: bool = False) -> np.ndarray: ...


def listed_of(items: pl.DataFrame) -> np.ndarray | None:
    """Which items of items.parquet are still on offer, bool `[C]`; None when all are.

    An item that has left the shop keeps its row, its events and its id, and is no longer shown.
    """
    listed = items["listed"].fill_null(True).to_numpy() if "listed" in items.columns else np.ones(items.height, bool)
    return None if listed.all() else listed


class Popularity:
    """Items by training events (or weights of them), most first; of a catalogue that is not all `listed` (bool `[C]`)
    those that are. `share [C]`: log of (events + 1) / their sum."""

    def __init__(self, events: np.ndarray, listed: np.ndarray | None = None) -> None:
        self.events, self.listed = np.asarray(events, np.float64), listed
        self.share = np.log((self.events + 1) / (self.events + 1).sum())
        order = np.lexsort((np.arange(len(events)), -self.events)).astype(np.int32)
        self.order = order if listed is None else order[listed[order]]

    @classmethod
    def of(cls, items: pl.DataFrame) -> Popularity:
        """That of items.parquet."""
        return cls(items["events"].to_numpy(), listed_of(items))

    def rank(self, histories: Histories, k: int, repeat: bool = False) -> np.ndarray:
        """Lists int32 `[U,k]`."""
        return self.fill(np.full((len(histories), k), -1, np.int32), histories, repeat)

    def fill(self, rows: np.ndarray, histories: Histories, repeat: bool = False,
             allowed: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
        """`rows [U,k]` with its -1 places taken, left to right, by the most popular items not there yet."""
        return poured(self.order if allowed is None else self.order[allowed[self.order]], rows, histories, repeat)


def poured(order: np.ndarray, rows: np.ndarray, histories: Histories, repeat: bool = False) -> np.ndarray:
    """`rows [U,k]` with its -1 places taken, left to right, by the first items of `order` not there yet."""
    missing = rows < 0
    if not missing.any():
        return rows
    filled = rows.copy()
    for start in range(0, len(rows), BATCH):
        part = slice(start, start + BATCH)
        if not missing[part].any():
            continue
        taken = rows[part] if repeat else _side_by_side(rows[part], histories[part])
        # Enough candidates that, whatever is taken, every list can still be filled.
        reach = order[: rows.shape[1] + taken.shape[1]]
        free = ~member(np.broadcast_to(reach, (len(taken), len(reach))), list(taken))
        filled[part] = _pour(filled[part], reach, free)
    return filled


def _side_by_side(rows: np.ndarray, histories: Histories) -> np.ndarray:
    """Listed items and history items of each user in one table, padded with -1."""
    values, owner = flatten(histories)
    lengths = np.bincount(owner, minlength=len(rows))
    table = np.full((len(rows), int(lengths.max(initial=0))), -1, np.int64)
    table[owner, np.arange(len(owner)) - (np.cumsum(lengths) - lengths)[owner]] = values
    return np.concatenate([rows, table], 1)


def _pour(rows: np.ndarray, reach: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Put the n-th free item of `reach` into the n-th empty place of each row."""
    empty = rows < 0
    user, place = np.nonzero(empty)
    nth = (np.cumsum(empty, 1) - 1)[user, place]
    first_free = np.argsort(~free, axis=1, kind="stable")
    usable = nth < free.sum(1)[user]
    made = rows.copy()
    made[user[usable], place[usable]] = reach[first_free[user[usable], nth[usable]]]
    return made


class ItemKNN:
    """Nearest neighbours of items by cosine of TF-IDF weighted users (library `implicit`, K = 100).

    Fitted on users x items counts of training events. (EVALUATION.md's row was fitted on training and validation events.)
    """

    def __init__(self, interactions: sp.csr_matrix, popularity: Popularity, neighbours: int = 100) -> None:
        try:
            from implicit.nearest_neighbours import TFIDFRecommender
        except ImportError:
            raise InputError("item-kNN needs the package implicit: pip install implicit") from None
        model = TFIDFRecommender(K=neighbours, num_threads=0)
        with warnings.catch_warnings():  # implicit warns of a conversion inside implicit
            warnings.simplefilter("ignore")
            model.fit(interactions.astype(np.float64).tocsr(), show_progress=False)
        self.similarity = sp.csr_array(model.similarity)
        self.popularity = popularity

    def rank(self, histories: Histories, k: int, repeat: bool = False) -> np.ndarray:
        """Lists int32 `[U,k]`: items by the sum of their similarities to the items of the history."""
        lists = []
        for start in range(0, len(histories), BATCH):
            part = histories[start : start + BATCH]
            items, owner = flatten(part)
            had = sp.csr_array((np.ones(len(items)), (owner, items)), (len(part), self.similarity.shape[0]))
            rows = top_of_sparse(had @ self.similarity, part, k, repeat, self.popularity.listed)
            lists.append(self.popularity.fill(rows, part, repeat))
        return np.concatenate(lists) if lists else np.zeros((0, k), np.int32)


def top_of_sparse(scores: sp.csr_array, histories: Histories, k: int, repeat: bool,
                  allowed: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    """The k best positive, allowed entries of each row of a CSR `[U,C]`, history left out unless `repeat`; -1 beyond."""
    users, catalogue = int(scores.shape[0]), int(scores.shape[1])
    owner, items = np.repeat(np.arange(users), np.diff(scores.indptr)), scores.indices
    keep = scores.data > 0
    if allowed is not None:
        keep &= allowed[items]
    if not repeat:
        gone, whose = flatten(histories)
        keep &= ~np.isin(owner * catalogue + items, whose * catalogue + gone)
    owner, items, values = owner[keep], items[keep], scores.data[keep]
    order = np.lexsort((items, -values, owner))
    owner, items = owner[order], items[order]
    place = np.arange(len(owner)) - np.searchsorted(owner, np.arange(users))[owner]
    rows = np.full((users, k), -1, np.int32)
    rows[owner[place < k], place[place < k]] = items[place < k]
    return rows


class CountingFloor:
    """The memory alone: transition counts of the last three items, no learning (EVALUATION.md's floor)."""

    def __init__(self, memory: Memory, popularity: Popularity) -> None:
        self.memory, self.popularity = memory, popularity

    @classmethod
    def of(cls, transitions: Transitions, popularity: Popularity) -> CountingFloor:
        """The floor as EVALUATION.md states it, whatever settings a run's own memory has."""
        return cls(Memory(transitions, FLOOR), popularity)

    def rank(self, histories: Histories, k: int, repeat: bool = False) -> np.ndarray:
        """Lists int32 `[U,k]`: the support of the memory, heaviest first."""
        lists = []
        for start in range(0, len(histories), BATCH):
            part = histories[start : start + BATCH]
            seen, listed = None if repeat else part, self.popularity.listed
            rows = self.memory.support(part, exclude=seen, allowed=listed).rows[:, :k]
            if rows.shape[1] < k:
                rows = np.pad(rows, ((0, 0), (0, k - rows.shape[1])), constant_values=-1)
            lists.append(self.popularity.fill(rows, part, repeat))
        return np.concatenate(lists) if lists else np.zeros((0, k), np.int32)
