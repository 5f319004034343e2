"""Traces of some steps, by setting or by touching a file, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import time
from pathlib import Path

import jax

from m6rec_jax.progress import note

ASK = "profile-now"  # touch this file in the run folder
ASKED_STEPS = 5
LOOK_SECONDS = 1.0  # a network file system is not asked more often


class Profiler:
    """Starts and stops `jax.profiler` around steps START to STOP of `train.profile`, and for `ASKED_STEPS` steps after
    `run/profile-now` was touched (process 0 alone does then). Traces lie in `run/profile/<first step>/`."""

    def __init__(self, run: Path, steps: str):
        self.run = run
        self._start, self._stop = map(int, steps.split(":")) if steps else (0, 0)
        self._until, self._looked = 0, 0.0

    def before(self, step: int) -> None:
        """To be called before each step is dispatched."""
        if self._until:
            return
        until = self._stop if step == self._start else self._asked(step)
        if until:
            self._until = until
            folder = self.run / "profile" / str(step)
            jax.profiler.start_trace(str(folder))
            note(f"profile: steps {step} to {until - 1} are traced into {folder}")

    def after(self, step: int, last: bool) -> bool:
        """To be called after each step; whether a trace ended: its work is waited for."""
        if not self._until or (step < self._until - 1 and not last):
            return False
        self._until = 0
        return True

    def close(self) -> None:
        """End a trace that an error left open."""
        if self._until:
            self._until = 0
            jax.profiler.stop_trace()

    def _asked(self, step: int) -> int:
        now = time.monotonic()
        if jax.process_index() or now - self._looked < LOOK_SECONDS:
            return 0
        self._looked, path = now, self.run / ASK
        if not path.exists():
            return 0
        path.unlink(missing_ok=True)
        return step + ASKED_STEPS
