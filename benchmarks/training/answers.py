"""A system answers over its standard output, a line a question: only the standard library, so that peers import it too."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(start: Callable[[], dict[str, Any]], step: Callable[[int], None], peak: Callable[[int], float]) -> None:
    """Say what `start` finds, then answer `steps N` with the seconds of each and `peak` with GFLOP/s, until input ends.

    `step(i)` returns once batch i is trained on; `peak(size)` is the seconds of one square product of that size.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print belongs to the errors

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    say(start())
    done = 0
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "steps":
            seconds = []
            for _ in range(int(rest[0])):
                begun = time.perf_counter()
                step(done)
                seconds.append(time.perf_counter() - begun)
                done += 1
            say({"seconds": seconds})
        else:
            say({"gflops": max(2e-9 * size**3 / peak(size) for size in (512, 1024, 2048, 4096))})


def fastest(run: Callable[[], Any], times: int = 5) -> float:
    """Seconds of the fastest of some calls, after one that warms up."""
    run()
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    return min(taken)
