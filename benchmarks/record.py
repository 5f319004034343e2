"""What every benchmark writes: `benchmarks/results/NAME.json` with the commit, the machine and rows (DESIGN section 3)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from m6rec_jax.artifacts.atomic import write_json
from m6rec_jax.artifacts.checkpoints import steps
from m6rec_jax.artifacts.schemas import BENCHMARK
from m6rec_jax.cli.train import run_training
from m6rec_jax.config import Config
from m6rec_jax.data.dataset import Dataset

RESULTS = Path(__file__).parent / "results"


def write_results(name: str, rows: list[dict[str, Any]], out: Path | None = None) -> Path:
    """Write the rows of a benchmark and return where."""
    path = out or RESULTS / f"{name}.json"
    head = {"schema": BENCHMARK.name, "version": BENCHMARK.version, "commit": commit(), "machine": machine()}
    write_json(path, {**head, "rows": rows})
    return path


def kept_rows(name: str, measured: Sequence[dict[str, Any]], key: Sequence[str]) -> list[dict[str, Any]]:
    """Rows that earlier calls of a benchmark wrote, without those that `measured` measures anew (equal in `key`)."""
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    anew = {tuple(row.get(part) for part in key) for row in measured}
    return [row for row in old if tuple(row.get(part) for part in key) not in anew]


def timed_training(config: Config, data: Dataset, run: Path, init_from: str | None = None) -> float | None:
    """Train a run, or take it up; the seconds that training took from end to end, None when it was interrupted."""
    file, fresh, start = run / "seconds.json", not steps(run), time.monotonic()
    run_training(config, [data.path], run, init_from)
    if fresh:
        file.write_text(json.dumps(round(time.monotonic() - start, 1)), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    packages = {name: version(name) for name in ("jax", "polars")}
    return {"cpus": os.cpu_count(), "arch": platform.machine(), "python": platform.python_version(), **packages}


def commit() -> str:
    """The commit that was measured, with -dirty behind it where files other than results differ; "" outside a checkout."""

    def git(*words: str) -> str:
        asked = subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parents[1], check=False)
        return asked.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
