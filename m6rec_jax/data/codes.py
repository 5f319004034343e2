"""Item codes: what an item is spelled with (DESIGN section 5).

With one level the code is the catalogue row. With more, residual k-means over the content vector joined with a
collaborative vector: what content predicts it to be (ridge regression on training transitions), and the more of the
item's own transitions there are, the more they themselves. An item that nobody has met is coded by the prediction, so
old and new items lie in one space. The last level only breaks ties, and what overflows goes to the next-nearest cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from m6rec_jax.data.clusters import kmeans, nearest
from m6rec_jax.data.spectral import leading, unit
from m6rec_jax.data.transitions import Transitions
from m6rec_jax.errors import InputError

COLLABORATIVE_WIDTH = 64
COLLABORATIVE_WEIGHT = 1.0  # length of the collaborative part beside content's unit length
RIDGE = 1.0
PRIOR = 8.0  # the predicted vector counts as much as this many transitions
FIT_ITEMS = 1 << 14  # k-means is fitted on at most this many items


@dataclass(frozen=True)
class Behaviour:
    """What training transitions say of each item: unit `vectors` [C, Dk] (zero of an item without any), `degree` [C]."""

    vectors: np.ndarray
    degree: np.ndarray


@dataclass(frozen=True)
class Codebooks:
    """`levels` and `size` a level; `centroids` [levels - 1] of [k, Dc + Dk] and `ridge` [Dc, Dk] (levels above 1)."""

    levels: int
    size: int
    centroids: tuple[np.ndarray, ...] = ()
    ridge: np.ndarray | None = None

    def features(self, content: np.ndarray, known: Behaviour | None = None) -> np.ndarray:
        """Content [n, Dc] joined with the collaborative vector, predicted and, of the same items, known: what k-means
        sees."""
        if self.ridge is None or not self.ridge.shape[1]:
            return content
        collaborative = unit(content @ self.ridge)
        if known is not None:
            collaborative = unit(PRIOR * collaborative + known.degree[:, None] * known.vectors)
        return np.hstack([content, COLLABORATIVE_WEIGHT * collaborative]).astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for an npz."""
        made = {"codebook_levels": np.array(self.levels), "codebook_size": np.array(self.size)}
        if self.ridge is not None:
            made["codebook_ridge"] = self.ridge
        return made | {f"codebook_{i + 1}": c for i, c in enumerate(self.centroids)}

    @classmethod
    def from_arrays(cls, data: dict[str, np.ndarray]) -> Codebooks:
        levels = int(data["codebook_levels"])
        centroids = tuple(data[f"codebook_{i}"] for i in range(1, levels))
        return cls(levels, int(data["codebook_size"]), centroids, data["codebook_ridge"] if levels > 1 else None)


def fit_codes(
    content: np.ndarray, transitions: Transitions, levels: int, size: int, seed: int = 0
) -> tuple[np.ndarray, Codebooks]:
    """Codes [C, L] int32 of the whole catalogue, and the codebooks that also code later items; from content [C, Dc] and
    training transitions.

    Raises InputError when `levels` is none of 1, 3, 4, or the codebooks have no room for the catalogue.
    """
    if levels not in (1, 3, 4):
        raise InputError(f"levels={levels}: choose 1 (one code an item), 3 or 4")
    if levels == 1:
        books = Codebooks(1, len(content))
        return assign_codes(content, books), books
    if size < 2:
        raise InputError(f"codebook={size}: must be at least 2 with levels={levels}")
    known = _behaviour(transitions, seed)
    made = Codebooks(levels, size, ridge=_regression(content, known))
    features = made.features(content, known)
    rng = np.random.default_rng(seed)
    rest = features
    if len(rest) > FIT_ITEMS:
        rest = rest[np.sort(rng.choice(len(rest), FIT_ITEMS, replace=False))]
    centroids = []
    for _ in range(levels - 1):
        centroids.append(kmeans(rest, size, rng))
        rest = rest - centroids[-1][nearest(rest, centroids[-1])]
    books = Codebooks(levels, size, tuple(centroids), made.ridge)
    return _assign(features, books, np.zeros((0, levels), np.int32)), books


