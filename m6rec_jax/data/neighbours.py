"""Items alike by content: what an item that few have met can borrow from those that many have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from m6rec_jax.data.clusters import kmeans, nearest

NEIGHBOURS = 30
SHARPNESS = 2.0  # a neighbour counts by its cosine to this power
EXACT_ITEMS = 1 << 14  # larger catalogues are searched cell by cell
FIT_ITEMS = 1 << 14
PROBES = 8  # cells that are searched for the neighbours of one
_BLOCK = 1024


@dataclass(frozen=True)
class Neighbours:
    """The K items most like each item, nearest first: `rows` int32 `[C,K]` (-1 pads) and `weights` float32 `[C,K]`, whose
    rows sum to 1 (to 0 for an item without content)."""

    rows: np.ndarray
    weights: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for an npz."""
        return {"neighbours": self.rows, "neighbour_weights": self.weights}

    @classmethod
    def from_arrays(cls, data: dict[str, np.ndarray]) -> Neighbours:
        return cls(data["neighbours"], data["neighbour_weights"])


def find_neighbours(content: np.ndarray, words: sp.csr_array | None = None, *, k: int = NEIGHBOURS,
                    sharpness: float = SHARPNESS, seed: int = 0) -> Neighbours:  # fmt: skip
    """The k nearest of content `[C, Dc]` (unit rows, or zero where nothing is known) by cosine, none below 0.

    With `words`, TF-IDF `[C, t]` with unit rows, the cosine is theirs: the rare word that two items share is what a few
    hundred dimensions forget first. `content` then only says where to look in a large catalogue. Exact up to
    `EXACT_ITEMS` items; beyond that among the items of the `PROBES` k-means cells nearest to an item's own, so that time
    grows with C^1.5 and not with its square (IVF: Jégou et al. 2011).
    """
    compared: Any = content if words is None else words
    items = np.flatnonzero(np.abs(content).sum(1) > 0)
    rows = np.full((len(content), k), -1, np.int32)
    cosines = np.zeros((len(content), k), np.float32)
    for asking, among in _cells(content, items, np.random.default_rng(seed)):
        there = compared[among].T  # once a cell: turning a sparse matrix costs as much as using it
        for start in range(0, len(asking), _BLOCK):
            block = asking[start : start + _BLOCK]
            near = compared[block] @ there
            near = near if words is None else near.toarray()
            near[among[None, :] == block[:, None]] = 0
            n = min(k, len(among))
            best = np.argpartition(-near, n - 1, axis=1)[:, :n]
            value = np.take_along_axis(near, best, 1)
            order = np.lexsort((among[best], -value), axis=1)
            best, value = np.take_along_axis(best, order, 1), np.take_along_axis(value, order, 1)
            rows[block, :n] = np.where(value > 0, among[best], -1)
            cosines[block, :n] = np.maximum(value, 0)
    weights = cosines**sharpness
    total = weights.sum(1, keepdims=True)
    return Neighbours(rows, np.divide(weights, total, out=np.zeros_like(weights), where=total > 0))


def _cells(content: np.ndarray, items: np.ndarray, rng: np.random.Generator):
    """Pairs (items that ask, items they are compared with), which ask once each."""
    if len(items) <= EXACT_ITEMS:
        yield items, items
        return
    count = round(len(items) ** 0.5)
    fit = items if len(items) <= FIT_ITEMS else np.sort(rng.choice(items, FIT_ITEMS, replace=False))
    centroids = kmeans(content[fit], count, rng)
    owner = nearest(content[items], centroids)
    members = np.split(items[np.argsort(owner, kind="stable")], np.cumsum(np.bincount(owner, minlength=count))[:-1])
    half = (centroids**2).sum(1) / 2
    for cell, asking in enumerate(members):
        if len(asking):
            close = np.argsort(half - centroids @ centroids[cell], kind="stable")[:PROBES]
            yield asking, np.concatenate([members[c] for c in close])
