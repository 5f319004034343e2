"""Ends a process that hangs: its stacks are written down, and the exit code lets the scheduler start it again."""

from __future__ import annotations

import faulthandler
import os
import platform
import sys
import threading
import time
from pathlib import Path

EXIT = 75  # may be queued again: the last checkpoint is good
COMPILING = 4  # times as long until the first step has ended


class Watchdog:
    """A thread that waits for `beat`. Without one for `seconds` it writes the stacks of all threads to stderr and to
    `run/hang-<process>.txt`, says so in one line and ends the process with exit code 75. `seconds` = 0 waits for ever."""

    def __init__(self, run: Path, process: int, seconds: float):
        self.path, self.process, self.seconds = run / f"hang-{process}.txt", process, seconds
        self._beats, self._last, self._doing = 0, time.monotonic(), "the first step"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def beat(self, done: str) -> None:
        """Something has ended; `done` names it."""
        self._beats, self._last, self._doing = self._beats + 1, time.monotonic(), f"after {done}"

    def _watch(self) -> None:
        while not self._done.wait(min(self.seconds / 10, 5.0)):
            patience = self.seconds * (1 if self._beats > 1 else COMPILING)
            if time.monotonic() - self._last > patience:
                self._leave(patience)

    def _leave(self, patience: float) -> None:
        line = (
            f"m6rec: process {self.process} on {platform.node()} hangs: nothing ended for {patience:g} s "
            f"(train.hang_seconds={self.seconds:g}), {self._doing}; its stacks are in {self.path}; the same command "
            "continues from the last checkpoint"
        )
        try:
            with open(self.path, "w", encoding="utf-8") as file:
                file.write(f"{line}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            print(line, file=sys.__stderr__, flush=True)
        finally:  # whatever the disk says
            os._exit(EXIT)
