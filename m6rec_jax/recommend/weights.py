"""What weights kept otherwise than in full cost: the same users, gate and settings, asked of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from m6rec_jax.model.quantised import parameter_bytes
from m6rec_jax.recommend import metrics
from m6rec_jax.recommend.recommender import Recommender

COMPARED = ("ndcg@10", "recall@10")


def cost_of(full: Recommender, kept: Recommender, ranked: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray],
            vectors: Mapping[str, Mapping[str, np.ndarray]], other_vectors: Mapping[str, Mapping[str, np.ndarray]], *,
            seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """The part `weights` of a report: `kept` beside `full`, for each system that both ranked.

    `ranked`, `others`: lists `rows [U, k]` by full weights and by the kept ones, whose measures the vectors hold.
    Differences are kept - full, with 95 % intervals over the same users; `same_items` is the share of places of the full
    lists whose item stands in the other list too. Bytes are those of the parameters on a device, scales among them.
    """
    assert full.engine is not None and kept.engine is not None
    return {
        "kept_as": kept.engine.weights,
        "model_version": kept.model_version,
        "parameter_bytes": {one.weights: parameter_bytes(one.params) for one in (full.engine, kept.engine)},
        "metrics": {name: {m: float(v.mean(dtype=np.float64)) for m, v in found.items()} for name, found in other_vectors.items()},
        "difference": {
            name: {m: metrics.paired(found, vectors[name], m, seed=seed) for m in COMPARED}
            for name, found in other_vectors.items()
        },
        "same_items": {name: _same(ranked[name], rows) for name, rows in others.items()},
    }  # fmt: skip


def _same(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the filled places of `a` whose item is in the same user's list of `b`."""
    there = a >= 0
    return float(metrics.member(a, list(b))[there].mean()) if there.any() else 1.0
