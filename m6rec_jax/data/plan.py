"""The epoch plan: which examples are trained on, in which order, packed into which rows (DESIGN section 8).

The plan is an endless list of entries (task, record, start), cut into blocks. Everything about it is a pure
function of the seed, so any process computes any row alone, and a run that stores how many rows it has consumed
resumes on another mesh or process count with every entry used once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from m6rec_jax.config import DataConfig, MixtureConfig
from m6rec_jax.data.examples import Shift
from m6rec_jax.data.packing import pack_lengths
from m6rec_jax.data.records import HISTORY
from m6rec_jax.data.tasks import Facts, Task, tasks, window_starts
from m6rec_jax.data.template import built_in
from m6rec_jax.errors import InputError
from m6rec_jax.objectives import Objective, objectives
from m6rec_jax.progress import note

NO_TASKS: Mapping[str, Task] = {}


@dataclass(frozen=True)
class Pool:
    """All that one task can draw from a split of a dataset: `records`, `starts` and `tokens` (of the stretch), `[n]` each.

    `domain` is the number of the dataset among those trained together, `shift` the place of its ids among theirs.
    """

    task: Task
    objective: Objective
    facts: Facts
    stretch: int
    records: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    domain: int = 0
    shift: Shift = field(default_factory=Shift)


@dataclass(frozen=True)
class Entries:
    """Entries, one element each. `number` counts from the start of training; `length` is in positions."""

    number: np.ndarray
    task: np.ndarray
    record: np.ndarray
    start: np.ndarray
    draw: np.ndarray
    length: np.ndarray

    def take(self, chosen: np.ndarray | list[int]) -> Entries:
        """Some of the entries, in the order asked for."""
        return Entries(*(getattr(self, name)[chosen] for name in Entries.__dataclass_fields__))


def make_pool(
    task: Task, objective: Objective, index: Mapping[str, np.ndarray], split: str, config: DataConfig, facts: Facts
) -> Pool:
    """What `task` can use of a split; a record longer than a stretch comes once a window."""
    sizes = np.arange(1, config.length + 2)
    fits = objective.length(np.zeros_like(sizes), sizes, config.rate(objective.name)) <= config.length
    stretch = task.stretch(int(sizes[fits][-1]), facts)
    kinds, tokens = index[f"{split}_kind"], index[f"{split}_tokens"].astype(np.int64)
    units = np.where(kinds == HISTORY, index[f"{split}_events"], tokens)
    usable = np.isin(kinds, task.records) & (units >= task.least)
    if task.instance != -1:  # a dataset without tasks has no numbers of them, and no instance
        usable &= index.get(f"{split}_task", np.full(len(kinds), -1)) == task.instance
    records = np.flatnonzero(usable)
    tokens = tokens[records]
    if split != "train":
        starts = np.where(kinds[records] == HISTORY, np.maximum(tokens - stretch, 0), 0)  # targets are last
    elif task.windows and len(records):
        windows = [window_starts(int(n), stretch, task.overlap(facts)) for n in tokens]
        counts, starts = [len(w) for w in windows], np.concatenate(windows)
        records, tokens = np.repeat(records, counts), np.repeat(tokens, counts)
    else:
        starts = np.zeros(len(records), np.int64)
    return Pool(task, objective, facts, stretch, records, starts, np.minimum(tokens, stretch))


def make_pools(
    mixture: MixtureConfig,
    index: Mapping[str, np.ndarray],
    split: str,
    config: DataConfig,
    facts: Facts,
    own: Mapping[str, Task] = NO_TASKS,
) -> list[Pool]:
    """One pool a task of the mixture, in its order; a task without records in this split gets an empty one.

    `own`: tasks of the dataset itself, beside those that are registered. A built-in template's task that this dataset has
    not is left out, beside tasks that are known. Raises InputError for a task nobody registered, for one of a name that is registered too, or for one
    whose objective nobody registered.
    """
    known, laid_out, templates = tasks(), objectives(), built_in("en")
    if both := sorted(known.keys() & own.keys()):
        raise InputError(f"task {both[0]}: a task of the dataset and a registered one; give the former another name in the card")  # fmt: skip
    known |= own
    pools, some = [], any(name in known for name in mixture.tasks)
    for name, share in mixture.tasks.items():
        if some and name not in known and name in templates:
            if share > 0 and split == "train":
                note(f"mixture.tasks.{name}: the dataset has no such task, so it is left out; its card may ask for it under tasks:")  # fmt: skip
            continue
        if name not in known:
            raise InputError(f"mixture.tasks.{name}: unknown task; known: {', '.join(sorted(known))}")
        task = known[name]
        if task.objective not in laid_out:
            raise InputError(f"task {name}: unknown objective {task.objective!r}; known: {', '.join(sorted(laid_out))}")
        if share > 0:
            pools.append(make_pool(task, laid_out[task.objective], index, split, config, facts))
    return pools


class Plan:
    """An endless order of entries over pools, and the rows they are packed into.

    `shares [pools]`: wanted share of target tokens. `at`: a block and the rows before it, as `cursor` gave them, so
    that a resumed run lays out no block it is past. Raises InputError when no pool has a record.
    """

    def __init__(
        self,
        pools: list[Pool],
        shares: np.ndarray,
        config: DataConfig,
        seed: int,
        at: tuple[int, int] = (0, 0),
    ):
        self.pools, self.config, self.seed = pools, config, seed
        usable = np.array([len(pool.records) > 0 for pool in pools])
        if not usable.any():
            raise InputError("no record of the dataset fits any task of the mixture; add a task or prepare more data")
        for pool, has in zip(pools, usable, strict=True):
            if not has:
                note(f"task {pool.task.name}: no record to make it from; left out")
        targets = np.array([self._mean_targets(pool) if has else 1.0 for pool, has in zip(pools, usable, strict=True)])
        rates = np.where(usable, shares, 0) / targets
        self.rates = rates / rates.sum()  # share of entries
        self._first_block, self._ends = at[0], [at[1]]  # rows up to the end of each block laid out so far
        self._lock = threading.Lock()
        self._permutation = lru_cache(maxsize=4 * len(pools))(self._permute)
        self._block = lru_cache(maxsize=16)(self._lay_out)

    def entries(self, block: int) -> Entries:
        """The entries of a block, in drawing order."""
        size, rng = self.config.block, np.random.default_rng([self.seed, 1, block])
        before, after = self._counts(block * size), self._counts((block + 1) * size)
        task = np.repeat(np.arange(len(self.pools)), after - before)
        task = rng.permutation(task)
        record, start, draw = np.zeros(size, np.int64), np.zeros(size, np.int64), rng.random(size)
        length = np.zeros(size, np.int64)
        for t, pool in enumerate(self.pools):
            mine = np.flatnonzero(task == t)
            if len(mine):
                chosen = self._draw(t, int(before[t]), len(mine))
                record[mine], start[mine] = pool.records[chosen], pool.starts[chosen]
                sizes = pool.task.sizes(pool.tokens[chosen], draw[mine], pool.facts)
                length[mine] = pool.objective.length(*sizes, self.config.rate(pool.objective.name))
        return Entries(np.arange(block * size, (block + 1) * size), task, record, start, draw, length)

    def row(self, number: int) -> Entries:
        """The entries packed into a row; rows count from the start of training."""
        with self._lock:
            block, before = self._locate(number)
            entries, rows = self.block(block)
        return entries.take(rows[number - before])

    def cursor(self, number: int) -> tuple[int, int]:
        """The block that holds a row, and the rows before that block: where a plan may start again (`at`)."""
        with self._lock:
            return self._locate(number)

    def block(self, number: int) -> tuple[Entries, list[list[int]]]:
        """The entries of a block and the rows they are packed into, as lists of places."""
        return self._block(number)

    def _locate(self, number: int) -> tuple[int, int]:
        while self._ends[-1] <= number:
            self._ends.append(self._ends[-1] + len(self._block(self._first_block + len(self._ends) - 1)[1]))
        place = int(np.searchsorted(self._ends, number, side="right")) - 1
        if place < 0:
            raise ValueError(f"row {number} lies before row {self._ends[0]}, where this plan starts")
        return self._first_block + place, self._ends[place]

    def _lay_out(self, block: int) -> tuple[Entries, list[list[int]]]:
        entries = self.entries(block)
        rows = pack_lengths(entries.length, self.config.length)
        order = np.random.default_rng([self.seed, 2, block]).permutation(len(rows))
        return entries, [rows[i] for i in order]

    def _counts(self, n: int) -> np.ndarray:
        """How many of the first n entries belong to each pool; the largest takes what rounding leaves."""
        counts = np.floor(n * self.rates).astype(np.int64)
        counts[np.argmax(self.rates)] += n - counts.sum()
        return counts

    def _draw(self, pool: int, first: int, n: int) -> np.ndarray:
        """Elements `first .. first + n` of the endless concatenation of a pool's shuffles."""
        size = len(self.pools[pool].records)
        at = np.arange(first, first + n)
        chosen = np.empty(n, np.int64)
        for lap in range(first // size, (first + n - 1) // size + 1):
            here = at // size == lap
            chosen[here] = self._permutation(pool, lap)[at[here] % size]
        return chosen

    def _permute(self, pool: int, lap: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 3, pool, lap]).permutation(len(self.pools[pool].records))

    def _mean_targets(self, pool: Pool) -> float:
        sizes = pool.task.sizes(pool.tokens, np.full(len(pool.tokens), 0.5), pool.facts)
        return float(np.mean(pool.objective.predicted(*sizes, self.config.rate(pool.objective.name))))


def mixture_shares(mixture: MixtureConfig, pools: list[Pool]) -> np.ndarray:
    """Shares of target tokens [pools], from the mixture's weights and its temperature."""
    shares = np.array([mixture.tasks[pool.task.name] for pool in pools])
    if mixture.temperature > 0:
        shares = shares * np.array([max(len(pool.records), 1) for pool in pools]) ** (1 / mixture.temperature)
    return shares / shares.sum()
