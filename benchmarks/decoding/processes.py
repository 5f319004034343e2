"""Every measurement is a process of its own: its peak of memory is its own, and so are its processors."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import run

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]


def measured(job: dict[str, Any], peer: Path | None = None) -> dict[str, Any]:
    """What a process says of a job: of `hf.py` under the interpreter `peer`, or of `benchmarks.decoding.ours`.

    Raises InputError with the last line of a process that fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "job.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(job), encoding="utf-8")
        script = [str(peer), str(HERE / "hf.py")] if peer else [sys.executable, "-m", "benchmarks.decoding.ours"]
        with processors(job["threads"]):
            run(job["system"], [*script, str(asked), str(answered)], str(folder if peer else ROOT))
        return json.loads(answered.read_text(encoding="utf-8"))


@contextmanager
def processors(count: int) -> Iterator[None]:
    """Processes started inside keep to so many processors and threads, and touch no network and no accelerator."""
    held = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    held |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"), str(count))
    before = {name: os.environ.get(name) for name in held}
    may = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    os.environ.update(held)
    if may is not None:
        os.sched_setaffinity(0, sorted(may)[:count])
    try:
        yield
    finally:
        if may is not None:
            os.sched_setaffinity(0, may)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
