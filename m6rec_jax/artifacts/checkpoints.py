"""Reading checkpoints: which steps are good, and their parameters alone (no optimiser, no trainer needed).

A step is good once its manifest lies in its folder; the manifest holds a digest of every file, because the
storage layer restores arrays whose bits have flipped without noticing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from m6rec_jax.artifacts.manifest import MANIFEST, read_manifest, verify_files
from m6rec_jax.artifacts.schemas import CHECKPOINT
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note

FOLDER = "checkpoints"
BEST_METRIC = "ndcg@10"


def step_folder(run: Path | str, step: int) -> Path:
    """Where a step lies, as an absolute path: the storage layer takes no other."""
    return Path(run).absolute() / FOLDER / str(step)


def steps(run: Path | str) -> list[int]:
    """Steps of a run that were saved to the end, in rising order; their digests are not checked here."""
    folder = Path(run) / FOLDER
    found = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    return sorted(int(p.name) for p in found if (p / MANIFEST).is_file())


def manifest(run: Path | str, step: int) -> dict[str, Any]:
    """The manifest of a step: `step, rows, metrics, shapes, files`. Raises InputError when it is unreadable."""
    return read_manifest(step_folder(run, step), *CHECKPOINT)


def best_step(run: Path | str) -> int:
    """The good step with the highest validation ndcg@10; the newest one when none was validated.

    Raises InputError when the run has no checkpoint.
    """
    known = steps(run)
    if not known:
        raise InputError(f"{Path(run) / FOLDER}: no finished checkpoint; train the run, or name another one")
    scores = {step: manifest(run, step)["metrics"].get(BEST_METRIC) for step in known}
    scored = [step for step in known if scores[step] is not None]
    return max(scored, key=lambda step: scores[step]) if scored else known[-1]


def check_step(run: Path | str, step: int, part: str | None = None) -> list[str]:
    """What is wrong with the bytes of a step (or of one part of it, such as `params`), a line each."""
    files = manifest(run, step)["files"]
    if part is not None:
        files = {name: facts for name, facts in files.items() if "/" not in name or name.startswith(f"{part}/")}
    return verify_files(step_folder(run, step), files)


def tree_shapes(tree: Any) -> dict[str, list[Any]]:
    """`path -> [shape, dtype]` of every array of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): [list(x.shape), str(np.dtype(x.dtype))] for path, x in leaves}


def check_shapes(run: Path | str, step: int, wanted: Any, part: str = "params") -> None:
    """Raise InputError naming the first array whose shape differs from `wanted` (or that is missing)."""
    found, folder = manifest(run, step)["shapes"][part], step_folder(run, step)
    for path, shape in tree_shapes(wanted).items():
        if found.get(path) != shape:
            raise InputError(
                f"{folder}: {part}{path} is {_shown(found.get(path))} there and {_shown(shape)} in this model; "
                "use the configuration and dataset the run was trained with"
            )
    if extra := sorted(set(found) - set(tree_shapes(wanted))):
        raise InputError(f"{folder}: {part}{extra[0]} is not in this model; use the configuration it was trained with")


def pick_step(run: Path | str, which: int | str = "best") -> int:
    """A step by number, `best` or `latest`. Raises InputError naming the steps there are."""
    if which == "best":
        return best_step(run)
    known = steps(run)
    if which == "latest" and known:
        return known[-1]
    if str(which).isdigit() and int(which) in known:
        return int(which)
    raise InputError(f"{Path(run) / FOLDER}: no finished step {which!r}; there are {known or 'none'}, or best, latest")


def load_params(run: Path | str, which: int | str, abstract: Any) -> tuple[int, Any]:
    """`(step, parameters)` shaped and placed like `abstract` (leaves without a place: whole, on this process's first
    device); bytes and shapes are checked first.

    When the step is damaged, the newest good one before it is taken, and said so. Raises InputError when none is left.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding or here), abstract)
    first = pick_step(run, which)
    for step in [first, *(s for s in reversed(steps(run)) if s != first)]:
        if problems := check_step(run, step, "params"):
            note(f"checkpoint {step} is damaged and passed over: {problems[0]}")
            continue
        check_shapes(run, step, abstract)
        return step, ocp.load_checkpointables(step_folder(run, step), {"params": abstract})["params"]
    raise InputError(f"{Path(run) / FOLDER}: every checkpoint is damaged; restore one from a copy or train again")


def _shown(shape: list[Any] | None) -> str:
    return "missing" if shape is None else f"{'x'.join(map(str, shape[0])) or 'scalar'} {shape[1]}"
