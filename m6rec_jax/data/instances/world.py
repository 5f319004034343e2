"""What instances are made from where a task has no table of its own: items, users, events and what was shown.

Nothing held out may be learnt from the training part: a target of valid or test is no event of a training instance, and
of an item (or user) whose text is held out for a task on items (or users) training instances say no more than its title.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import xxhash

from m6rec_jax.data.catalogue import LEAST_TEXTS
from m6rec_jax.data.events import Events
from m6rec_jax.data.splits import SPLITS, TRAIN

BUCKETS = 50
VALID_BUCKETS, TEST_BUCKETS = (0, 1), (2, 3, 4)  # bucket 0 is what `catalogue.held_out` holds out anyway
ON_ITEMS = ("topic", "title", "description", "summarise", "complete")
ON_USERS = ("interest",)


@dataclass(frozen=True)
class World:
    """The catalogue, the users, the n events by user and time, the split `label` [n] of each, and what was shown.

    `timed`: times are seconds, on one clock for all users. `held`: templates whose items or users are held out.
    """

    items: pl.DataFrame
    users: pl.DataFrame
    events: Events
    label: np.ndarray
    shown: pl.DataFrame | None
    timed: bool
    held: Collection[str] = ()

    @cached_property
    def titles(self) -> list[str]:
        """Titles by catalogue row; of an item without one its first category, or its id."""
        rows = self.items.select("title", "categories", "item_id").iter_rows()
        return [title or (categories or [""])[0] or item for title, categories, item in rows]

    @cached_property
    def categories(self) -> list[list[str]]:
        """Categories by catalogue row."""
        return [list(some or ()) for some in self.items["categories"].to_list()]

    @cached_property
    def said_categories(self) -> list[list[str]]:
        """Categories that behaviour may speak of: none of items that are held out."""
        held = self.item_splits > TRAIN
        return [[] if quiet else some for some, quiet in zip(self.categories, held.tolist(), strict=True)]

    @cached_property
    def attributes(self) -> list[str]:
        """What is known of each item beside: "brand: x; price about 10"."""
        columns = [c for c in ("attributes", "numbers") if c in self.items.columns]
        joined = self.items.select(pl.concat_str([pl.col(c).list.join("; ").replace("", None) for c in columns], separator="; ", ignore_nulls=True).alias("x"))  # fmt: skip
        return [one or "" for one in joined["x"].to_list()]

    @cached_property
    def descriptions(self) -> list[str]:
        """Running texts by catalogue row."""
        return [text or "" for text in self.items["text"].to_list()]

    @cached_property
    def who(self) -> list[str]:
        """What is known of each user, in words."""
        return [", ".join(some or ()) for some in self.users["attributes"].to_list()]

    @cached_property
    def starts(self) -> np.ndarray:
        """[users + 1]: where each user's events begin."""
        return np.searchsorted(self.events.users, np.arange(self.users.height + 1))

    @cached_property
    def train_counts(self) -> np.ndarray:
        """[C]: training events of each item."""
        train = (self.label == TRAIN) & (self.events.items >= 0)
        return np.bincount(self.events.items[train], minlength=self.items.height)

    @cached_property
    def values(self) -> np.ndarray:
        """[n]: what each event was worth (a rating); NaN where nothing says."""
        return self.events.values.cast(pl.Float64).fill_null(float("nan")).to_numpy()

    @cached_property
    def item_splits(self) -> np.ndarray:
        """[C] number of the split of each item in tasks on items; all train where there is no such task."""
        if not set(self.held) & set(ON_ITEMS) or self.items.height < LEAST_TEXTS:
            return np.zeros(self.items.height, np.uint8)
        return splits_by_hash(self.items["item_id"].to_list())

    @cached_property
    def user_splits(self) -> np.ndarray:
        """[users] the same of users in tasks on users."""
        if not set(self.held) & set(ON_USERS) or self.users.height < LEAST_TEXTS:
            return np.zeros(self.users.height, np.uint8)
        return splits_by_hash(self.users["user_id"].to_list())


def splits_by_hash(keys: list[str]) -> np.ndarray:
    """[n] number of the split of each key: of fifty hashes two are valid, three test."""
    places = np.fromiter((xxhash.xxh3_64_intdigest(key.encode()) % BUCKETS for key in keys), np.int64, len(keys))
    return (np.isin(places, VALID_BUCKETS) + 2 * np.isin(places, TEST_BUCKETS)).astype(np.uint8)


def split_names(numbers: np.ndarray) -> pl.Series:
    """Names of splits by number."""
    return pl.Series([SPLITS[i] for i in numbers.tolist()], dtype=pl.String)


def sampled(chosen: np.ndarray, splits: np.ndarray, most: int, seed: int = 0) -> np.ndarray:
    """Places among the `chosen`, in order: of each split at most `most`, drawn evenly."""
    kept = []
    for number in range(len(SPLITS)):
        mine = chosen[splits[chosen] == number]
        if len(mine) > most:
            mine = np.random.default_rng([seed, number]).choice(mine, most, replace=False)
        kept.append(mine)
    return np.sort(np.concatenate(kept)).astype(np.int64)
