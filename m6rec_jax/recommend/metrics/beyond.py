"""Measures beyond accuracy: what of the catalogue is shown, how new, varied, surprising and popular it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from m6rec_jax.data.inequality import gini
from m6rec_jax.recommend.metrics.accuracy import found_in
from m6rec_jax.recommend.metrics.lists import Targets, blocks, flatten, hits, lengthened, member, padded, repeated


@dataclass(frozen=True)
class Facts:
    """What the measures beyond accuracy know about the catalogue, from training events only.

    `users_had [C]`: users with the item in training; `users`: users in training. None where a dataset says nothing:
    `categories`, `types`: bool CSR `[C,K]`; `content [C,D]`: content vectors (a zero vector = nothing known);
    `recent` bool `[C]`: the newest items.
    """

    users_had: np.ndarray
    users: int
    categories: sp.csr_matrix | None = None
    types: sp.csr_matrix | None = None
    content: np.ndarray | None = None
    recent: np.ndarray | None = None

    @property
    def catalogue(self) -> int:
        return len(self.users_had)

    @cached_property
    def tables(self) -> dict[str, jax.Array]:
        """Float32 tables by catalogue row, on the device: what a list is looked up in."""
        made = {"novelty": _novelty(self), "general": _general(self.users_had)}
        if self.recent is not None:
            made["recent"] = self.recent
        if self.content is not None:
            length = np.linalg.norm(self.content, axis=1, keepdims=True)
            made["content"] = self.content / np.where(length > 0, length, 1)
        return {name: jnp.asarray(table, jnp.float32) for name, table in made.items()}


def _novelty(facts: Facts) -> np.ndarray:
    bits = -np.log2(np.maximum(facts.users_had, 1) / max(facts.users, 1))
    return bits / np.log2(max(facts.users, 2))


def _general(users_had: np.ndarray) -> np.ndarray:
    """Chance that anybody is shown the item, as RecTools has it: (C + 1 - rank by popularity)/C, equals share a rank;
    0 for an item nobody had."""
    _, place = np.unique(-users_had, return_inverse=True)
    return np.where(users_had > 0, (len(users_had) - place) / max(len(users_had), 1), 0.0)


def category_matrix(categories: Sequence[Sequence[str] | None]) -> sp.csr_matrix | None:
    """Bool CSR `[C,K]` of the categories of each item; None when no item has one."""
    names: dict[str, int] = {}
    item, column = [], []
    for row, listed in enumerate(categories):
        for name in listed or ():
            item.append(row)
            column.append(names.setdefault(name, len(names)))
    if not names:
        return None
    return sp.csr_matrix((np.ones(len(item), bool), (item, column)), (len(categories), len(names)))


def beyond_per_user(rows: np.ndarray, facts: Facts, k: int, targets: Targets) -> dict[str, np.ndarray]:
    """Measures of the first k of each list, all in [0, 1]: `{name@k: float32 [U]}`. An empty list scores 0.

    - `novelty@k` (MIUF): mean of -log2(users who had the item / users), divided by log2(users): 0 = everybody had it,
      1 = one user had it; an item nobody had counts as if one user had it (RecTools' MIUF, the same in bits, does so too).
    - `serendipity@k` (RecTools): mean over the list of max((C + 1 - rank)/C - general chance, 0) where the item is a
      hit, 0 elsewhere; the general chance is the same formula with the rank by popularity.
    - `diversity@k`: mean over the pairs of a list of 1 - max(cosine of their content vectors, 0); pairs with an item
      that nothing is known of are left out. `recent@k`: share of the list that is among the newest items.
    """
    table, made = padded(targets), {}
    for part, size in blocks(len(rows)):
        block = lengthened(rows[part, :k], size), lengthened(table[part], size)
        for name, vector in jax.device_get(_per_list(*block, facts.tables)).items():
            made.setdefault(f"{name}@{k}", np.zeros(len(rows), np.float32))[part] = vector[: part.stop - part.start]
    return made


@jax.jit
def _per_list(rows: jax.Array, targets: jax.Array, tables: dict[str, jax.Array]) -> dict[str, jax.Array]:
    there, at = rows >= 0, jnp.maximum(rows, 0)
    count = jnp.maximum(there.sum(1), 1)
    catalogue = len(tables["general"])
    own = (catalogue + 1 - jnp.arange(1, rows.shape[1] + 1)) / catalogue
    surprise = jnp.maximum(own - tables["general"][at], 0)
    made = {
        "novelty": jnp.where(there, tables["novelty"][at], 0).sum(1) / count,
        "serendipity": jnp.where(found_in(rows, targets), surprise, 0).sum(1) / count,
    }
    if "recent" in tables:
        made["recent"] = jnp.where(there, tables["recent"][at], 0).sum(1) / count
    if "content" in tables:
        vectors = jnp.where(there[..., None], tables["content"][at], 0)
        known = (vectors != 0).any(-1)
        pair = known[:, :, None] & known[:, None, :] & jnp.triu(jnp.ones((rows.shape[1],) * 2, bool), 1)
        alike = jnp.einsum("bid,bjd->bij", vectors, vectors, precision="highest")
        apart = jnp.where(pair, 1 - jnp.clip(alike, 0, 1), 0).sum((1, 2))
        made["diversity"] = apart / jnp.maximum(pair.sum((1, 2)), 1)
    return made


def tally(rows: np.ndarray, catalogue: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each item stands in the lists `rows [U,k]`, int32 `[C]`, and its best rank there (k + 1 = nowhere)."""
    counts = jnp.zeros(catalogue, jnp.int32)
    best = jnp.full(catalogue, rows.shape[1] + 1, jnp.int32)
    for part, size in blocks(len(rows)):
        counts, best = _add(counts, best, lengthened(rows[part], size))
    return np.asarray(counts), np.asarray(best)


@partial(jax.jit, donate_argnums=(0, 1))
def _add(counts: jax.Array, best: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    at = jnp.where(rows >= 0, rows, len(counts))  # out of bounds: dropped
    rank = jnp.broadcast_to(jnp.arange(1, rows.shape[1] + 1), rows.shape)
    return counts.at[at].add(1, mode="drop"), best.at[at].min(rank, mode="drop")


def beyond(rows: np.ndarray, facts: Facts, k: int) -> dict[str, float]:
    """Measures of all lists together, of the first k of each, all in [0, 1].

    - `coverage@k`: share of the catalogue that stands in at least one list; `category_coverage@k` and `type_coverage@k`
      likewise. `gini@k`: of the times each catalogue item is shown. `fill@k`: share of the U x k places with an item.
    """
    top = rows[:, :k]
    shown, _ = tally(top, facts.catalogue)
    made = {
        f"coverage@{k}": float((shown > 0).mean()),
        f"gini@{k}": gini(shown),
        f"fill@{k}": float((top >= 0).sum() / max(len(top) * k, 1)),
    }
    for name, table in (("category", facts.categories), ("type", facts.types)):
        if table is not None:
            reached = sp.csr_array(table[np.flatnonzero(shown)]).indices
            made[f"{name}_coverage@{k}"] = len(np.unique(reached)) / table.shape[1]
    return made


def satisfaction(rows: np.ndarray, targets: Targets, values: np.ndarray, k: int) -> dict[str, Any]:
    """Mean value (a rating, a dwell time) that users themselves gave the targets they were shown in the first k.

    `values [U]`, NaN = none given, which is never read as anything. `satisfaction_coverage@k`: share of the hits with a
    value; `satisfaction_of_targets`: the mean over all targets, what lists by lot would come to. Empty without values.
    """
    hit = hits(rows[:, :k], targets)[0].any(1)
    given = np.isfinite(values)
    if not given.any():
        return {}
    return {
        f"satisfaction@{k}": float(values[hit & given].mean()) if (hit & given).any() else None,
        f"satisfaction_coverage@{k}": float(given[hit].mean()) if hit.any() else 0.0,
        "satisfaction_of_targets": float(values[given].mean()),
    }


def popularity_lift(rows: np.ndarray, histories: Sequence[np.ndarray], facts: Facts) -> float:
    """How much more popular the lists are than what their users had: GAP(lists) / GAP(histories) - 1.

    GAP = mean over users of the mean number of users who had the items (Abdollahpouri et al. 2019); users with an
    empty list or history are left out of both. 0 = as popular as the user's own taste.
    """
    there = rows >= 0
    values, owner = flatten(histories)
    length = np.bincount(owner, minlength=len(rows))
    both = there.any(1) & (length > 0)
    if not both.any():
        return 0.0
    had = facts.users_had.astype(np.float64)
    shown = (np.where(there, had[np.maximum(rows, 0)], 0).sum(1) / np.maximum(there.sum(1), 1))[both].mean()
    own = (np.bincount(owner, had[values], minlength=len(rows)) / np.maximum(length, 1))[both].mean()
    return float(shown / own - 1) if own > 0 else 0.0


def valid_id_rate(rows: np.ndarray, histories: Sequence[np.ndarray], catalogue: int, *, repeat: bool,
                  allowed: np.ndarray | None = None) -> float:  # fmt: skip
    """Share of the returned ids that are in the catalogue, allowed, new to the list, and unseen unless `repeat`.

    Places a system left empty (-1) are not ids and do not count; `fill@k` says how many there are.
    """
    returned = rows != -1
    real = (rows >= 0) & (rows < catalogue)
    good = real & ~repeated(rows)
    if allowed is not None:
        good &= allowed[np.clip(rows, 0, catalogue - 1)]
    if not repeat:
        good &= ~member(np.where(real, rows, -1), histories)
    return float((good & returned).sum() / returned.sum()) if returned.any() else 1.0
