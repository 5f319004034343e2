"""Bits flipped, files cut short, files gone: is it noticed, and is the step before taken?"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import jax

from m6rec_jax.artifacts.checkpoints import load_params, manifest, step_folder, steps
from m6rec_jax.artifacts.content import differing
from m6rec_jax.artifacts.manifest import MANIFEST, verify_files
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.cli.verify import parts
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.progress import Stage
from m6rec_jax.training.checkpoint import restore
from m6rec_jax.training.optim import make_optimizer
from m6rec_jax.training.state import abstract_state, init_state

FAULTS = ("bit-flip", "truncation", "deletion")


def damaged(fault: str, count: int, run: Path, folder: Path, bar: Stage, seed: int) -> dict[str, Any]:
    """Damage one file of the newest step `count` times, in a copy each time; both readers must take the step before.

    `detected` by training's reader, by that of `evaluate`, `generate` and serving where the file is one that it reads, and
    by `m6rec verify`; `bad`: anything else than the step before was loaded.
    """
    rng, began = random.Random(seed), time.monotonic()
    newest, before = steps(run)[-1], steps(run)[-2]
    record = read_run(run)
    blueprint = Blueprint(record.config.model, record.vocab, record.content_width, record.more_widths)
    abstract = abstract_state(init_state(blueprint, make_optimizer(record.config.optim, record.config.train.steps), 0))
    said = manifest(run, before)["content"]
    detected = bad = 0
    for number in range(count):
        copy = folder / f"{fault}-{number}"
        shutil.copytree(run, copy)
        files = sorted(p for p in step_folder(copy, newest).rglob("*") if p.is_file())
        if fault != "deletion":
            files = [path for path in files if path.stat().st_size]  # an empty one has nothing to flip or to cut
        chosen = rng.choice(files)
        name = chosen.relative_to(step_folder(copy, newest)).as_posix()
        _harm(fault, chosen, rng)
        noticed = _verified(copy) > 0
        read_by_serving = name == MANIFEST or "/" not in name or name.startswith("params/")
        step, params = load_params(copy, "latest", blueprint.shapes())
        noticed &= step == (before if read_by_serving else newest)
        bad += bool(step == before and differing(params, said["params"]))
        found = restore(copy, abstract)
        assert found is not None
        state, _ = found
        noticed &= int(state.step) == before
        bad += bool(differing(state.params, said["params"]))
        detected += noticed
        if not noticed:
            print(f"{fault} of {name} of {copy}: not noticed")
        else:
            shutil.rmtree(copy)
        bar.advance(1, fault=fault, missed=number + 1 - detected)
        jax.clear_caches() if number % 50 == 49 else None
    return {
        "fault": fault,
        "count": count,
        "bad": bad,
        "lost": 0,
        "repeated": 0,
        "detected": detected,
        "seconds": time.monotonic() - began,
    }


def _harm(fault: str, path: Path, rng: random.Random) -> None:
    if fault == "deletion":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if fault == "truncation":
        path.write_bytes(data[: rng.randrange(len(data))])
        return
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _verified(run: Path) -> int:
    """How many problems `m6rec verify` would print; a step without a manifest is none it takes for a checkpoint."""
    try:
        listed = [line for part, files in parts(run) for line in verify_files(part, files)]
    except InputError:
        return 1
    unfinished = [path for path in (run / "checkpoints").iterdir() if not (path / MANIFEST).is_file()]
    return len(listed) + len(unfinished)
