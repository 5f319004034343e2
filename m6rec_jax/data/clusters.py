"""k-means, as item codes and the search for neighbours use it."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

ITERATIONS = 10
FAR = 8.0  # length of a spare centroid; content and collaborative parts have length 1
_BLOCK = 1 << 14


def nearest(x: np.ndarray, centroids: np.ndarray, rank: int = 0) -> np.ndarray:
    """Index of the `rank`-th nearest centroid of each row (0 = the nearest)."""
    half = (centroids**2).sum(1) / 2
    chosen = np.empty(len(x), np.int32)
    for start in range(0, len(x), _BLOCK):
        near = half - x[start : start + _BLOCK] @ centroids.T
        if rank:
            chosen[start : start + _BLOCK] = np.argsort(near, axis=1, kind="stable")[:, rank]
        else:
            chosen[start : start + _BLOCK] = near.argmin(1)
    return chosen


def kmeans(x: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` centroids by Lloyd's algorithm from distinct rows; an empty cell takes the worst row.

    Where there are fewer distinct rows the rest lie far away from them all: room for what overflows.
    """
    distinct = np.unique(x, axis=0)
    k = min(size, len(distinct))
    spare = rng.standard_normal((size - k, x.shape[1]))
    spare *= FAR / np.maximum(np.linalg.norm(spare, axis=1, keepdims=True), 1e-6)
    centroids = distinct[np.sort(rng.choice(len(distinct), k, replace=False))]
    if k == len(distinct):
        return np.concatenate([distinct, spare]).astype(np.float32)
    for _ in range(ITERATIONS):
        owner = nearest(x, centroids)
        sizes = np.bincount(owner, minlength=k)
        sums = sp.csr_array((np.ones(len(x), np.float32), (owner, np.arange(len(x)))), shape=(k, len(x))) @ x
        centroids = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centroids).astype(np.float32)
        empty = np.flatnonzero(sizes == 0)
        if len(empty):
            error = ((x - centroids[owner]) ** 2).sum(1)
            centroids[empty] = x[np.argsort(-error, kind="stable")[: len(empty)]]
    return centroids
