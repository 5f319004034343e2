"""Measures of a task with options, from the chance that each option is given."""

from __future__ import annotations

import numpy as np

from m6rec_jax.recommend.metrics.scoring import auc


def of_options(labels: np.ndarray, logp: np.ndarray) -> dict[str, float]:
    """Accuracy and mean negative log-likelihood in nats of labels `[n]` under log-probabilities `[n, C]`; of two options
    also the AUC of the second one, left out where only one of them occurs."""
    made = {
        "accuracy": float((logp.argmax(1) == labels).mean()),
        "log_loss": float(-logp[np.arange(len(labels)), labels].mean(dtype=np.float64)),
    }
    if logp.shape[1] == 2 and np.isfinite(area := auc(labels == 1, logp[:, 1] - logp[:, 0])):
        made["auc"] = area
    return made
