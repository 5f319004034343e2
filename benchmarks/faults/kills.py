"""Kill -9, again and again, until a run has come to its end in spite of it."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.trainer import Trainer, compared, phase, taken_up
from m6rec_jax.artifacts.checkpoints import steps
from m6rec_jax.progress import Stage

EVERY = 4  # steps between saves
KEPT = 100_000  # the undisturbed run keeps every step, to be compared with
STEPS = 600
POINTS = ("before", "rename", "after", "drop")
PATIENCE = 300.0


def options(end: int, keep: int, every: int = EVERY) -> list[str]:
    return [f"--train.steps={end}", f"--checkpoint.every={every}", f"--checkpoint.keep={keep}"]


def ended(trainer: Trainer, **how: Any) -> int:
    """The exit code of one start; a process that does not end in five minutes is an error."""
    process = trainer.start(**how)
    try:
        return process.wait(PATIENCE)
    finally:
        process.kill()


def undisturbed(dataset: Path, folder: Path, end: int = STEPS) -> Trainer:
    """The run that nothing happened to, each of its steps saved; taken as it is where an earlier call made it."""
    whole = Trainer(dataset, folder, options(end, KEPT, 1))
    if max(steps(whole.run), default=0) < end and (code := ended(whole)):
        raise RuntimeError(f"{folder}: the undisturbed run ended with {code}\n{whole.said()[-2000:]}")
    return whole


def killed(fault: str, count: int, whole: Trainer, folder: Path, bar: Stage, seed: int) -> dict[str, Any]:
    """A run killed `count` times at `fault`, then let go to its end; a kill that came elsewhere is not counted."""
    rng, began = random.Random(seed), time.monotonic()
    trainer, hits, others, after = Trainer(whole.dataset, folder, options(STEPS, 2)), 0, 0, []
    code = None
    while hits < count:
        how: dict[str, Any] = {
            "fault": fault,
            "after": rng.randrange(1, 3 * EVERY) if fault == "step" else rng.randrange(3),
        }
        how |= {"point": rng.choice(POINTS), "delay": rng.uniform(0, 0.06)}
        code = ended(trainer, **how)
        if code == 0:
            break  # at the end before all kills were through: count says how many
        if code != -signal.SIGKILL:
            raise RuntimeError(f"{trainer.run}: ended with {code} and was not killed\n{trainer.said()[-2000:]}")
        hit = fault != "serialise" or phase(trainer.run) == "serialise"
        hits, others = hits + hit, others + (not hit)
        after += [trainer.life + 1] if hit else []
        bar.advance(int(hit), fault=fault, elsewhere=others)
    if code != 0 and (code := ended(trainer)):
        raise RuntimeError(f"{trainer.run}: ended with {code}\n{trainer.said()[-2000:]}")
    found = compared(trainer, whole, STEPS)
    return {
        "fault": f"kill-{fault}",
        "count": hits,
        "elsewhere": others,
        **found,
        "detected": taken_up(trainer, after),
        "seconds": time.monotonic() - began,
    }


def told_to_stop(count: int, whole: Trainer, folder: Path, bar: Stage, seed: int) -> dict[str, Any]:
    """SIGTERM at any moment after training began: out with exit 75, its step saved. `slowest`: seconds it took."""
    rng, began, taken, stopped = random.Random(seed), time.monotonic(), [], 0
    trainer = Trainer(whole.dataset, folder, options(STEPS, 2))
    for _ in range(count):
        before = len(trainer.lines())
        process = trainer.start()
        while len(trainer.lines()) <= before + 1 and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.15))
        if process.poll() is not None:
            break
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(PATIENCE)
        taken.append(time.monotonic() - start)
        last = max(line["step"] for line in trainer.lines() if "step" in line)
        stopped += code == 75 and max(steps(trainer.run)) == last
        bar.advance(1, fault="sigterm", seconds=f"{max(taken):.1f}")
    if max(steps(trainer.run), default=0) < STEPS:
        ended(trainer)
    found = compared(trainer, whole, STEPS)
    return {
        "fault": "sigterm",
        "count": len(taken),
        **found,
        "detected": stopped,
        "slowest": max(taken),
        "seconds": time.monotonic() - began,
    }


def loop(minutes: float, dataset: Path, folder: Path, bar: Stage, seed: int) -> dict[str, Any]:
    """A kill about every two minutes for so long; beside it, on another core, the same run undisturbed.

    `goodput`: seconds of the steps that are on the way to the end, over the wall clock.
    """
    rng, began = random.Random(seed), time.monotonic()
    long = [
        "--train.steps=10000000",
        "--checkpoint.every=200",
        "--data.rows=16",
        "--model.width=64",
        "--model.layers=2",
    ]
    whole = Trainer(dataset, folder / "undisturbed", [*long, f"--checkpoint.keep={KEPT}"])
    trainer = Trainer(dataset, folder / "disturbed", [*long, "--checkpoint.keep=3"])
    other, kills = whole.start(), 0
    try:
        while (left := 60 * minutes - (time.monotonic() - began)) > 0:
            process = trainer.start()
            try:
                process.wait(min(left, rng.uniform(60, 180)))
                raise RuntimeError(f"{trainer.run}: ended by itself\n{trainer.said()[-2000:]}")
            except subprocess.TimeoutExpired:
                pass
            finally:
                process.kill()
                process.wait()
            kills, shown = kills + 1, bar.done
            bar.advance(
                min(minutes, (time.monotonic() - began) / 60) - shown,
                fault="kill-loop",
                kills=kills,
                step=max(steps(trainer.run), default=0),
            )
        wall, end = time.monotonic() - began, max(steps(trainer.run))
        last = trainer.start()  # once more, only to see where it takes up
        until = time.monotonic() + PATIENCE
        while not any(line["life"] == trainer.life for line in trainer.lines()) and time.monotonic() < until:
            time.sleep(1)
        last.kill()
        last.wait()
        while max(steps(whole.run), default=0) < end:  # it starts once and shares the machine: it may be behind
            if other.poll() is not None:
                raise RuntimeError(f"{whole.run}: ended by itself\n{whole.said()[-2000:]}")
            time.sleep(1)
    finally:
        other.kill()
        other.wait()
    found = compared(trainer, whole, end)
    return {
        "fault": "kill-loop", "count": kills, **found, "steps": end,
        "detected": taken_up(trainer, list(range(2, kills + 2))),
        "goodput": useful(trainer.lines(), end) / wall, "seconds": time.monotonic() - began,
    }  # fmt: skip


def useful(lines: list[dict[str, Any]], end: int) -> float:
    """Seconds of the steps up to `end` that were not done again: from one to the next of the same life."""
    last = {line["step"]: line for line in lines if "step" in line and line["step"] <= end}
    at = {step: (line["life"], line["at"]) for step, line in last.items()}
    spans = [at[s + 1][1] - t for s, (life, t) in at.items() if s + 1 in at and at[s + 1][0] == life]
    return float(np.sum(spans))
