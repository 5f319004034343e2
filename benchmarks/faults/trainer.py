"""Runs that are disturbed, started as processes of their own, and what their traces and checkpoints say afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from m6rec_jax.artifacts.checkpoints import manifest, step_folder, steps
from m6rec_jax.artifacts.manifest import MANIFEST

ROOT = Path(__file__).resolve().parents[2]
SIZES = [
    "--model.layers=1", "--model.width=16", "--model.heads=2", "--data.length=64", "--data.rows=4", "--optim.warmup=4",
    "--train.epochs=0", "--train.eval_every=0", "--train.log_every=1",
]  # fmt: skip


@dataclass
class Trainer:
    """One run folder and everything it takes to start its training again; `life` counts the starts.

    `devices` fake ones a process, `processes` of one job.
    """

    dataset: Path
    folder: Path
    options: list[str]
    devices: int = 1
    processes: int = 1
    life: int = field(default=0)
    newest: dict[int, int] = field(default_factory=dict)  # the good step that each life found

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def trace(self) -> Path:
        return self.folder / "trace.jsonl"

    def start(self, fault: str = "none", **how: Any) -> subprocess.Popen[str]:
        """A process that trains on from the newest good step, until it ends or its `fault` comes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.life += 1
        self.newest[self.life] = max(steps(self.run), default=0)
        train = [
            "train",
            "--config",
            "demo",
            *SIZES,
            *self.options,
            "--dataset",
            str(self.dataset),
            "--run",
            str(self.run),
        ]
        job = {"train": train, "trace": str(self.trace), "life": self.life, "fault": fault, **how}
        file = self.folder / f"job-{self.life}.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        words = [sys.executable, "-m", "benchmarks.faults.victim", str(file)]
        if self.processes > 1:
            words = [str(ROOT / "launch/local.sh"), str(self.processes), *words]
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder.parent / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={self.devices}",
        }  # fmt: skip
        log = open(self.folder / f"log-{self.life}.txt", "w", encoding="utf-8")  # noqa: SIM115  the child's
        with log:
            return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)

    def said(self) -> str:
        """What the last process said."""
        return (self.folder / f"log-{self.life}.txt").read_text(encoding="utf-8")

    def lines(self) -> list[dict[str, Any]]:
        """The trace, without a line that a kill cut off."""
        made = []
        for line in self.trace.read_text(encoding="utf-8").splitlines() if self.trace.is_file() else ():
            try:
                made.append(json.loads(line))
            except ValueError:
                continue
        return made

    def contents(self) -> dict[int, Any]:
        """What every array of each good step held."""
        return {step: manifest(self.run, step)["content"] for step in steps(self.run)}


def taken_up(trainer: Trainer, lives: list[int]) -> int:
    """How many of these lives went on from the newest step that was good when they began (0: from the start)."""
    restored = {line["life"]: line["restored"] for line in trainer.lines() if "restored" in line}
    began = {line["life"] for line in trainer.lines()}
    return sum(life in began and restored.get(life, 0) == trainer.newest[life] for life in lives)


def arrays(run: Path, step: int) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every array of a step, as Orbax reads them."""
    tree = ocp.load_checkpointables(step_folder(run, step), {"params": None, "optimizer": None})
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (str(x.dtype), np.asarray(x).tobytes()) for path, x in leaves}


def surviving(lines: list[dict[str, Any]], end: int) -> dict[int, list[tuple[str, list[int]]]]:
    """For each step up to `end` the rows (digest, plan entries) it was last given, over all processes in order.

    What a life trained on after its last save was given again by the next one, and is not on the way to the end.
    """
    last: dict[int, int] = {}
    for line in lines:
        if "step" in line:
            last[line["step"]] = max(line["life"], last.get(line["step"], 0))
    kept: dict[int, list[tuple[int, list[tuple[str, list[int]]]]]] = {}
    for line in lines:
        if "step" in line and line["life"] == last[line["step"]] and line["step"] <= end:
            rows = list(zip(line["rows"], line["entries"], strict=True))
            kept.setdefault(line["step"], []).append((line["process"], rows))
    return {step: [row for _, rows in sorted(parts) for row in rows] for step, parts in kept.items()}


def compared(trainer: Trainer, whole: Trainer, end: int) -> dict[str, int]:
    """`bad` restores, plan entries `lost` and `repeated`, of a disturbed run against an undisturbed one up to step `end`.

    Bad is a state that was restored, or the last one, that does not hold to the bit what the undisturbed run held at that
    step; lost or repeated an entry that the surviving steps were given less or more often than those of the other.
    """
    lines, contents = trainer.lines(), whole.contents()
    bad = sum(line["content"] != contents.get(line["restored"]) for line in lines if "restored" in line)
    bad += trainer.contents().get(end) != contents[end] or arrays(trainer.run, end) != arrays(whole.run, end)
    mine, theirs = surviving(lines, end), surviving(whole.lines(), end)
    count = lambda some: Counter((e, d) for rows in some.values() for d, entries in rows for e in entries)  # noqa: E731
    a, b = count(mine), count(theirs)
    moved = sum(mine.get(step) != theirs[step] for step in theirs)
    return {"bad": int(bad + moved), "lost": (b - a).total(), "repeated": (a - b).total()}


def phase(run: Path) -> str:
    """Where a killed save stood, by what it left: serialise, commit or step (no save under way)."""
    folder = run / "checkpoints"
    left = [path for path in folder.iterdir() if not (path / MANIFEST).is_file()] if folder.is_dir() else []
    if any(not path.name.isdigit() for path in left):
        return "serialise"
    if left or any(step_folder(run, step).glob(".manifest.json.*") for step in steps(run)):
        return "commit"
    return "step"
