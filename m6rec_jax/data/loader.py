"""Batches for a process: plan rows built from records by Grain's reader threads."""

from __future__ import annotations

from collections.abc import Iterator

import grain
import numpy as np

from m6rec_jax.data.examples import Sequence
from m6rec_jax.data.packing import pack_row
from m6rec_jax.data.plan import Entries, Plan, Pool
from m6rec_jax.data.records import RecordReader
from m6rec_jax.data.tasks import Piece


def build_row(plan: Plan, records: RecordReader, entries: Entries, pools: list[Pool]) -> dict[str, np.ndarray]:
    """The packed arrays `[T]` of one row's entries, drawn from `pools`: a pure function of (seed, entries)."""
    sequences: list[tuple[Sequence, int]] = []
    for i, record in enumerate(records.take(entries.record)):
        task = int(entries.task[i])
        pool = pools[task]
        rng = np.random.default_rng([plan.seed, 4, int(entries.number[i])])
        piece = Piece(pool.stretch, int(entries.start[i]), float(entries.draw[i]))
        example = pool.task.build(record, piece, pool.facts)
        sequences.append((pool.shift.moved(pool.objective.arrange(example, rng, plan.config.mask_rate)), task))
    return pack_row(sequences, plan.config.length)


class PlanRows(grain.sources.RandomAccessDataSource):
    """Rows of the plan that one process reads: element j is its j-th row from `first` on.

    A global batch of `rows` rows is dealt in runs: process p takes rows `p * rows / processes ...` of each batch.
    """

    def __init__(self, plan: Plan, records: RecordReader, first: int, batches: int, rows: int, process: int, processes: int):  # fmt: skip
        self.plan, self.records, self.first, self.rows = plan, records, first, rows
        self.mine, self.offset, self.batches = rows // processes, process * (rows // processes), batches

    def __len__(self) -> int:
        return self.batches * self.mine

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, row = divmod(int(index), self.mine)
        number = self.first + batch * self.rows + self.offset + row
        return build_row(self.plan, self.records, self.plan.row(number), self.plan.pools)


def batches(source: PlanRows, threads: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches `[rows of this process, T]`, read ahead by Grain in order."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * source.mine)
    dataset = grain.MapDataset.source(source).to_iter_dataset(options).batch(source.mine, drop_remainder=True)
    return iter(dataset)
