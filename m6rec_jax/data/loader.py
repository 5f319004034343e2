"""Batches for a process: plan rows built from records by Grain's reader threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping

import grain
import numpy as np

from m6rec_jax.data.examples import Sequence
from m6rec_jax.data.packing import pack_row
from m6rec_jax.data.plan import Entries, Plan, Pool
from m6rec_jax.data.records import RecordReader
from m6rec_jax.data.tasks import Piece

KEPT_TOKENS = 1 << 24  # of examples that are the same in every epoch: some 0.5 GB at most, reached by few datasets
Kept = MutableMapping[tuple[int, int, int], Sequence]


def build_row(
    plan: Plan, records: RecordReader, entries: Entries, pools: list[Pool], kept: Kept | None = None
) -> dict[str, np.ndarray]:
    """The packed arrays `[T]` of one row's entries, drawn from `pools`: a pure function of (seed, entries).

    `kept`: examples that no chance changes, by (pool, record, start), so that they are read and arranged once.
    """
    columns = (entries.task, entries.record, entries.start)
    keys = list(zip(*(column.tolist() for column in columns), strict=True))
    made = [None if kept is None else kept.get(key) for key in keys]
    missing = [place for place, sequence in enumerate(made) if sequence is None]
    if missing:
        for place, record in zip(missing, records.take(entries.record[missing]), strict=True):
            if record is None:  # damaged, and data.bad_records lets the row do without it
                continue
            pool = pools[keys[place][0]]
            rng = np.random.default_rng([plan.seed, 4, int(entries.number[place])])
            piece = Piece(pool.stretch, int(entries.start[place]), float(entries.draw[place]))
            example = pool.task.build(record, piece, pool.facts)
            rate = plan.config.rate(pool.objective.name)
            sequence = pool.shift.moved(pool.objective.arrange(example, rng, rate))
            if kept is not None and not (pool.task.by_draw or pool.objective.by_chance):
                kept[keys[place]] = sequence
            made[place] = sequence
    return pack_row(
        [(sequence, key[0]) for sequence, key in zip(made, keys, strict=True) if sequence], plan.config.length
    )


class _Keep(dict[tuple[int, int, int], Sequence]):
    """Keeps what it is given until `KEPT_TOKENS` are held. Threads may write the same example twice: it is equal."""

    tokens = 0

    def __setitem__(self, key: tuple[int, int, int], sequence: Sequence) -> None:
        if self.tokens < KEPT_TOKENS:
            self.tokens += len(sequence.tokens) + 64  # what five small arrays weigh beside their content
            super().__setitem__(key, sequence)


class PlanRows(grain.sources.RandomAccessDataSource):
    """Rows of the plan that one process reads: element j is its j-th row from `first` on.

    A global batch of `rows` rows is dealt in runs: process p takes rows `p * rows / processes ...` of each batch. `past`
    gives the row that a batch begins with instead of the one that comes up, where rows of the plan are left out.
    """

    def __init__(self, plan: Plan, records: RecordReader, first: int, batches: int, rows: int, process: int, processes: int, past: Callable[[int], int] = int):  # fmt: skip
        self.plan, self.records, self.first, self.rows = plan, records, first, rows
        self.mine, self.offset, self.batches = rows // processes, process * (rows // processes), batches
        self._kept, self._past, self._begins, self._lock = _Keep(), past, [first], threading.Lock()

    def __len__(self) -> int:
        return self.batches * self.mine

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, row = divmod(int(index), self.mine)
        number = self._begin(batch) + self.offset + row
        return build_row(self.plan, self.records, self.plan.row(number), self.plan.pools, self._kept)

    def _begin(self, batch: int) -> int:
        """The first plan row of a batch."""
        with self._lock:
            while len(self._begins) <= batch:
                self._begins.append(self._past(self._begins[-1]) + self.rows)
            return self._past(self._begins[batch])


def batches(source: PlanRows, threads: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches `[rows of this process, T]`, read ahead by Grain in order."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * source.mine)
    dataset = grain.MapDataset.source(source).to_iter_dataset(options).batch(source.mine, drop_remainder=True)
    return iter(dataset)
