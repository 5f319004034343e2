"""What every benchmark writes: `benchmarks/results/NAME.json` with the commit, the machine and rows (DESIGN section 3)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from m6rec_jax.artifacts.atomic import write_json
from m6rec_jax.artifacts.schemas import BENCHMARK

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


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    packages = {name: version(name) for name in ("jax", "polars")}
    return {"cpus": os.cpu_count(), "arch": platform.machine(), "python": platform.python_version(), **packages}


def commit() -> str:
    """The commit that was measured; "" outside a git checkout."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent, check=False).stdout.strip()
