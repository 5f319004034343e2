"""Counts of training rows as numbers for trees and as words for models that read (M6-Rec verbalises statistics)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FOLDS = 5
AMOUNTS = ("hardly any", "few", "half", "most", "nearly all")
KNOWN = ((0, "by nobody"), (3, "by few"), (10, "by some"), (30, "by many"))


def fold_counts(
    users: np.ndarray, items: np.ndarray, liked: np.ndarray, asked_users: np.ndarray, asked_items: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(likes, ratings) [n] of each asked item by users of other folds than the asking user's: no count holds the answer
    that it is to predict. A user of -1 is in no fold. All ids are whole numbers from 0 on."""
    size = int(max(items.max(initial=0), asked_items.max(initial=0))) + 1
    likes, ratings = np.zeros((FOLDS + 1, size)), np.zeros((FOLDS + 1, size))
    fold = users % FOLDS
    np.add.at(ratings, (fold, items), 1)
    np.add.at(likes, (fold, items), liked)
    whole = [table.sum(0) for table in (likes, ratings)]
    asked = np.where(asked_users >= 0, asked_users % FOLDS, FOLDS)
    return tuple(total[asked_items] - table[asked, asked_items] for total, table in zip(whole, (likes, ratings), strict=True))  # fmt: skip


def smoothed(likes: np.ndarray, ratings: np.ndarray, prior: float, weight: float = 2.0) -> np.ndarray:
    """Shares of likes, drawn to `prior` where there are few ratings."""
    return (likes + weight * prior) / (ratings + weight)


def in_words(share: float) -> str:
    """A share, roughly and in steps of five percent: few words, each often enough to be learnt, and the rough ones even in
    few rows."""
    return f"{AMOUNTS[min(int(share * len(AMOUNTS)), len(AMOUNTS) - 1)]}, {5 * round(20 * share)}%"


def known_by(ratings: float) -> str:
    """How many rated an item, in words."""
    return next(words for least, words in reversed(KNOWN) if ratings >= least)


def habit(likes: int, ratings: int) -> str:
    """What share of what they rated a user likes, as far as so many ratings say."""
    return f"Likes {in_words((likes + 1) / (ratings + 2))}" if ratings else ""


def opinion(rate: Sequence[float], ratings: Sequence[float]) -> list[str]:
    """What others think of each item."""
    return [
        f"Known {known_by(n)}" + (f", liked by {in_words(r)}" if n else "") for r, n in zip(rate, ratings, strict=True)
    ]
