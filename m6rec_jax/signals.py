"""Signals that ask a long job to save and end: noted when they come, answered where the job can."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, NoReturn

from m6rec_jax.errors import Requeue
from m6rec_jax.progress import note


class Signals:
    """Takes a note of SIGTERM and of the first Ctrl-C (`number`; 0: none came) and says `words`; a second Ctrl-C is obeyed
    at once. Outside of the main thread, where Python handles no signals, it notes none."""

    def __init__(self, words: str):
        self.number = 0
        self._words = words
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def leave(self, saved: str) -> NoReturn:
        """Raise what the signal means, KeyboardInterrupt or Requeue, once all is `saved`."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Requeue(f"{saved}; the same command continues from there")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        note(f"{self._words} (Ctrl-C again to stop at once)")
