"""Measures of a choice among several options: accuracy, macro F1, log-loss, with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np


def classes(labels: np.ndarray, chances: np.ndarray, *, seed: int = 0, draws: int = 500) -> dict[str, Any]:
    """Accuracy, macro F1 and log-loss of the chances `[n, C]` given to options of which `labels [n]` are right:
    `{metrics, ci95}`, both empty without rows.

    `macro_f1`: mean of the F1 of every option that is a label or was chosen (as scikit-learn has it). `log_loss` in nats,
    chances kept 1e-15 away from 0. 95 % intervals by Poisson bootstrap over rows.
    """
    labels, chances = np.asarray(labels, np.int64), np.asarray(chances, np.float64)
    if not len(labels):
        return {"metrics": {}, "ci95": {}}
    C = chances.shape[1]
    chosen = chances.argmax(1)
    losses = -np.log(np.maximum(chances[np.arange(len(labels)), labels], 1e-15))
    cell = labels * C + chosen

    def measured(w: np.ndarray) -> dict[str, float]:
        table = np.bincount(cell, w, minlength=C * C).reshape(C, C)
        total, hit, either = w.sum(), np.diag(table), table.sum(0) + table.sum(1)
        f1 = np.divide(2 * hit, either, out=np.zeros(C), where=either > 0)
        return {"accuracy": hit.sum() / total, "macro_f1": f1[either > 0].mean(), "log_loss": w @ losses / total}

    rng = np.random.default_rng(seed)
    drawn = [measured(w) for _ in range(draws) if (w := rng.poisson(1.0, len(labels)).astype(np.float64)).sum()]
    values = {name: float(value) for name, value in measured(np.ones(len(labels))).items()}
    limits = {name: np.quantile([one[name] for one in drawn], (0.025, 0.975)) for name in values} if drawn else {}
    return {"metrics": values, "ci95": {name: (float(a), float(b)) for name, (a, b) in limits.items()}}
