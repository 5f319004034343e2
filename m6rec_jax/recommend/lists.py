"""Ranked lists of many users as arrays, and how one part's list goes on where another's ends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from m6rec_jax.recommend.coldstart import SOURCES

NONE, MODEL, MEMORY, POPULARITY = range(len(SOURCES))


@dataclass(frozen=True)
class Lists:
    """Ranked lists of U users as arrays.

    `rows` int32 `[U,k]` catalogue rows, -1 where the catalogue is used up; `scores` float32 `[U,k]` log-probabilities,
    falling along each list unless rules moved its places (`reranking.Rules`); `sources` uint8 `[U,k]`, indices into
    `coldstart.SOURCES`; `routes [U]` names; `exact` bool `[U]`: what the list was taken from is proven to be the best of
    the whole catalogue.
    """

    rows: np.ndarray
    scores: np.ndarray
    sources: np.ndarray
    routes: np.ndarray
    exact: np.ndarray

    @classmethod
    def empty(cls, users: int, k: int) -> Lists:
        return cls(
            np.full((users, k), -1, np.int32), np.full((users, k), -np.inf, np.float32), np.zeros((users, k), np.uint8),
            np.full(users, "popularity", object), np.zeros(users, bool),
        )  # fmt: skip

    def put(self, users: np.ndarray, lists: Lists) -> None:
        """Write the lists of some users in their places."""
        for whole, part in zip(self._parts(), lists._parts(), strict=True):
            whole[users] = part

    def of(self, users: np.ndarray) -> Lists:
        """The lists of some users."""
        return Lists(*(part[users] for part in self._parts()))

    def places(self, at: np.ndarray) -> Lists:
        """The lists made of these places `[U,k]` of each; -1 leaves one empty."""
        there = at >= 0
        pick = lambda x, none: np.where(there, np.take_along_axis(x, np.maximum(at, 0), 1), none).astype(x.dtype)  # noqa: E731
        return replace(
            self, rows=pick(self.rows, -1), scores=pick(self.scores, -np.inf), sources=pick(self.sources, NONE)
        )

    def beside(self, other: Lists) -> Lists:
        """Both lists of each user in one row, these first."""
        side = lambda name: np.concatenate([getattr(self, name), getattr(other, name)], axis=1)  # noqa: E731
        both = {name: side(name) for name in ("rows", "scores", "sources")}
        return replace(self, **both, exact=self.exact & other.exact)

    def _parts(self) -> tuple[np.ndarray, ...]:
        return self.rows, self.scores, self.sources, self.routes, self.exact


def of_memory(rows: np.ndarray, mass: np.ndarray, k: int) -> Lists:
    """The first k items of a memory's support, which lies heaviest first: `rows`, `mass [U,S]`."""
    lists = Lists.empty(len(rows), k)
    width = min(k, rows.shape[1])
    lists.rows[:, :width] = rows[:, :width]
    with np.errstate(divide="ignore"):
        lists.scores[:, :width] = np.log(mass[:, :width])
    lists.sources[:] = np.where(lists.rows >= 0, MEMORY, NONE)
    return lists


def appended(rows: np.ndarray, more: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
    """`rows` with empty places taken by the items of `more` that are not there yet, in order."""
    result = rows.copy()
    for u in np.flatnonzero((rows < 0).any(1)):
        have = set(rows[u].tolist())
        fresh = [i for i in more[u].tolist() if i >= 0 and i not in have and (allowed is None or allowed[i])]
        places = np.flatnonzero(rows[u] < 0)[: len(fresh)]
        result[u, places] = fresh[: len(places)]
    return result


def continued(lists: Lists, rows: np.ndarray, source: int, share: np.ndarray) -> Lists:
    """The lists with new items in their empty places, at the end of each.

    A new item's score is its share of training events, in logs (`share [U,k]`), below the last score there was; it
    never rises.
    """
    fresh = (lists.rows < 0) & (rows >= 0)
    last = np.where(np.isfinite(lists.scores), lists.scores, 0).min(1, initial=0)
    fall = np.minimum.accumulate(np.where(fresh, share, 0), axis=1)
    scores = np.where(fresh, last[:, None] + fall, lists.scores).astype(np.float32)
    return replace(lists, rows=rows, scores=scores, sources=np.where(fresh, source, lists.sources).astype(np.uint8))
