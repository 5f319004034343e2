"""Accuracy of each user's list, computed on the device a block of users at a time."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from m6rec_jax.recommend.metrics.lists import Targets, blocks, lengthened, padded

NAMES = ("ndcg", "recall", "precision", "accuracy", "f1", "mrr", "map", "hit_rate")


def per_user(rows: np.ndarray, targets: Targets, ks: Iterable[int] = (5, 10)) -> dict[str, np.ndarray]:
    """Accuracy of each user's list `rows [U,k]`: `{name@k: float32 [U]}` for every k in `ks`.

    - `ndcg@k`: sum over hits of 1/log2(rank+1), divided by the same sum for the best possible list of
      min(k, targets) hits; with one target that is 1/log2(rank+1).
    - `recall@k`: share of the user's targets that are in the first k. `hit_rate@k`: 1 when any is; the same for one target.
    - `precision@k`: hits in the first k divided by k, also when the list is shorter. `accuracy@k` is the same number.
    - `f1@k`: harmonic mean of precision and recall.
    - `mrr@k`: 1/rank of the first hit, 0 when it lies beyond k.
    - `map@k`: sum over hits of precision at their rank, divided by the targets (as trec_eval does); MRR for one target.
    """
    ks = tuple(ks)
    made = {f"{name}@{k}": np.zeros(len(rows), np.float32) for k in ks for name in NAMES}
    table = padded(targets)
    for part, size in blocks(len(rows)):
        found = jax.device_get(_measures(lengthened(rows[part], size), lengthened(table[part], size), ks))
        for name, vector in found.items():
            made[name][part] = vector[: part.stop - part.start]
    return made


def found_in(rows: jax.Array, targets: jax.Array) -> jax.Array:
    """Which entries of lists `[B,k]` are among their user's targets `[B,W]`, each item at its first place only."""
    hit = ((rows[:, :, None] == targets[:, None, :]) & (rows >= 0)[:, :, None]).any(-1)
    earlier = jnp.tril(jnp.ones((rows.shape[1], rows.shape[1]), bool), -1)
    return hit & ~((rows[:, :, None] == rows[:, None, :]) & earlier).any(-1)


@partial(jax.jit, static_argnames="ks")
def _measures(rows: jax.Array, targets: jax.Array, ks: tuple[int, ...]) -> dict[str, jax.Array]:
    deepest = max(ks, default=0)
    found = found_in(rows, targets)[:, :deepest].astype(jnp.float32)
    found = jnp.pad(found, ((0, 0), (0, deepest - found.shape[1])))
    wanted = (targets >= 0).sum(1)
    rank = np.arange(1, deepest + 1)
    discount = (1 / np.log2(rank + 1)).astype(np.float32)
    ideal = jnp.asarray(np.concatenate([[0.0], np.cumsum(1 / np.log2(rank + 1))]), jnp.float32)
    so_far = jnp.cumsum(found, 1)
    precise = found * so_far / rank.astype(np.float32)
    made = {}
    for k in ks:
        top, count = found[:, :k], so_far[:, k - 1]
        best = ideal[jnp.minimum(wanted, k)]
        first = jnp.where(count > 0, 1 / (top.argmax(1) + 1.0), 0.0)
        values = {
            "ndcg": jnp.where(best > 0, (top * discount[:k]).sum(1) / jnp.where(best > 0, best, 1), 0),
            "recall": count / jnp.maximum(wanted, 1),
            "precision": count / k,
            "accuracy": count / k,
            "f1": 2 * count / jnp.maximum(k + wanted, 1),
            "mrr": first,
            "map": precise[:, :k].sum(1) / jnp.maximum(wanted, 1),
            "hit_rate": (count > 0).astype(jnp.float32),
        }
        made |= {f"{name}@{k}": values[name] for name in NAMES}
    return made
