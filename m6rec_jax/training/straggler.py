"""Which process holds the others up: what its host needs for a step beside what it waits for the others."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from m6rec_jax.progress import note

EVERY = 50  # steps between reports, at most
SLOW = 1.5  # times the median
MATTERS = 0.1  # of a step: less holds nobody up
NAME_BYTES = 64


def slow_processes(own: np.ndarray, step: float) -> list[int]:
    """Processes whose own seconds a step, `own` [processes], are above `SLOW` times the (lower) median, by an amount that
    matters beside the seconds of a whole step."""
    median = float(np.sort(own)[(len(own) - 1) // 2])
    return [int(p) for p in np.flatnonzero((own > SLOW * median) & (own - median > MATTERS * step))]


class Stragglers:
    """Adds up this process's own time and compares it with the others' every `EVERY` steps.

    All processes leave a step together, for its sums are of all; a slow one is told by what it does alone: waiting for its
    batch and putting it on its devices.
    """

    def __init__(self) -> None:
        self._own, self._steps, self._since = 0.0, 0, time.perf_counter()
        self._names: list[str] | None = None

    @contextmanager
    def own(self) -> Iterator[None]:
        """What runs inside waits for no other process."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._own += time.perf_counter() - begun

    def step(self) -> list[str]:
        """Count a step; every `EVERY` steps exchange, and name who is slow (said by process 0)."""
        self._steps += 1
        if self._steps < EVERY or jax.process_count() == 1:
            return []
        now = time.perf_counter()
        mine = np.array([self._own / self._steps, (now - self._since) / self._steps], np.float32)
        self._own, self._steps, self._since = 0.0, 0, now
        told = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, 2)
        names = self._names = self._names or _names()
        own, step = told[:, 0], float(told[:, 1].mean())
        lines = [
            f"process {p} on {names[p]} is slow: {1000 * own[p]:,.0f} ms a step for its data and host, where the median "
            f"process needs {1000 * float(np.sort(own)[(len(own) - 1) // 2]):,.0f} ms; a step takes {1000 * step:,.0f} ms. "
            "Look at its disk and at what else runs there; data.threads reads with more threads"
            for p in slow_processes(own, step)
        ]
        for line in lines:
            note(line)
        return lines


def _names() -> list[str]:
    raw = platform.node().encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")
    every = np.asarray(multihost_utils.process_allgather(np.frombuffer(raw, np.uint8)))
    return [
        row.astype(np.uint8).tobytes().rstrip(b"\0").decode(errors="replace") for row in every.reshape(-1, NAME_BYTES)
    ]
