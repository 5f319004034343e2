"""Calibrated diversity: lists whose topics are as mixed as their user's (Steck 2018, "Calibrated recommendations")."""

from __future__ import annotations

import numpy as np

SMOOTHING = 0.01  # alpha of Steck 2018: a topic that a list lacks costs much, not everything
BATCH = 256


def calibrated(rows: np.ndarray, scores: np.ndarray, item_topics: np.ndarray, user_topics: np.ndarray, lam: float,
               k: int | None = None) -> np.ndarray:  # fmt: skip
    """The k best of each list `rows [U,n]` (-1 = none, at the end) in a new order: int32 `[U,k]`.

    Chosen one by one to raise (1 - lam) x mean of exp(score - best score) - lam x KL(p || q): p = `user_topics [U,K]`,
    q = the mean of the chosen items' topics (`item_topics [C,K]`), smoothed by 0.01 p. Equal gains go to the earlier
    place. Where this greedy way ends below the first k as they were, these stay. `lam` 0 sorts by score, 1 looks at
    topics alone. A user without topics keeps the order of scores.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam={lam}: must be between 0 and 1")
    k = rows.shape[1] if k is None else min(k, rows.shape[1])
    parts = [
        _chosen(rows[at], scores[at], item_topics, user_topics[at], lam, k)
        for at in (slice(start, start + BATCH) for start in range(0, len(rows), BATCH))
    ]
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros((0, k), np.int32)


def divergence(rows: np.ndarray, item_topics: np.ndarray, user_topics: np.ndarray) -> np.ndarray:
    """KL(p || q) of lists `rows [U,k]` (-1 = none): float64 `[U]`; 0 for a user without topics."""
    topics = np.where((rows >= 0)[..., None], item_topics[np.maximum(rows, 0)], 0).astype(np.float64)
    return _kl(user_topics.astype(np.float64), topics.sum(1))


def _kl(p: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """KL of p `[U,K]` and the topics of a list, given as sums over its items `[U,...,K]`; q sums to 1 like p."""
    total = sums.sum(-1, keepdims=True)
    q = np.divide(sums, total, out=np.zeros_like(sums), where=total > 0)
    p = p.reshape(len(p), *(1,) * (sums.ndim - 2), p.shape[-1])
    q = (1 - SMOOTHING) * q + SMOOTHING * p
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), 0).sum(-1)


def _chosen(rows: np.ndarray, scores: np.ndarray, item_topics: np.ndarray, user_topics: np.ndarray, lam: float, k: int) -> np.ndarray:  # fmt: skip
    users = len(rows)
    order = np.argsort(np.where(rows >= 0, -scores, np.inf), axis=1, kind="stable")
    rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
    there = rows >= 0
    best_score = np.where(there[:, :1], scores[:, :1], 0)
    worth = np.where(there, np.exp(np.where(there, scores, 0).astype(np.float64) - best_score), 0)
    topics = np.where(there[..., None], item_topics[np.maximum(rows, 0)], 0).astype(np.float64)
    p, every = user_topics.astype(np.float64), np.arange(users)
    free, sums, gained = there.copy(), np.zeros(p.shape), np.zeros(users)
    places = np.full((users, k), -1)
    for step in range(k):
        objective = (1 - lam) * (gained[:, None] + worth) / (step + 1) - lam * _kl(p, sums[:, None] + topics)
        best = np.argmax(np.where(free, objective, -np.inf), axis=1)
        some = free[every, best]
        places[some, step] = best[some]
        free[every, best] = False
        sums[some] += topics[every, best][some]
        gained[some] += worth[every, best][some]
    first = np.where(there[:, :k], np.arange(k), -1)
    better = _objective(places, worth, topics, p, lam) >= _objective(first, worth, topics, p, lam)
    places = np.where(better[:, None], places, first)
    return np.where(places >= 0, np.take_along_axis(rows, np.maximum(places, 0), 1), -1)


def _objective(places: np.ndarray, worth: np.ndarray, topics: np.ndarray, p: np.ndarray, lam: float) -> np.ndarray:
    there, at = places >= 0, np.maximum(places, 0)
    count = np.maximum(there.sum(1), 1)
    sums = np.where(there[..., None], np.take_along_axis(topics, at[..., None], 1), 0).sum(1)
    return (1 - lam) * np.where(there, np.take_along_axis(worth, at, 1), 0).sum(1) / count - lam * _kl(p, sums)
