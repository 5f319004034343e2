"""Progress of long stages on stderr: a bar with ETA and throughput on a terminal, plain lines elsewhere.

    with stage("clean", total=100_000, unit="rows") as bar:
        for part in parts:
            bar.advance(len(part), kept=kept)

Stages nest and may be opened from several threads. Of many processes only the first prints: process 0 by
the environment (M6REC_PROCESS_ID, else SLURM_PROCID), or whatever `speak` was told.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LINE_SECONDS = 10.0  # without a terminal: a line at least this often ...
LINE_SHARE = 0.1  # ... or each tenth of the way, ...
LINE_LEAST = 1.0  # ... but never more often than this
WINDOW = 30.0  # seconds over which throughput is measured

_now = time.monotonic
_lock = threading.RLock()
_told: bool | None = None
_live: Any = None  # the one rich.progress.Progress while a bar is on screen
_open = 0


def speak(yes: bool) -> None:
    """Say whether this process prints; overrides the environment."""
    global _told
    _told = yes


def speaks() -> bool:
    """Whether this process prints: told by `speak`, else process 0 by the environment."""
    if _told is not None:
        return _told
    return os.environ.get("M6REC_PROCESS_ID", os.environ.get("SLURM_PROCID", "0")) in ("", "0")


def on_terminal() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"


def note(line: str) -> None:
    """Print one line on stderr, above the bars if there are any."""
    if not speaks():
        return
    with _lock:
        if _live is not None:
            _live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


class Stage:
    """One stage under way: counts, measures throughput, draws itself."""

    def __init__(self, name: str, total: float | None, unit: str, done: float) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.fields: dict[str, Any] = {}
        self._start, self._first = _now(), done
        self._marks: deque[tuple[float, float]] = deque([(self._start, done)])
        self._said, self._said_done = self._start, done
        self._task: Any = None

    def advance(self, n: float = 1, /, **fields: Any) -> None:
        """Count `n` more units; `fields` are shown beside the bar until replaced."""
        with _lock:
            now = _now()
            self.done += n
            self.fields.update(fields)
            if now - self._marks[-1][0] >= WINDOW / 30:
                self._marks.append((now, self.done))
                while len(self._marks) > 2 and now - self._marks[1][0] > WINDOW:
                    self._marks.popleft()
            if self._task is not None:
                _live.update(self._task, completed=self.done, facts=self.facts())
            elif self._due(now):
                self._said, self._said_done = now, self.done
                self._say(f"{self.name}: {', '.join(filter(None, [self.share(), self.facts()]))}")

    def rate(self) -> float:
        """Units a second over the last `WINDOW` seconds; 0 before anything was counted."""
        since, done = self._marks[0]
        seconds = _now() - since
        return (self.done - done) / seconds if seconds > 0 else 0.0

    def eta(self) -> float | None:
        """Seconds to go at the present rate; None without a total or a rate."""
        rate = self.rate()
        return max(self.total - self.done, 0) / rate if self.total and rate > 0 else None

    def share(self) -> str:
        if not self.total:
            return f"{_count(self.done)} {self.unit}".rstrip()
        return (
            f"{100 * self.done / self.total:.0f} % ({_count(self.done)}/{_count(self.total)} {self.unit}".rstrip() + ")"
        )

    def facts(self) -> str:
        """Throughput, ETA and fields in words."""
        rate, eta = self.rate(), self.eta()
        parts = [f"{_number(rate)} {self.unit or 'units'}/s"] if rate else []
        parts += [f"ETA {_duration(eta)}"] if eta is not None else []
        return ", ".join([*parts, *(f"{key} {_number(value)}" for key, value in self.fields.items())])

    def _due(self, now: float) -> bool:
        waited = now - self._said
        moved = (self.done - self._said_done) / self.total if self.total else 0.0
        return waited >= LINE_SECONDS or (waited >= LINE_LEAST and moved >= LINE_SHARE)

    def _say(self, line: str) -> None:
        if speaks():
            note(line)

    def _end(self, word: str) -> None:
        seconds = _now() - self._start
        made = self.done - self._first
        rate = f", {_number(made / seconds)} {self.unit or 'units'}/s" if made and seconds > 0.05 else ""
        where = f"{_count(self.done)} {self.unit}".rstrip() if made or self.total else ""
        fields = "".join(f", {key} {_number(value)}" for key, value in self.fields.items())
        self._say(f"{self.name}: {word}{', ' * bool(where)}{where} in {_duration(seconds)}{rate}{fields}")


@contextmanager
def stage(name: str, total: float | None = None, unit: str = "", done: float = 0) -> Iterator[Stage]:
    """A stage of `total` units (None = unknown), of which `done` were finished by an earlier run."""
    global _live, _open
    made = Stage(name, total, unit, done)
    with _lock:
        if speaks() and on_terminal():
            if _live is None:
                _live = _bars()
                _live.start()
            _open += 1
            made._task = _live.add_task(name, total=total, completed=done, facts="")
        elif total:
            made._say(f"{name}: {_count(total)} {unit}".rstrip() + (f", {_count(done)} done before" if done else ""))
        else:
            made._say(f"{name} ...")
    word = "stopped"
    try:
        yield made
        word = "done"
    finally:
        with _lock:
            if made._task is not None:
                _live.remove_task(made._task)
                _open -= 1
                if _open == 0:
                    _live.stop()
                    _live = None
            made._end(word)


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # results piped elsewhere must not turn up among the bars
    )


def _count(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