def assign_codes(content: np.ndarray, books: Codebooks, used: np.ndarray | None = None) -> np.ndarray:
    """Codes [n, L] int32 of items that have none yet, from their content [n, Dc] alone; none is in `used` [m, L].

    Raises InputError when the codebooks have no room left.
    """
    used = np.zeros((0, books.levels), np.int32) if used is None else used
    if books.levels == 1:
        return (len(used) + np.arange(len(content), dtype=np.int32))[:, None]
    return _assign(books.features(content), books, used)


def _assign(features: np.ndarray, books: Codebooks, used: np.ndarray) -> np.ndarray:
    """Codes [n, L] of items with these features; the cells of earlier items are the fuller."""
    if len(used) + len(features) > books.size**books.levels:
        raise InputError(f"codebook={books.size}: {len(used) + len(features)} items do not fit {books.levels} levels; raise it or add a level")  # fmt: skip
    distinct, same = np.unique(features, axis=0, return_inverse=True)
    same = same.ravel()
    codes = np.zeros((len(features), books.levels), np.int32)
    cells, taken = np.unique(_cell(used[:, :-1], books.size), return_counts=True)
    waiting = np.arange(len(features))
    for choice in range(books.size ** (books.levels - 1)):
        if not len(waiting):
            break
        asking, whose = np.unique(same[waiting], return_inverse=True)
        paths = _path(distinct[asking], books, choice)
        wanted, where = np.unique(_cell(paths, books.size)[whose], return_inverse=True)
        every = np.union1d(cells, wanted)
        busy = np.zeros(len(every), np.int64)
        busy[np.searchsorted(every, cells)] = taken
        at = np.searchsorted(every, wanted)
        last = busy[at][where] + _rank(where)
        fits = last < books.size
        codes[waiting[fits], :-1], codes[waiting[fits], -1] = paths[whose[fits]], last[fits]
        busy[at] += np.bincount(where[fits], minlength=len(wanted))
        cells, taken, waiting = every, busy, waiting[~fits]
    return codes


def _path(features: np.ndarray, books: Codebooks, choice: int) -> np.ndarray:
    """The `choice`-th cell of each item `[n, L - 1]`: its digits in base `size` say how far from the nearest each level
    goes, the last level first."""
    n_levels = books.levels - 1
    digits = [choice // books.size ** (n_levels - 1 - i) % books.size for i in range(n_levels)]
    path = np.empty((len(features), n_levels), np.int32)
    rest = features
    for level, (digit, centroids) in enumerate(zip(digits, books.centroids, strict=True)):
        path[:, level] = nearest(rest, centroids, digit)
        rest = rest - centroids[path[:, level]]
    return path


def _rank(groups: np.ndarray) -> np.ndarray:
    """How many earlier places hold the same number: [3, 5, 3] -> [0, 0, 1]."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    rank = np.empty(len(groups), np.int64)
    rank[order] = np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))
    return rank


def _cell(path: np.ndarray, size: int) -> np.ndarray:
    cell = np.zeros(len(path), np.int64)
    for level in range(path.shape[1]):
        cell = cell * size + path[:, level]
    return cell


def _behaviour(transitions: Transitions, seed: int) -> Behaviour:
    """The leading directions of the normalised training transitions, at most COLLABORATIVE_WIDTH."""
    forward = transitions.forward.to_scipy()
    matrix = sp.csr_array(forward + forward.T)
    degree = np.asarray(matrix.sum(1)).ravel()
    seen = np.flatnonzero(degree > 0)
    width = min(COLLABORATIVE_WIDTH, len(seen) // 2)
    if not width:
        return Behaviour(np.zeros((len(degree), 0), np.float32), degree)
    scale = np.zeros(len(degree), np.float32)
    scale[seen] = 1 / np.sqrt(degree[seen])
    matrix.data *= np.repeat(scale, np.diff(matrix.indptr)) * scale[matrix.indices]
    # The first of all directions only says how often each item is met.
    values, vectors = (x[..., 1:] for x in leading(lambda v: matrix @ v, len(degree), width + 1, seed))
    return Behaviour(unit(vectors * np.sqrt(np.maximum(values, 0)).astype(np.float32)), degree)


def _regression(content: np.ndarray, known: Behaviour) -> np.ndarray:
    """Ridge regression [Dc, Dk] from content [C, Dc] to the vectors of the items that have transitions."""
    seen = np.flatnonzero(known.degree > 0)
    x = content[seen].astype(np.float64)
    return np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ known.vectors[seen]).astype(np.float32)
