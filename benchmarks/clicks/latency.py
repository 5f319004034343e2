"""Time of requests: systems take turns on the same calls in one process, so that parts of the full model's time are told."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.clicks.quick import Call, System
from m6rec_jax.decoding.shapes import Prompt

Calls = Sequence[Sequence[Prompt]]


def drawn(made: Mapping[str, System], asked: Sequence[Prompt], batch: int, turns: int) -> list[dict[str, Any]]:
    """Rows of every system over calls of `batch` requests drawn at random, with all parts kept."""
    rng = np.random.default_rng(3)
    calls = [[asked[i] for i in rng.integers(len(asked), size=batch)] for _ in range(turns)]
    for system in made.values():  # every shape is compiled, every part read
        for some in calls:
            system.call(some)
    return _rows(made, calls, "at random")


def replayed(
    made: Mapping[str, System], before: Sequence[Prompt], asked: Sequence[Prompt], batch: int
) -> list[dict[str, Any]]:
    """The same over requests in order of time, where those parts are kept that requests before them had: `before` is read
    into empty caches first, untimed."""
    calls = [asked[at : at + batch] for at in range(0, len(asked) - batch + 1, batch)]

    def begun() -> None:
        for system in made.values():
            if system.late:
                system.late.cache.clear()
                system.call(before)

    begun()
    for system in made.values():  # compiles what the same calls need when they are timed
        for some in calls:
            system.call(some)
    begun()
    return _rows(made, calls, "in order of time")


def _rows(made: Mapping[str, System], calls: Calls, kept: str) -> list[dict[str, Any]]:
    before = {name: system.late.uses for name, system in made.items() if system.late}
    taken, worked = in_turns({name: system.call for name, system in made.items()}, calls)
    rows = []
    for name, seconds in taken.items():
        row = {
            "system": name, "batch": len(calls[0]), "calls": len(calls), "requests": kept,
            "p50_ms": 1e3 * float(np.median(seconds)), "mean_ms": 1e3 * float(seconds.mean()),
            "of_full": float(np.median(seconds) / np.median(taken["full"])),
            "mean_of_full": float(seconds.sum() / taken["full"].sum()),
            "processor_of_full": float(worked[name].sum() / worked["full"].sum()),
            "tokens": float(np.mean([len(tokens) for some in calls for tokens, _ in some])),
        }  # fmt: skip
        late = made[name].late
        if late:
            new, old = late.uses, before[name]
            row["parts_kept"] = (new.kept - old.kept) / (new.asked - old.asked)
        rows.append(row)
    return rows


def in_turns(calls: Mapping[str, Call], lots: Calls) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Seconds `[lots]` of each call, which gives arrays of the host, and of them the processor's, all threads together: what
    else runs on the machine is not in those. Who begins changes from lot to lot."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn, some in enumerate(lots):
        for name in sorted(calls, reverse=bool(turn % 2)):
            start = time.perf_counter(), time.process_time()
            calls[name](some)
            taken[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    both = {name: np.array(one) for name, one in taken.items()}
    return {name: one[:, 0] for name, one in both.items()}, {name: one[:, 1] for name, one in both.items()}
