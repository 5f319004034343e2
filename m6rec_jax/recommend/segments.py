"""Popularity for who has no history: what was taken lately by everybody, and by users of the same attributes.

Everything is counted on training events. An event counts half for every half-life of its age; the half-life is the
median age, so that it suits a day of news as it suits ten years of reviews, and is nobody's setting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl
import scipy.sparse as sp

from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.splits import TRAIN
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.baselines import Histories, Popularity, listed_of, poured

SHRINK = 100.0  # events' worth of everybody's taste that stand beside those of a segment


def freshness(users: np.ndarray, times: np.ndarray, timed: bool) -> np.ndarray:
    """Weights `[n]` of events sorted by user and time: 0.5 ** (age / median age), 1 for the latest.

    The age of an event is the time from it to the last one of all; where times only tell an order (`timed` false),
    how many events of the same user came after it. All 1 where more than half of the events are the latest.
    """
    if not len(times):
        return np.zeros(0)
    if timed:
        age = (times.max() - times).astype(np.float64)
    else:
        age = (np.searchsorted(users, users, side="right") - 1 - np.arange(len(users))).astype(np.float64)
    half = np.median(age)
    return 0.5 ** (age / half) if half > 0 else np.ones(len(age))


class Segments:
    """Popularity within the segment of a user, backed off to all.

    With n_a(i) the weights of item i's events by users who have attribute value a, N_a their sum over items, and p(i)
    the share of i among everybody's, (n_i + 1) / sum_j (n_j + 1):

        p(i | a) = (n_a(i) + SHRINK p(i)) / (N_a + SHRINK);  p(i | user) = mean over the user's values of p(i | a)

    A value nobody in training has leaves p(i). `counts` CSR `[A, C]`; `popularity` counts by the same weights.
    """

    def __init__(self, names: Sequence[str], counts: sp.csr_array, popularity: Popularity) -> None:
        self.names = {name: row for row, name in enumerate(names)}
        self.counts, self.popularity = counts, popularity
        self.totals: np.ndarray = np.asarray(counts.sum(axis=1)).ravel()

    @classmethod
    def of(cls, attributes: Sequence[Sequence[str]], users: np.ndarray, items: np.ndarray, weights: np.ndarray,
           popularity: Popularity) -> Segments:  # fmt: skip
        """Count events `users [n]`, `items [n]`, `weights [n]`; `attributes[u]` are the values of user row u."""
        names = sorted({value for values in attributes for value in values})
        at = {name: row for row, name in enumerate(names)}
        has = [(at[value], user) for user, values in enumerate(attributes) for value in dict.fromkeys(values)]
        value, owner = np.array(has, np.int64).reshape(-1, 2).T
        member = sp.csr_array((np.ones(len(has)), (value, owner)), (len(names), len(attributes)))
        taken = sp.csr_array((weights, (users, items)), (len(attributes), len(popularity.events)))
        return cls(names, sp.csr_array(member @ taken), popularity)

    def known(self, values: Iterable[str]) -> tuple[int, ...]:
        """Rows of the values that somebody in training has, in order."""
        return tuple(sorted({self.names[value] for value in values if value in self.names}))

    def order(
        self, values: tuple[int, ...], most: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(catalogue rows, log p(i | user)) of the `most` best allowed items, best first; ties by the lower row."""
        ranked = self.popularity.order if allowed is None else self.popularity.order[allowed[self.popularity.order]]
        if not values:
            return ranked[:most], self.popularity.share[ranked[:most]]
        scale = 1 / ((self.totals[list(values)] + SHRINK) * len(values))
        picked = sp.csr_array((scale, (np.zeros(len(values), np.int64), values)), (1, len(self.names)))
        here = sp.csr_array(picked @ self.counts)
        shown = np.ones(len(here.indices), bool) if allowed is None else allowed[here.indices]
        if (listed := self.popularity.listed) is not None:
            shown = shown & listed[here.indices]
        # Beyond what the segment took, its order is everybody's: no more than `most` of those can be in the list.
        rest = ranked[: most + len(here.indices)]
        rest = rest[~np.isin(rest, here.indices)]
        rows = np.concatenate([here.indices[shown], rest]).astype(np.int32)
        own = np.concatenate([here.data[shown], np.zeros(len(rest))])
        logp = np.log(own + SHRINK * scale.sum() * np.exp(self.popularity.share[rows]))
        best = np.lexsort((rows, -logp))[:most]
        return rows[best], logp[best]

    def fill(self, rows: np.ndarray, histories: Histories, attributes: Sequence[Sequence[str]], repeat: bool = False,
             allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """`rows [U,k]` with its -1 places taken by each user's best items not there yet, and their log p `[U,k]`."""
        filled, logp = rows.copy(), np.zeros(rows.shape)
        groups: dict[tuple[int, ...], list[int]] = {}
        for user, values in enumerate(attributes):
            groups.setdefault(self.known(values), []).append(user)
        for values, users in groups.items():
            had = [histories[u] for u in users]
            order, scores = self.order(values, 2 * rows.shape[1] + max(map(len, had)), allowed)
            filled[users] = poured(order, rows[users], had, repeat)
            there, by_row = filled[users], np.argsort(order)
            at = by_row[np.minimum(np.searchsorted(order, there, sorter=by_row), max(len(order) - 1, 0))] if len(order) else there  # fmt: skip
            fresh = (rows[users] < 0) & (there >= 0)
            logp[users] = np.where(fresh, scores[at], 0) if len(order) else 0
        return filled, logp


def open_segments(dataset: Dataset) -> Segments:
    """Recent popularity, of all and by attribute, of a dataset's training events."""
    path = dataset.path / "events.parquet"
    try:
        events = pl.scan_parquet(path).filter((pl.col("split") == TRAIN) & (pl.col("item") >= 0)).select("user", "item", "time").collect()  # fmt: skip
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not readable ({reason}); prepare the dataset again") from None
    users, items, times = (events[name].to_numpy() for name in ("user", "item", "time"))
    weights = freshness(users, times, dataset.timed)
    counts = np.bincount(items, weights, minlength=dataset.catalogue)
    popularity = Popularity(counts, listed_of(dataset.items))
    return Segments.of(dataset.users["attributes"].to_list(), users, items, weights, popularity)
