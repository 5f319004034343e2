"""A table of any length as one Parquet file, written block by block and seen whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl

from m6rec_jax.artifacts.atomic import atomic_path, remove
from m6rec_jax.errors import InputError
from m6rec_jax.progress import stage

BLOCK = 4096  # rows made at once


def write_blocks(out: Path | str, blocks: Iterable[pl.DataFrame], total: int, unit: str) -> int:
    """Write the blocks (at least one, of one schema) in their order to `out`; returns how many rows.

    No more than one block is held at a time. Raises InputError when `out` is a folder.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out}: is a folder; name the Parquet file to write")
    parts = out.with_name(f"{out.name}.parts")
    rows = 0
    try:
        with atomic_path(parts) as folder, stage(out.name, total, unit) as bar:
            folder.mkdir()
            for number, block in enumerate(blocks):
                block.write_parquet(folder / f"{number:06}.parquet")
                rows += block.height
                bar.advance(block.height)
        with atomic_path(out) as whole:
            pl.scan_parquet(sorted(parts.glob("*.parquet"))).sink_parquet(whole, maintain_order=True)
    finally:
        remove(parts)
    return rows


def vectors_column(name: str, vectors: np.ndarray) -> pl.Series:
    """Rows of a matrix `[n, D]` as a column of float32 lists."""
    kind = pl.Array(pl.Float32, vectors.shape[1])
    return pl.Series(name, np.ascontiguousarray(vectors, np.float32), dtype=kind).cast(pl.List(pl.Float32))
