"""Cleaned events as arrays: what splitting, counting and writing records work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from m6rec_jax.data.card import Card
from m6rec_jax.data.sources import Tables
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import N_KINDS

NO_STRINGS = pl.lit([], dtype=pl.List(pl.String))


@dataclass(frozen=True)
class Events:
    """n events by user, then time: rows of user and item (-1 = a query), times in whole seconds and what
    the source says beyond them, kind numbers and their names."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    fractions: pl.Series
    kinds: np.ndarray
    values: pl.Series
    texts: pl.Series
    kind_names: list[str]
    kind_weights: list[float]

    @property
    def weights(self) -> np.ndarray:
        """[n] float32: weight of each event as a target."""
        return np.array(self.kind_weights or [1.0], np.float32)[self.kinds]

    @property
    def is_target(self) -> np.ndarray:
        """[n] bool: may be predicted; the others (queries, kinds of weight 0) are input only."""
        return (self.items >= 0) & (self.weights > 0)

    def table(self, label: np.ndarray) -> pl.DataFrame:
        """The events of events.parquet: rows, times, kinds, values, texts and the split of each (0 train, 1, 2)."""
        return pl.DataFrame(
            {
                "user": self.users,
                "item": self.items,
                "time": self.times,
                "fraction": self.fractions,
                "kind": self.kinds,
                "value": self.values,
                "text": self.texts,
                "split": label,
            }
        )


def event_arrays(
    events: pl.DataFrame, user_ids: pl.Series, item_ids: pl.Series, card: Card, kinds_before: Sequence[str] = ()
) -> Events:
    """Cleaned events (sorted by user and time) as arrays; kinds keep the numbers that they had in `kinds_before`."""
    names = kind_names(events["kind"], card, kinds_before)
    kinds = np.zeros(events.height, np.uint8)
    if names:
        kinds = events["kind"].fill_null("").replace_strict(names, range(len(names)), return_dtype=pl.UInt8).to_numpy()
    return Events(
        users=rows_of(events["user_id"], user_ids),
        items=rows_of(events["item_id"], item_ids),
        times=events["time"].to_numpy(),
        fractions=events["fraction"],
        kinds=kinds,
        values=events["value"],
        texts=events["text"],
        kind_names=names,
        kind_weights=[float(card.kinds.get(name, 1.0)) for name in names],
    )


def kind_names(kinds: pl.Series, card: Card, kinds_before: Sequence[str] = ()) -> list[str]:
    """Names of kinds by number: those of before, then those the card lists, else those of `kinds` in their order.

    Raises InputError when there are more than `N_KINDS`.
    """
    # `kinds:` without a column of kinds says nothing of these events: a kind token before each would mean nothing.
    listed = list(card.kinds) if card.events.kind else []
    found = listed or kinds.drop_nulls().unique().sort().to_list()
    if kinds.null_count() and (found or kinds_before):
        found = ["", *found]  # the kind of events that do not say theirs
    names = list(dict.fromkeys([*kinds_before, *found]))
    if len(names) > N_KINDS:
        raise InputError(f"{card.origin}: events.kind: {len(names)} kinds with those there before, at most {N_KINDS} are possible; merge some under `kinds:`")  # fmt: skip
    return names


def user_table(tables: Tables) -> pl.DataFrame:
    """`user_id, attributes`: users in the order of their first event, then those known from the users table alone."""
    users = tables.events.select(pl.col("user_id").unique(maintain_order=True))
    if tables.users is None:
        return users.with_columns(attributes=NO_STRINGS)
    known = tables.users.select("user_id", "attributes")
    silent = known.filter(~pl.col("user_id").is_in(users["user_id"].implode())).select("user_id")
    joined = pl.concat([users, silent]).join(known, on="user_id", how="left", maintain_order="left")
    return joined.with_columns(pl.col("attributes").fill_null(NO_STRINGS))


def rows_of(ids: pl.Series, known: pl.Series) -> np.ndarray:
    """Place of each id in `known` `[n]` int32; -1 for null or unknown."""
    index = known.to_frame("id").with_row_index("row")
    found = ids.to_frame("id").join(index, on="id", how="left", maintain_order="left")
    return found["row"].cast(pl.Int32).fill_null(-1).to_numpy()
