"""The benchmark of remat: its smallest form runs, and what it measures is what remat is for."""

from typing import get_args

from benchmarks.remat import SMALLEST, of_dtype
from m6rec_jax.config.model import Remat


def test_full_needs_less_temporary_memory_than_none_and_dots_no_more():
    rows = {row["remat"]: row for row in of_dtype("float32", 1, SMALLEST)}
    assert set(rows) == set(get_args(Remat))
    temporary = {remat: row["temporary_mib"] for remat, row in rows.items()}
    assert temporary["full"] < 0.8 * temporary["none"] and temporary["dots"] <= temporary["none"]
    assert set(rows["full"]) == {"dtype", "remat", "temporary_mib", "steps", "processor_seconds", "seconds"}
    assert all(row["processor_seconds"] > 0 and row["seconds"] > 0 for row in rows.values())
