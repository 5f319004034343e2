"""Ragged requests as rectangles of few shapes, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m6rec_jax.vocab import BOS


def bucket(n: int, least: int, factor: int = 2) -> int:
    """The smallest of least, least x factor, ... that holds n; between powers of two, also the middle."""
    size = least
    while size < n:
        size *= factor
    return size * 3 // 4 if factor == 2 and size > least and n <= size * 3 // 4 else size


def padded(pairs: Sequence[tuple[np.ndarray, np.ndarray]], B: int, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-padded tokens and item rows `[B, T]`, and lengths `[B]`; spare rows hold <s> alone."""
    tokens = rectangle([t for t, _ in pairs], B, T, 0, np.int32)
    tokens[len(pairs) :, 0] = BOS
    lengths = np.ones(B, np.int32)
    lengths[: len(pairs)] = [len(t) for t, _ in pairs]
    return tokens, rectangle([r for _, r in pairs], B, T, -1, np.int32), lengths


def rectangle(parts: Sequence[np.ndarray], rows: int, width: int, fill: float, dtype: type) -> np.ndarray:
    made = np.full((rows, width), fill, dtype)
    for i, part in enumerate(parts):
        made[i, : len(part)] = part
    return made


def supported(rows: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    some = mass > 0
    return rows[some], mass[some]


def mass_of(candidates: np.ndarray, rows: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """What a user's support `rows [J]` (-1 = none) gives each of some distinct candidates."""
    made = np.zeros(len(candidates))
    if len(candidates):
        order = np.argsort(candidates, kind="stable")
        at = order[np.minimum(np.searchsorted(candidates, rows, sorter=order), len(order) - 1)]
        hit = np.asarray(candidates)[at] == rows
        np.add.at(made, at[hit], mass[hit])
    return made
