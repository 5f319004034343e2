"""What a dataset tells the measures beyond accuracy: its kinds of item, its newest items, what users said of theirs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
import scipy.sparse as sp

from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.splits import SPLITS, TRAIN
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.histories import Histories
from m6rec_jax.recommend.metrics import Facts, category_matrix

NEWEST = 0.1


def facts_of(dataset: Dataset, count: sp.csr_matrix) -> tuple[Facts, dict[str, Any] | None]:
    """The facts of a dataset whose training events are `count [users, C]`, and what `recent` means there in words.

    Recent are the items dated in the last tenth: by `published` where the item has it, else by its first training
    event; items with neither are the newest of all. None where a dataset has no times.
    """
    items, recent, said = dataset.items, None, None
    published = items["published"] if "published" in items.columns else pl.Series([None] * items.height, dtype=pl.Int64)
    if dataset.timed or published.null_count() < items.height:
        events = _events(dataset).filter((pl.col("split") == TRAIN) & (pl.col("item") >= 0))
        first = np.full(dataset.catalogue, np.inf)
        if dataset.timed:
            np.minimum.at(first, events["item"].to_numpy(), events["time"].to_numpy().astype(np.float64))
        dates = np.where(published.is_null().to_numpy(), first, published.fill_null(0).to_numpy())
        dated = np.isfinite(dates)
        since = float(np.quantile(dates[dated], 1 - NEWEST, method="higher")) if dated.any() else np.inf
        recent = dates >= since
        said = {
            "since": datetime.fromtimestamp(since, UTC).date().isoformat() if np.isfinite(since) else None,
            "share_of_catalogue": float(recent.mean()),
            "dated_by": "published, else the first training event" if published.null_count() < items.height else "the first training event",
        }  # fmt: skip
    facts = Facts(
        users_had=np.bincount(count.indices, minlength=dataset.catalogue),
        users=int((np.diff(count.indptr) > 0).sum()),
        categories=category_matrix(items["categories"].to_list()) if "categories" in items.columns else None,
        types=category_matrix([[t] if t else None for t in items["type"].to_list()]) if "type" in items.columns else None,
        content=dataset.content if dataset.content.any() else None,
        recent=recent,
    )  # fmt: skip
    return facts, said


def target_values(dataset: Dataset, asked: Histories, split: str) -> np.ndarray:
    """What each user gave the target event itself (its `value`: a rating, a dwell time) `[U]`; NaN = nothing said."""
    held = _events(dataset).filter((pl.col("split") == SPLITS.index(split)) & pl.col("value").is_not_null())
    wanted = pl.DataFrame({"user": asked.users, "item": asked.targets, "time": asked.target_times}).cast(pl.Int64)
    keys = ["user", "item", "time"]
    given = held.select(*(pl.col(key).cast(pl.Int64) for key in keys), "value").unique(keys, keep="first", maintain_order=True)  # fmt: skip
    found = wanted.join(given, on=keys, how="left", maintain_order="left")["value"]
    return found.cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _events(dataset: Dataset) -> pl.DataFrame:
    path = dataset.path / "events.parquet"
    try:
        return pl.read_parquet(path, columns=["user", "item", "time", "value", "split"])
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{path}: not readable ({' '.join(str(error).split())}); prepare the dataset again") from None
