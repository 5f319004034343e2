"""Where the time of a run went: every second of it is of one kind, over all the times that it was started."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "goodput.jsonl"
KINDS = ("init", "compile", "data wait", "step", "validate", "save", "lost", "down")
SAID = {
    "init": "reading data, making or restoring the state",
    "compile": "the first step, until it was compiled",
    "data wait": "waiting for the next batch",
    "step": "steps that count",
    "validate": "validation, its compilation included",
    "save": "what saving held up",
    "lost": "steps that were done again, after a restart or a rewind",
    "down": "between the end of one start and the next",
}


class Ledger:
    """Seconds by kind since it was made: at any time the clock runs for one kind, which `switch` changes.

    `write` appends what there is to `run/goodput.jsonl` (one process of a job does); a start that breaks off keeps all
    but what came after its last line. Lines hold the start's time, the steps it went from and to, and its seconds.
    """

    def __init__(self, kind: str = "init"):
        self.begun, self._since, self.kind = time.time(), time.perf_counter(), kind
        self.seconds = dict.fromkeys(KINDS, 0.0)

    def switch(self, kind: str) -> None:
        """From now on time is of this kind."""
        now = time.perf_counter()
        self.seconds[self.kind] += now - self._since
        self._since, self.kind = now, kind

    def lose(self, steps: int, of: int) -> None:
        """`steps` of the `of` steps done since the start are to be done again: their time counts as lost."""
        self.switch(self.kind)
        lost = self.seconds["step"] * min(steps / max(of, 1), 1.0)
        self.seconds["step"] -= lost
        self.seconds["lost"] += lost

    def write(self, run: Path, first: int, step: int) -> None:
        """Append what this start has used up to now, between step `first` and step `step`."""
        self.switch(self.kind)
        line = {"begun": self.begun, "first": first, "step": step, "seconds": self.seconds}
        with open(run / FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def totals(run: Path) -> dict[str, float]:
    """Seconds by kind over all starts of a run, lost and down among them; their sum is the wall-clock time from its first
    start to its last line."""
    starts: dict[float, dict[str, Any]] = {}
    path = run / FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            one = json.loads(line)
        except ValueError:  # cut off by a crash
            continue
        starts[one["begun"]] = one
    found, ordered = dict.fromkeys(KINDS, 0.0), [starts[begun] for begun in sorted(starts)]
    for place, one in enumerate(ordered):
        seconds = dict(one["seconds"])
        if place + 1 < len(ordered):
            later = ordered[place + 1]
            done, kept = one["step"] - one["first"], max(later["first"] - one["first"], 0)
            lost = seconds["step"] * max(done - kept, 0) / max(done, 1)
            seconds["step"], seconds["lost"] = seconds["step"] - lost, seconds["lost"] + lost
            seconds["down"] += max(later["begun"] - one["begun"] - sum(one["seconds"].values()), 0.0)
        for kind in KINDS:
            found[kind] += seconds[kind]
    return found


def goodput(seconds: Mapping[str, float]) -> float:
    """Share of the wall-clock time that went into steps that count."""
    return seconds["step"] / max(sum(seconds.values()), 1e-9)


def table(seconds: Mapping[str, float], starts: int) -> str:
    """What is printed at the end of a run."""
    total = sum(seconds.values())
    lines = [f"goodput {goodput(seconds):.1%}: {seconds['step']:,.1f} s of steps that count in {total:,.1f} s, {starts} start{'s' if starts > 1 else ''}"]  # fmt: skip
    lines += [f"  {kind:<10}{seconds[kind]:>10,.1f} s {seconds[kind] / max(total, 1e-9):>6.1%}  {SAID[kind]}" for kind in KINDS if seconds[kind] > 0]  # fmt: skip
    return "\n".join(lines)


def starts_of(run: Path) -> int:
    """How often the run was started, as far as the ledger knows."""
    lines = (run / FILE).read_text(encoding="utf-8").splitlines() if (run / FILE).is_file() else []
    found = set()
    for line in lines:
        try:
            found.add(json.loads(line)["begun"])
        except ValueError:
            continue
    return len(found)
