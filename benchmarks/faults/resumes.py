"""A run that goes on with other devices or other processes than it was saved with."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.faults.kills import EVERY, ended, options
from benchmarks.faults.trainer import Trainer, surviving
from m6rec_jax.artifacts.checkpoints import steps
from m6rec_jax.progress import Stage
from m6rec_jax.training.metrics import read_rows

AT = 6 * EVERY + 1  # a step that no save falls on, in the middle of a block of the plan
MORE = 5
MESHES = {
    "data=4": (4, ["--mesh.data=4"]), "fsdp=4": (4, ["--mesh.data=1", "--mesh.fsdp=4"]),
    "tensor=2": (2, ["--mesh.data=1", "--mesh.tensor=2"]), "data=2 tensor=2": (4, ["--mesh.data=2", "--mesh.tensor=2"]),
    "accumulate=4": (1, ["--train.accumulate=4"]), "data=2 accumulate=2": (2, ["--mesh.data=2", "--train.accumulate=2"]),
}  # fmt: skip
PROCESSES = {1: (2, 4), 2: (1, 4)}  # saved by so many -> taken up by so many
STILL = ["--model.dropout=0", "--model.embed_dropout=0", "--model.id_dropout=0"]  # slices draw dropout apart


def resumed(fault: str, dataset: Path, folder: Path, bar: Stage) -> dict[str, Any]:
    """Saved at step 25, in the midst of an epoch; taken up by others and by the same, five steps each.

    `bad`: an array that was not restored to the bit, or a next loss further than 1e-5 from that of the same; `lost` and
    `repeated` count plan entries of all 30 steps.
    """
    began, row = time.monotonic(), {"fault": fault, "count": 0, "bad": 0, "lost": 0, "repeated": 0, "detected": 0}
    worst = 0.0
    for saved_by, others in ({1: MESHES} if fault == "resume-mesh" else PROCESSES).items():
        base = _until(AT, Trainer(dataset, folder / f"{fault}-{saved_by}", _options(), processes=saved_by))
        same = _taken_up(base, folder / f"{fault}-{saved_by}-same", saved_by, 1, [])
        for name in others:
            devices, more = MESHES[name] if fault == "resume-mesh" else (1, [])
            count = 1 if fault == "resume-mesh" else name
            other = _taken_up(base, folder / f"{fault}-{saved_by}-{name}".replace(" ", "-"), count, devices, more)
            exact = [line["content"] for line in other.lines() if "restored" in line][-1] == base.contents()[AT]
            losses = [{r["step"]: r["loss"] for r in read_rows(t.run) if "loss" in r} for t in (same, other)]
            distance = abs(losses[1][AT + 1] / losses[0][AT + 1] - 1)
            worst = max(worst, distance)
            a, b = (surviving(t.lines(), AT + MORE) for t in (same, other))
            flat = lambda some: sorted(e for rows in some.values() for _, entries in rows for e in entries)  # noqa: E731
            row["bad"] += int(not exact or distance > 1e-5 or a != b)
            row["lost"] += (Counter(flat(a)) - Counter(flat(b))).total()
            row["repeated"] += (Counter(flat(b)) - Counter(flat(a))).total()
            row["count"] += 1
            row["detected"] += [x["restored"] for x in other.lines() if "restored" in x][-1] == AT
            bar.advance(1, fault=fault, to=name, loss=f"{distance:.1e}")
    return row | {"next_loss": worst, "seconds": time.monotonic() - began}


def _options() -> list[str]:
    return [*options(AT + MORE, 100), *STILL]


def _until(step: int, trainer: Trainer) -> Trainer:
    """Trained until `step` is saved: by SIGTERM the trainer sends itself while it is being fed the last of them."""
    code = ended(trainer, fault="term", after=step - 1)
    if code != 75 or max(steps(trainer.run)) != step:
        raise RuntimeError(f"{trainer.run}: ended with {code} at {steps(trainer.run)}\n{trainer.said()[-2000:]}")
    return trainer


def _taken_up(base: Trainer, folder: Path, processes: int, devices: int, more: list[str]) -> Trainer:
    shutil.copytree(base.folder, folder, dirs_exist_ok=True)
    other = Trainer(base.dataset, folder, [*_options(), *more], devices, processes, base.life)
    if code := ended(other):
        raise RuntimeError(f"{folder}: ended with {code}\n{other.said()[-2000:]}")
    return other
