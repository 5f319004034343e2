"""Collaborative memory: what other users did after the items of this history, and how far to trust it (DESIGN section 6).

The memory is a sparse distribution over the catalogue for each user, read from transition counts without any learning;
where an item was met seldom, its neighbours by content speak for it. Its ranking with the settings of `FLOOR` and no
neighbours is the counting floor of EVALUATION.md. Nothing here is fitted; how far to trust it is the gate's (recommend/gate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from m6rec_jax.data.neighbours import Neighbours
from m6rec_jax.data.transitions import Transitions
from m6rec_jax.recommend.metrics import flatten


@dataclass(frozen=True)
class MemoryConfig:
    """How transition counts become a distribution.

    Args:
        recency: weights of the last items of a history, newest first.
        power: a row of counts is divided by (its sum) to this power, so that common items do not drown the others.
        backward: share with which a new event also counts in the other direction; what `prepare` counted with.
        prior: counts that an item's neighbours by content are worth together (a Dirichlet prior): most of the row of an
            item met a few times, nothing much beside thousands.
        width: heaviest items kept for a user.
    """

    recency: tuple[float, ...] = tuple(1 / gap for gap in range(1, 11))  # as a transition counts by its gap
    power: float = 0.7
    backward: float = 0.5
    prior: float = 16.0
    width: int = 4096


FLOOR = MemoryConfig(recency=(1.0, 0.5, 0.25), power=0.5, prior=0.0)


@dataclass(frozen=True)
class Support:
    """The memory of U users as plain arrays, heaviest item first (ties: lower catalogue row).

    `rows` int32 `[U,S]`, -1 = padding; `mass` float32 `[U,S]`, sums to 1 (0 for a user without support); `total`
    float64 `[U]`: the mass before it was normalised, which is how much evidence there was.
    """

    rows: np.ndarray
    mass: np.ndarray
    total: np.ndarray

    def probability(self, targets: np.ndarray) -> np.ndarray:
        """Mass of one item a user: float64 `[U]`."""
        return np.where(self.rows == targets[:, None], self.mass, 0).sum(1, dtype=np.float64)

    def within(self, chosen: np.ndarray) -> Support:
        """The part of it inside `chosen` bool `[C]`, its mass as it was, so that it no longer sums to 1."""
        inside = (self.rows >= 0) & chosen[self.rows]
        order = np.argsort(~inside, axis=1, kind="stable")
        rows, mass = (np.take_along_axis(np.where(inside, x, none).astype(x.dtype), order, 1) for x, none in ((self.rows, -1), (self.mass, 0)))  # fmt: skip
        return Support(rows, mass, self.total)


class Memory:
    """Transition counts, forward and backward joined, that answer for a batch of histories and learn from one event.

    `neighbours`: items alike by content, counted as `config.prior` transitions of every item; None = counts alone.

    The counts lie in one CSR. A known pair is counted in place; a row that gains a pair moves to a small overflow, so
    an event costs time in the length of the rows it touches, whatever the size of the catalogue.
    """

    def __init__(self, transitions: Transitions, config: MemoryConfig | None = None, neighbours: Neighbours | None = None) -> None:  # fmt: skip
        self.config = config or MemoryConfig()
        self.window = transitions.window
        joined = (transitions.forward.to_scipy() + transitions.backward.to_scipy()).astype(np.float64)
        if neighbours is not None and self.config.prior > 0:
            joined = joined + self.config.prior * _as_rows(neighbours)
        joined.sort_indices()
        self._base: sp.csr_array = joined
        self._grown: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.degree: np.ndarray = np.asarray(joined.sum(axis=1)).ravel()

    @property
    def catalogue(self) -> int:
        return len(self.degree)

    def row(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """(catalogue rows ascending, raw weights) of what followed or preceded `item`."""
        if item in self._grown:
            return self._grown[item]
        span = slice(self._base.indptr[item], self._base.indptr[item + 1])
        return self._base.indices[span], self._base.data[span]

    def observe(self, history: np.ndarray, item: int, weight: float = 1.0) -> None:
        """Count one new event in place: `item` after `history` (catalogue rows in time order, -1 = no item)."""
        for gap, before in enumerate(np.asarray(history)[: -self.window - 1 : -1], 1):
            if before >= 0:
                self._add(int(before), item, weight / gap)
                self._add(item, int(before), weight * self.config.backward / gap)

    def _add(self, a: int, b: int, weight: float) -> None:
        columns, weights = self.row(a)
        at = int(np.searchsorted(columns, b))
        if at < len(columns) and columns[at] == b:
            weights[at] += weight
        else:
            self._grown[a] = np.insert(columns, at, b), np.insert(weights, at, weight)
        self.degree[a] += weight

    def scores(self, histories: Sequence[np.ndarray]) -> sp.csr_array:
        """Raw mass of every supported item: CSR `[U,C]`, nothing excluded.

        The sum over the last items i of recency x counts[i] / degree[i]^power.
        """
        recency = np.asarray(self.config.recency)
        last = [known[: -len(recency) - 1 : -1] for known in (h[h >= 0] for h in map(np.asarray, histories))]
        items, owner = flatten(last)
        weights = np.concatenate([recency[: len(h)] for h in last]) if last else np.zeros(0)
        degree = self.degree[items]
        weights = np.divide(weights, degree**self.config.power, out=np.zeros(len(items)), where=degree > 0)
        shape, moved = (len(histories), self.catalogue), np.isin(items, list(self._grown))
        asked = sp.csr_array((weights[~moved], (owner[~moved], items[~moved])), shape)
        result = asked @ self._base
        if moved.any():
            there, slot = np.unique(items[moved], return_inverse=True)
            rows = [self._grown[int(i)] for i in there]
            indptr = np.cumsum([0, *(len(columns) for columns, _ in rows)])
            columns, values = (np.concatenate(part) for part in zip(*rows, strict=True))
            overflow = sp.csr_array((values, columns, indptr), (len(there), self.catalogue))
            result = (
                result + sp.csr_array((weights[moved], (owner[moved], slot)), (len(histories), len(there))) @ overflow
            )
        return result.tocsr()

    def support(self, histories: Sequence[np.ndarray], *, exclude: Sequence[np.ndarray] | None = None,
                allowed: np.ndarray | None = None, candidates: Sequence[np.ndarray] | None = None) -> Support:  # fmt: skip
        """The distribution of each history over what it may be shown: `allowed` bool `[C]`, less each `exclude`; with
        `candidates`, rows of each user, no other than these.

        Renormalised after filtering. S is the widest support of the batch, rounded up to a power of two from 8, so
        that jitted programs meet few shapes.
        """
        scores = self.scores(histories)
        owner = np.repeat(np.arange(len(histories)), np.diff(scores.indptr))
        items, values = scores.indices, scores.data
        keep = values > 0
        if allowed is not None:
            keep &= allowed[items]
        if exclude is not None:
            gone, whose = flatten(exclude)
            keep &= ~np.isin(owner * self.catalogue + items, whose[gone >= 0] * self.catalogue + gone[gone >= 0])
        if candidates is not None:
            own, whose = flatten(candidates)
            keep &= np.isin(owner * self.catalogue + items, whose * self.catalogue + own)
        owner, items, values = owner[keep], items[keep], values[keep]
        total = np.bincount(owner, values, minlength=len(histories))
        order = np.lexsort((items, -values, owner))
        owner, items, values = owner[order], items[order], values[order]
        starts = np.searchsorted(owner, np.arange(len(histories)))
        place = np.arange(len(owner)) - starts[owner]
        short = place < self.config.width
        owner, items, values, place = owner[short], items[short], values[short], place[short]
        width = 1 << max(3, int(place.max(initial=0)).bit_length())
        rows = np.full((len(histories), width), -1, np.int32)
        mass = np.zeros((len(histories), width), np.float64)
        rows[owner, place], mass[owner, place] = items, values
        kept = mass.sum(1, keepdims=True)
        return Support(rows, np.divide(mass, kept, out=mass, where=kept > 0).astype(np.float32), total)

    def evidence(self, history: np.ndarray, item: int) -> list[tuple[int, float]]:
        """The history items behind the mass of `item` and the share of it that each brings, largest first.

        Empty when the memory says nothing about the item; otherwise the shares sum to 1.
        """
        known = np.asarray(history)
        shares: dict[int, float] = {}
        for recency, before in zip(self.config.recency, known[known >= 0][::-1], strict=False):
            columns, weights = self.row(int(before))
            at = int(np.searchsorted(columns, item))
            if at < len(columns) and columns[at] == item:
                share = recency * weights[at] / self.degree[before] ** self.config.power
                shares[int(before)] = shares.get(int(before), 0.0) + share
        whole = sum(shares.values())
        return sorted(((i, s / whole) for i, s in shares.items() if s > 0), key=lambda pair: (-pair[1], pair[0]))


def _as_rows(neighbours: Neighbours) -> sp.csr_array:
    """CSR float64 `[C,C]`, row sums 1 (0 without content)."""
    row, place = np.nonzero(neighbours.weights > 0)
    there = neighbours.weights[row, place].astype(np.float64), (row, neighbours.rows[row, place])
    return sp.csr_array(there, shape=(len(neighbours.rows),) * 2)
