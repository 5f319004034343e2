"""Measures of ranked lists, and intervals and tests over users.

Conventions (EVALUATION.md). A list is a row of `rows [U,k]`: catalogue rows, best first, -1 where the system returned
nothing. Rank is the position in that list, counted from 1; a target outside it scores 0. An item that stands in a list
twice counts once, at its first place. Every mean is over all users, those with an empty list included. Targets are one
catalogue row a user `[U]`, or one array a user when several items count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from m6rec_jax.data.inequality import gini

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


def per_user(rows: np.ndarray, targets: Targets, ks: Iterable[int] = (5, 10)) -> dict[str, np.ndarray]:
    """Accuracy of each user's list: `{name@k: float64 [U]}` for every k in `ks`.

    - `ndcg@k`: sum over hits of 1/log2(rank+1), divided by the same sum for the best possible list of
      min(k, targets) hits; with one target that is 1/log2(rank+1).
    - `recall@k`: share of the user's targets that are in the first k; with one target it equals the hit rate.
    - `precision@k`: hits in the first k divided by k, also when the list is shorter. `accuracy@k` is the same number.
    - `mrr@k`: 1/rank of the first hit, 0 when it lies beyond k.
    """
    found, wanted = hits(rows, targets)
    made: dict[str, np.ndarray] = {}
    for k in ks:
        top = found[:, :k].astype(np.float64)
        discount = 1 / np.log2(np.arange(2, k + 2))
        ideal = np.concatenate([[0], np.cumsum(discount)])[np.minimum(wanted, k)]
        count = top.sum(1)
        made[f"ndcg@{k}"] = np.divide(top @ discount[: top.shape[1]], ideal, out=np.zeros(len(rows)), where=ideal > 0)
        made[f"recall@{k}"] = count / np.maximum(wanted, 1)
        made[f"precision@{k}"] = made[f"accuracy@{k}"] = count / k
        made[f"mrr@{k}"] = np.where(top.any(1), 1 / (top.argmax(1) + 1), 0.0) if top.shape[1] else np.zeros(len(rows))
    return made


@dataclass(frozen=True)
class Facts:
    """What the measures beyond accuracy know about the catalogue, from training events only.

    `users_had [C]`: users with the item in training; `users`: users in training; `categories`: bool CSR `[C,K]` or None.
    """

    users_had: np.ndarray
    users: int
    categories: sp.csr_matrix | None = None

    @property
    def catalogue(self) -> int:
        return len(self.users_had)


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


def novelty(rows: np.ndarray, facts: Facts) -> np.ndarray:
    """Mean inverse user frequency of each list `[U]` in [0, 1]: mean of -log2(users who had the item / users), divided
    by log2(users).

    0 = everybody had the item, 1 = one user had it. An item nobody had counts as if one user had it (RecTools' MIUF,
    the same in bits, does so too). An empty list scores 0.
    """
    bits = -np.log2(np.maximum(facts.users_had, 1) / max(facts.users, 1))
    share = bits / np.log2(max(facts.users, 2))
    there = rows >= 0
    return np.where(there, share[np.maximum(rows, 0)], 0).sum(1) / np.maximum(there.sum(1), 1)


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


def beyond(rows: np.ndarray, facts: Facts, k: int) -> dict[str, float]:
    """Measures beyond accuracy of the first k of each list, all in [0, 1].

    - `coverage@k`: share of the catalogue that stands in at least one list; `category_coverage@k` likewise.
    - `gini@k`: of the times each catalogue item is shown. `novelty@k`: see there.
    - `fill@k`: share of the U x k places that hold an item.
    """
    top = rows[:, :k]
    shown = np.bincount(top[top >= 0], minlength=facts.catalogue)
    made = {
        f"coverage@{k}": float((shown > 0).mean()),
        f"gini@{k}": gini(shown),
        f"novelty@{k}": float(novelty(top, facts).mean()) if len(top) else 0.0,
        f"fill@{k}": float((top >= 0).sum() / max(len(top) * k, 1)),
    }
    if facts.categories is not None:
        reached = sp.csr_array(facts.categories[np.flatnonzero(shown)]).indices
        made[f"category_coverage@{k}"] = len(np.unique(reached)) / facts.categories.shape[1]
    return made


def bootstrap_ci(vectors: dict[str, np.ndarray], *, seed: int = 0, draws: int = 1000) -> dict[str, tuple[float, float]]:
    """95 % interval of the mean of each per-user vector `[U]`, by resampling users.

    Poisson bootstrap: each user is drawn Poisson(1) times, so one matrix product serves all vectors, and the same
    seed draws the same users for every system. Memory: 2^22 draws at a time.
    """
    if not vectors:
        return {}
    values = np.stack(list(vectors.values()), 1)
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
    difference = (a - b)[a != b]  # equal users add nothing under any flip
    if not len(difference):
        return 1.0
    seen = abs(difference.sum()) * (1 - 1e-9)  # a flip equal to what was seen counts, rounding or not
    rng, far = np.random.default_rng(seed), 0
    step = max(1, (1 << 24) // len(difference))
    for start in range(0, draws, step):
        signs = rng.integers(0, 2, (min(step, draws - start), len(difference)), np.int8) * 2.0 - 1.0
        far += int((np.abs(signs @ difference) >= seen).sum())
    return (1 + far) / (1 + draws)
