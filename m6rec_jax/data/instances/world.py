"""What instances are made from where a task has no table of its own: items, users, events and what was shown."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from m6rec_jax.data.events import Events
from m6rec_jax.data.splits import TRAIN


@dataclass(frozen=True)
class World:
    """The catalogue, the users, the n events by user and time, the split `label` [n] of each, and what was shown.

    `timed`: times are seconds, on one clock for all users.
    """

    items: pl.DataFrame
    users: pl.DataFrame
    events: Events
    label: np.ndarray
    shown: pl.DataFrame | None
    timed: bool

    @cached_property
    def titles(self) -> list[str]:
        """Titles by catalogue row; the first category, or the id, of an item without one."""
        rows = self.items.select("title", "categories", "item_id").iter_rows()
        return [title or (categories or [""])[0] or item for title, categories, item in rows]

    @cached_property
    def starts(self) -> np.ndarray:
        """[users + 1]: where each user's events begin."""
        return np.searchsorted(self.events.users, np.arange(self.users.height + 1))

    @cached_property
    def categories(self) -> list[list[str]]:
        """Categories by catalogue row."""
        return [list(some or ()) for some in self.items["categories"].to_list()]

    @cached_property
    def train_counts(self) -> np.ndarray:
        """[C]: training events of each item."""
        train = (self.label == TRAIN) & (self.events.items >= 0)
        return np.bincount(self.events.items[train], minlength=self.items.height)
