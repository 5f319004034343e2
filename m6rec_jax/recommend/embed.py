"""Vectors of users and items out of a run, as Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from m6rec_jax.data.dataset import Dataset
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.blocks import BLOCK, vectors_column, write_blocks
from m6rec_jax.recommend.evaluate import dataset_of
from m6rec_jax.recommend.histories import Past
from m6rec_jax.recommend.recommender import Recommender

WHAT = ("users", "items")


def embed(run: Path | str, what: str, out: Path | str, dataset: Dataset | Path | str | None = None, *, step: int | str = "best") -> int:  # fmt: skip
    """Write `user_id, vector` or `item_id, vector` (float32 lists of the model's width) to `out`; returns how many.

    A user's vector is the state after all of the user's events. An item's is its row of the output table (id and
    content part) where a code is an item, so that user . item is the model's logit; with several code levels it is the
    mean of what the model reads at its codes, content included, and near items are alike. `users` are those with events,
    in the dataset's order. Raises InputError when `what` is neither, or the run has no checkpoint yet.
    """
    if what not in WHAT:
        raise InputError(f"embed {what}: choose users or items")
    data = dataset_of(run, dataset)
    engine = Recommender.load(run, step, data, engine="model").engine
    if engine is None:
        raise InputError(f"{run}: no usable checkpoint in this run; finish training")
    if what == "items":
        rows = np.arange(data.catalogue)

        def of_items() -> Iterator[pl.DataFrame]:
            for at in (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)):
                yield _table("item_id", data.items["item_id"].gather(at), engine.item_vectors(at))

        return write_blocks(out, of_items(), len(rows), what)
    known = Past(data)

    def of_users() -> Iterator[pl.DataFrame]:
        for start in range(0, len(known), BLOCK):
            some = known.take(range(start, min(start + BLOCK, len(known))))
            states = engine.states(some.items, times=some.times, kinds=some.kinds, queries=some.queries)
            yield _table("user_id", data.users["user_id"].gather(some.users), states)

    return write_blocks(out, of_users(), len(known), what)


def _table(name: str, ids: pl.Series, vectors: np.ndarray) -> pl.DataFrame:
    return pl.DataFrame({name: ids, "vector": vectors_column("vector", vectors)})
