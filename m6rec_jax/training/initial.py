"""Parameters from another run: text weights as they are, items matched by id (DESIGN section 9)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

from m6rec_jax.artifacts.checkpoints import load_params
from m6rec_jax.artifacts.manifest import file_digest
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.progress import note


def from_run(run: Path, dataset: Dataset, blueprint: Blueprint, fresh: Any) -> Any:
    """`fresh` parameters with everything that run `run` can lend: layers, text table, rows of items both know.

    Raises InputError when the tokenizers or the layers differ.
    """
    lender = read_run(run)
    if lender.tokenizer != file_digest(dataset.path / "tokenizer.model"):
        raise InputError(f"--init-from {run}: another tokenizer than {dataset.path}'s; prepare the dataset with --like {run}")  # fmt: skip
    for name in ("layers", "width", "heads", "n_kv", "ffn_width", "content"):
        old, new = getattr(lender.config.model, name), getattr(blueprint.config, name)
        if old != new:
            raise InputError(
                f"--init-from {run}: its model.{name} is {old}, this configuration's {new}; make them equal"
            )
    old_blueprint = Blueprint(lender.config.model, lender.vocab, lender.content_width)
    step, old = load_params(run, "best", old_blueprint.shapes())
    old, new = jax.device_get(old), on_host(fresh)

    tables = {"text": old["embeddings"]["tables"]["text"]}
    matched = 0
    for old_level, level in zip(lender.vocab.levels, blueprint.vocab.levels, strict=False):
        table = np.array(new["embeddings"]["tables"][level.name])
        old_table = old["embeddings"]["tables"][old_level.name]
        if len(blueprint.vocab.levels) == len(lender.vocab.levels) == 1:
            rows, old_rows = _shared_items(run, dataset)
            table[rows], matched = old_table[old_rows], len(rows)
        elif (old_level.size, len(lender.vocab.levels)) == (level.size, len(blueprint.vocab.levels)):
            table = old_table
        tables[level.name] = table
    embeddings = {**new["embeddings"], "tables": {**new["embeddings"]["tables"], **tables}}
    if blueprint.config.content and lender.content_width == blueprint.content_width:
        embeddings["content"] = old["embeddings"]["content"]
    lent = {**old, "embeddings": embeddings}
    note(
        f"--init-from {run}: step {step}; layers and text as they are, {matched:,} of {dataset.catalogue:,} items by id"
    )
    return jax.tree.map(lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding), lent, fresh)


def on_host(params: Any) -> Any:
    """Whole parameters as NumPy arrays on every process."""
    if jax.process_count() == 1:
        return jax.device_get(params)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(params, tiled=True)


def _shared_items(run: Path, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Catalogue rows, here and in the run, of the items that both know."""
    theirs = pl.read_parquet(run / "items.parquet", columns=["item_id"]).with_row_index("old")
    both = dataset.items.select("item_id").with_row_index("new").join(theirs, on="item_id")
    return both["new"].to_numpy(), both["old"].to_numpy()
