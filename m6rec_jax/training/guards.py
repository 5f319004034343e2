"""What keeps a bad step from the parameters: skipped inside the program, counted, and rewound when it got through.

The decisions of the host read replicated figures of the step (loss, norm, counters), so all processes decide alike.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m6rec_jax.artifacts.atomic import write_text
from m6rec_jax.config import TrainConfig
from m6rec_jax.errors import InputError

SETTLED = 20  # steps that must have counted before a gradient is compared with the usual one
FOLLOWS = 0.02  # share of a step's norm in the running mean, once so many have counted
WINDOW = 100  # steps whose losses say what is usual
LASTS = 5  # steps in a row above it that are a spike and no outlier
REWINDS = "rewinds.json"


class Guard(NamedTuple):
    """Part of the state: `in_a_row` steps skipped up to now without one that counted; `norm`, the running mean of the
    gradient norms of steps that counted."""

    in_a_row: jax.Array | np.ndarray
    norm: jax.Array | np.ndarray


NEW = Guard(np.zeros((), np.int32), np.zeros((), np.float32))


def judge(guard: Guard, norm: jax.Array, counted: jax.Array, explode: float) -> tuple[jax.Array, Guard]:
    """(whether the step counts, the guard after it), inside jit.

    It does not when `norm` is not finite or, after `SETTLED` of them, above `explode` times the running mean (0: any).
    """
    good = jnp.isfinite(norm)
    if explode:
        good &= (counted < SETTLED) | (norm <= explode * guard.norm)
    share = jnp.maximum(1 / (1 + counted.astype(jnp.float32)), FOLLOWS)
    mean = jnp.where(good, guard.norm + share * (norm - guard.norm), guard.norm)
    return good, Guard(jnp.where(good, 0, guard.in_a_row + 1), mean)


def check_skips(config: TrainConfig, in_a_row: int, step: int, norm: float, usual: float) -> None:
    """Raise InputError when too many steps in a row were skipped; `step`: the last of them."""
    if in_a_row >= config.max_skips:
        raise InputError(
            f"train.max_skips={config.max_skips}: the gradient of {in_a_row} steps in a row, the last of them step "
            f"{step}, was not finite or above train.explode={config.explode:g} times the usual {usual:.3g} (it was "
            f"{norm:.3g}); nothing of it was saved: lower optim.learning_rate, look at the data, or raise the limit, "
            "then run the same command again"
        )


@dataclass(frozen=True)
class Spike:
    """Losses out of all proportion: `first` and `last` of its steps, the row the first began with, the last loss, and the
    usual one."""

    first: int
    last: int
    first_row: int
    loss: float
    usual: float


class SpikeWatch:
    """Tells a spike: `LASTS` steps in a row with a loss above median + k x MAD of the `WINDOW` steps before them.

    MAD: the median distance from the median, at least 1 % of it. A loss that is not finite is above everything.
    `k` = 0 watches nothing.
    """

    def __init__(self, k: float):
        self.k = k
        self.restart()

    def restart(self) -> None:
        self._usual: deque[float] = deque(maxlen=WINDOW)
        self._above: list[tuple[int, int]] = []  # (step, its first row)

    def see(self, step: int, row: int, loss: float) -> Spike | None:
        """The spike that `step`, which began with `row`, completes, if it does; steps come in order."""
        if not self.k:
            return None
        if len(self._usual) < WINDOW // 2:
            if np.isfinite(loss):
                self._usual.append(loss)
            return None
        median = float(np.median(self._usual))
        mad = max(float(np.median(np.abs(np.array(self._usual) - median))), 0.01 * abs(median))
        if loss <= median + self.k * mad:
            self._usual.append(loss)
            self._above = []
            return None
        self._above.append((step, row))
        first, first_row = self._above[0]
        return Spike(first, step, first_row, loss, median) if len(self._above) >= LASTS else None


@dataclass(frozen=True)
class Rewind:
    """From step `last` back to the checkpoint of step `to`; rows `first_row .. end_row` of the plan are left out."""

    to: int
    last: int
    first_row: int
    end_row: int


def read_rewinds(run: Path) -> list[Rewind]:
    """The rewinds of a run, in the order in which they came."""
    path = run / REWINDS
    return [Rewind(**one) for one in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def write_rewinds(run: Path, rewinds: list[Rewind]) -> None:
    write_text(run / REWINDS, json.dumps([asdict(one) for one in rewinds]) + "\n")


def past_holes(row: int, rewinds: list[Rewind]) -> int:
    """The row of the plan that is trained on when `row` comes up: rows of spikes are left out.

    Batches begin at multiples of their size from one another, so a hole is met at its first row or not at all.
    """
    for hole in sorted(rewinds, key=lambda one: one.first_row):
        if hole.first_row <= row < hole.end_row:
            row = hole.end_row
    return row


def rewind_of(spike: Spike, end_row: int, known: list[int], done: list[Rewind], most: int) -> Rewind:
    """Where to go back to from a spike that ends before `end_row`. `known`: steps saved; `done`, `most`: rewinds.

    Raises InputError when it happened too often, or when there is no checkpoint from before the spike.
    """
    begun = (
        f"step {spike.last}: the loss of {spike.last - spike.first + 1} steps in a row spiked, to {spike.loss:.4g} "
        f"where {spike.usual:.4g} was usual"
    )
    if len(done) >= most:
        raise InputError(f"{begun}, and train.rewinds={most} rewinds are used up; lower optim.learning_rate or optim.clip, look at the data, or raise it, then run the same command again")  # fmt: skip
    before = [step for step in known if step < spike.first]
    if not before:
        raise InputError(f"{begun}, and no checkpoint from before step {spike.first} is left to go back to; lower checkpoint.every, or optim.learning_rate, and start a new --run")  # fmt: skip
    return Rewind(before[-1], spike.last, spike.first_row, end_row)
