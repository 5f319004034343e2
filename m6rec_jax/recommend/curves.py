"""What the charts of an evaluation show, as numbers: coverage by k, popularity of what is shown, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m6rec_jax.recommend import metrics

MOST = 50_000  # users whose lists are tested for calibration: intervals are narrow by then
TIERS = (("top 1 %", 0.01), ("next 4 %", 0.05), ("next 15 %", 0.20), ("next 30 %", 0.50), ("other half", 1.0))


def coverage_curves(ranked: Mapping[str, np.ndarray], facts: metrics.Facts) -> dict[str, Any]:
    """Share of the catalogue that stands in somebody's first k, for each k: `{k: [...], system: [...]}`."""
    made: dict[str, Any] = {}
    for name, rows in ranked.items():
        depth = rows.shape[1]
        _, best = metrics.tally(rows, facts.catalogue)
        reached = np.cumsum(np.bincount(best, minlength=depth + 2)[1 : depth + 1]) / facts.catalogue
        made |= {"k": list(range(1, depth + 1)), name: reached.tolist()}
    return made


def popularity_tiers(ranked: Mapping[str, np.ndarray], histories: Sequence[np.ndarray], facts: metrics.Facts) -> dict[str, Any]:  # fmt: skip
    """Shares of items by how many users had them: of the catalogue, of the users' histories, of each system's places."""
    order = np.lexsort((np.arange(facts.catalogue), -facts.users_had))
    ends = [max(1, int(np.ceil(share * facts.catalogue))) for _, share in TIERS]
    tier = np.empty(facts.catalogue, np.int64)
    tier[order] = np.searchsorted(ends, np.arange(facts.catalogue), side="right")

    def shares(counts: np.ndarray) -> list[float]:
        held = np.bincount(tier, counts, minlength=len(TIERS))
        return (held / max(held.sum(), 1)).tolist()

    values, _ = metrics.flatten(histories)
    made = {"tiers": [name for name, _ in TIERS], "catalogue": shares(np.ones(facts.catalogue))}
    made["histories"] = shares(np.bincount(values, minlength=facts.catalogue))
    return made | {name: shares(metrics.tally(rows, facts.catalogue)[0]) for name, rows in ranked.items()}


def calibration(rows: np.ndarray, scores: np.ndarray, counted: np.ndarray, targets: np.ndarray, *, seed: int = 0) -> dict[str, Any] | None:  # fmt: skip
    """Whether the chances given to the items of lists come true: each `counted` place `[U,k]` is a row, a hit is a 1.

    `scores` log-probabilities. AUC, GAUC, log-loss and ECE with intervals over users, and the bins of the reliability
    diagram, of at most `MOST` users drawn by `seed`. None when no place has a probability.
    """
    counted = counted & (rows >= 0)
    if len(rows) > MOST:
        counted[np.random.default_rng(seed).permutation(len(rows))[MOST:]] = False
    user, place = np.nonzero(counted)
    if not len(user):
        return None
    chances = np.minimum(np.exp(scores[user, place], dtype=np.float64), 1.0)
    hit = metrics.hits(rows, targets)[0][user, place]
    measured = metrics.scoring(hit, chances, user, seed=seed)
    return {"users": len(np.unique(user)), "places": len(user), **measured, "bins": metrics.reliability(hit, chances)}
