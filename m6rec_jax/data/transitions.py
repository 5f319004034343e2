"""Time-ordered item-to-item transitions, counted in one pass over training events (DESIGN section 6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from m6rec_jax.artifacts.atomic import atomic_path
from m6rec_jax.data.arrays import read_arrays
from m6rec_jax.errors import InputError

CHUNK_EVENTS = 1 << 18
STEP = 2.0**-32  # weights are multiples of it: float64 adds those exactly up to 2**21, in whatever order and pieces
ENTRIES = 1 << 25  # pairs kept a direction; beyond that the lightest are forgotten
_ARRAYS = ("indptr", "indices", "weights")


@dataclass(frozen=True)
class Matrix:
    """A CSR matrix as plain arrays: row r holds `indices[indptr[r]:indptr[r+1]]` (ascending) and their `weights`."""

    indptr: np.ndarray
    indices: np.ndarray
    weights: np.ndarray

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray]:
        """(columns, weights) of row `r`."""
        span = slice(int(self.indptr[r]), int(self.indptr[r + 1]))
        return self.indices[span], self.weights[span]

    def to_scipy(self) -> sp.csr_array:
        n = len(self.indptr) - 1
        return sp.csr_array((self.weights, self.indices, self.indptr), shape=(n, n))


@dataclass(frozen=True)
class Transitions:
    """Raw weights: `forward[a, b]` sums 1/gap over pairs with b after a, `backward[b, a]` sums backward/gap.

    `degree` [C] counts each item's training events. Nothing is normalised: who reads them does.
    """

    forward: Matrix
    backward: Matrix
    degree: np.ndarray
    window: int

    @property
    def catalogue(self) -> int:
        return len(self.degree)

    def save(self, path: Path | str) -> None:
        arrays = {f"{side}_{name}": getattr(getattr(self, side), name) for side in _SIDES for name in _ARRAYS}
        with atomic_path(path) as partial, open(partial, "wb") as file:
            np.savez(file, degree=self.degree, window=np.int64(self.window), **arrays)


_SIDES = ("forward", "backward")


def load_transitions(path: Path | str) -> Transitions:
    """What `Transitions.save` wrote. Raises InputError when the file is missing or damaged."""
    data = read_arrays(path)
    try:
        sides = [Matrix(*(data[f"{side}_{name}"] for name in _ARRAYS)) for side in _SIDES]
        return Transitions(*sides, degree=data["degree"], window=int(data["window"]))
    except KeyError as error:
        raise InputError(f"{path}: no transitions in it ({error} is missing); prepare the dataset again") from None


def count_transitions(
    users: np.ndarray,
    items: np.ndarray,
    times: np.ndarray | None = None,
    kind_weights: np.ndarray | None = None,
    *,
    catalogue: int,
    window: int = 10,
    backward: float = 0.5,
    half_life: float = 0.0,
) -> Transitions:
    """Count transitions over training events sorted by (user, time): n events of `users` [n], `items` [n].

    A pair with `gap` events between its ends (1 = neighbours) adds 1/gap forward and `backward`/gap backward, times
    the kind weight [n] of the event that it leads to, halved for every `half_life` seconds before the last event
    (0 = no decay), rounded to `STEP`: sums do not depend on the order of users. Events are read in chunks of whole users and at most `ENTRIES` pairs are kept: memory is bounded.
    """
    total = pair_weights(users, items, times, kind_weights, catalogue=catalogue, window=window, backward=backward, half_life=half_life)  # fmt: skip
    return of_pairs(total, np.bincount(items, minlength=catalogue), window)


def pair_weights(
    users: np.ndarray,
    items: np.ndarray,
    times: np.ndarray | None = None,
    kind_weights: np.ndarray | None = None,
    *,
    catalogue: int,
    window: int = 10,
    backward: float = 0.5,
    half_life: float = 0.0,
) -> list[sp.csr_array]:
    """What `count_transitions` counts as float64 sums, forward and backward: those of other users add up exactly."""
    shape = (catalogue, catalogue)
    total = [sp.csr_array(shape, dtype=np.float64) for _ in _SIDES]
    fresh = None
    if half_life > 0 and times is not None and len(times):
        fresh = 0.5 ** ((times.max() - times) / half_life)
    for start, end in _user_chunks(users, CHUNK_EVENTS):
        span = slice(start, end)
        strength = np.ones(end - start) if kind_weights is None else np.asarray(kind_weights[span], np.float64)
        aged = strength if fresh is None else strength * fresh[span]
        parts: list[list[tuple[np.ndarray, ...]]] = [[], []]
        for gap in range(1, min(window, end - start - 1) + 1):
            together = users[span][:-gap] == users[span][gap:]
            before, after = items[span][:-gap][together], items[span][gap:][together]
            parts[0].append((before, after, aged[gap:][together] / gap))
            if backward:
                # A pair is as old as its later event, whichever way it is read.
                age = 1.0 if fresh is None else fresh[span][gap:][together]
                parts[1].append((after, before, strength[:-gap][together] * age * (backward / gap)))
        for side, pieces in enumerate(parts):
            if pieces:
                rows, columns, weights = (np.concatenate(column) for column in zip(*pieces, strict=True))
                weights = np.rint(weights / STEP) * STEP
                some = weights != 0
                part = sp.csr_array((weights[some], (rows[some], columns[some])), shape=shape)
                total[side] = lightened(total[side] + part)
    return total


def of_pairs(total: list[sp.csr_array], degree: np.ndarray, window: int = 10) -> Transitions:
    """Sums of `pair_weights` and the events of each item [C] as transitions."""
    return Transitions(*(_matrix(t) for t in total), degree=degree.astype(np.int64), window=window)


def lightened(csr: sp.csr_array) -> sp.csr_array:
    """The heaviest `ENTRIES` entries; all of them where there are no more."""
    if csr.nnz > ENTRIES:
        csr.data[csr.data <= np.partition(csr.data, csr.nnz - ENTRIES - 1)[csr.nnz - ENTRIES - 1]] = 0
        csr.eliminate_zeros()
    return csr


def _matrix(csr: sp.csr_array) -> Matrix:
    csr.sort_indices()
    return Matrix(csr.indptr.astype(np.int64), csr.indices.astype(np.int32), csr.data.astype(np.float32))


def _user_chunks(users: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of about `size` events that never cut a user in two."""
    starts = np.flatnonzero(np.diff(users, prepend=-1)) if len(users) else np.zeros(0, np.int64)
    begin = 0
    while begin < len(users):
        later = starts[np.searchsorted(starts, begin + size) :]
        end = int(later[0]) if len(later) else len(users)
        yield begin, end
        begin = end
