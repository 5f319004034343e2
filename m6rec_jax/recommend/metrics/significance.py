"""Intervals and tests over users: Poisson bootstrap, paired randomisation, Holm's correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def bootstrap_ci(vectors: dict[str, np.ndarray], *, seed: int = 0, draws: int = 1000) -> dict[str, tuple[float, float]]:
    """95 % interval of the mean of each per-user vector `[U]`, by resampling users.

    Poisson bootstrap: each user is drawn Poisson(1) times, so one matrix product serves all vectors, and the same
    seed draws the same users for every system. Memory: 2^22 draws at a time.
    """
    if not vectors:
        return {}
    values = np.stack(list(vectors.values()), 1).astype(np.float64)
    users = len(values)
    if users == 0:
        return dict.fromkeys(vectors, (0.0, 0.0))
    rng, means = np.random.default_rng(seed), []
    step = max(1, (1 << 22) // users)
    for start in range(0, draws, step):
        times = rng.poisson(1.0, (min(step, draws - start), users)).astype(np.float64)
        means.append(times @ values / np.maximum(times.sum(1, keepdims=True), 1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975), axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(vectors, low, high, strict=True)}


def paired_randomisation(a: np.ndarray, b: np.ndarray, *, seed: int = 0, draws: int = 10_000) -> float:
    """Two-sided p-value that per-user vectors `a` and `b` have the same mean, by flipping signs of their differences.

    (1 + flips at least as far from 0 as what was seen) / (1 + draws), so it is never 0.
    """
    difference = (a.astype(np.float64) - b)[a != b]  # equal users add nothing under any flip
    if not len(difference):
        return 1.0
    seen = abs(difference.sum()) * (1 - 1e-9)  # a flip equal to what was seen counts, rounding or not
    rng, far = np.random.default_rng(seed), 0
    step = max(1, (1 << 24) // len(difference))
    for start in range(0, draws, step):
        signs = rng.integers(0, 2, (min(step, draws - start), len(difference)), np.int8) * 2.0 - 1.0
        far += int((np.abs(signs @ difference) >= seen).sum())
    return (1 + far) / (1 + draws)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for how many there are (Holm 1979): the smallest times m, the next times m - 1, never falling.

    At or below 0.05, all those together are wrong in at most 5 % of cases that hold no difference.
    """
    order, made, least = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for place, at in enumerate(order):
        least = max(least, min(1.0, (len(p) - place) * float(p[at])))
        made[at] = least
    return made


def paired(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], metric: str = "ndcg@10", *, seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """Two systems on the same users: mean difference a - b, its 95 % interval, and p by paired randomisation."""
    difference = a[metric].astype(np.float64) - b[metric]
    base = float(b[metric].mean(dtype=np.float64))
    return {
        "metric": metric,
        "difference": float(difference.mean()),
        "relative": float(difference.mean() / base) if base > 0 else None,
        "ci95": bootstrap_ci({"d": difference}, seed=seed)["d"],
        "p": paired_randomisation(a[metric], b[metric], seed=seed),
    }
