"""Ranked lists as arrays: which entries are targets, which are repeated, which belong to the user."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

BLOCK = 8192  # users a block on the device

Targets = np.ndarray | Sequence[np.ndarray]


def flatten(groups: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ragged arrays laid end to end: their values `[n]` and, for each value, the number of its group `[n]`."""
    lengths = np.fromiter((len(g) for g in groups), np.int64, len(groups))
    values = np.concatenate([np.asarray(g, np.int64) for g in groups]) if lengths.sum() else np.zeros(0, np.int64)
    return values, np.repeat(np.arange(len(groups)), lengths)


def member(rows: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """Whether each entry of `rows [U,k]` is in its user's own group of catalogue rows: bool `[U,k]`."""
    values, owner = flatten(groups)
    span = int(max(rows.max(initial=0), values.max(initial=0))) + 2
    keys = rows.astype(np.int64) + 1 + np.arange(len(rows))[:, None] * span
    return np.isin(keys, values + 1 + owner * span)


def repeated(rows: np.ndarray) -> np.ndarray:
    """Entries of `rows [U,k]` that stood earlier in the same list: bool `[U,k]`; -1 is never one."""
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, 1)
    later = np.zeros(rows.shape, bool)
    later[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    result = np.zeros(rows.shape, bool)
    np.put_along_axis(result, order, later, 1)
    return result


def hits(rows: np.ndarray, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """Which entries of `rows [U,k]` are targets (bool `[U,k]`), and how many targets each user has `[U]`."""
    if isinstance(targets, np.ndarray) and targets.ndim == 1:
        found, wanted = (rows == targets[:, None]) & (rows >= 0), (targets >= 0).astype(np.int64)
    else:
        groups = [np.unique(t) for t in targets]
        found, wanted = member(rows, groups) & (rows >= 0), np.fromiter((len(g) for g in groups), np.int64, len(groups))
    return found & ~repeated(rows), wanted


def ranks(rows: np.ndarray, targets: Targets) -> np.ndarray:
    """Rank of the first target in each list `[U]`, from 1; 0 = not in the list."""
    found, _ = hits(rows, targets)
    return np.where(found.any(1), found.argmax(1) + 1, 0)


def padded(targets: Targets) -> np.ndarray:
    """Distinct targets of each user side by side: int32 `[U,W]`, -1 after the last; W is a power of two."""
    if isinstance(targets, np.ndarray) and targets.ndim == 1:
        return targets.astype(np.int32)[:, None]
    values, owner = flatten(targets)
    span = int(values.max(initial=0)) + 1
    owner, values = np.divmod(np.unique(owner[values >= 0] * span + values[values >= 0]), span)
    many = np.bincount(owner, minlength=len(targets))
    table = np.full((len(targets), 1 << max(int(many.max(initial=1)) - 1, 0).bit_length()), -1, np.int32)
    table[owner, np.arange(len(owner)) - (np.cumsum(many) - many)[owner]] = values
    return table


def blocks(users: int) -> Iterator[tuple[slice, int]]:
    """Slices that cut U users into blocks, and how many rows a program sees of each: few shapes, so few compilations."""
    size = min(BLOCK, max(8, 1 << (users - 1).bit_length())) if users else 0
    for start in range(0, users, max(size, 1)):
        yield slice(start, min(start + size, users)), size


def lengthened(rows: np.ndarray, size: int) -> np.ndarray:
    """`rows [n, ...]` as int32 with -1 rows up to `size`."""
    return np.pad(rows.astype(np.int32), [(0, size - len(rows)), (0, 0)], constant_values=-1)
