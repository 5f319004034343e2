"""Reading checkpoints: which steps are good, and their parameters alone (no optimiser, no trainer needed).

A step is good once its manifest lies in its folder; the manifest holds a digest of every file and one of what every
array held (`artifacts.content`), because the storage layer restores arrays whose bits have flipped without noticing.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from m6rec_jax.artifacts.best import gain, metric_of
from m6rec_jax.artifacts.content import content, differing, digests
from m6rec_jax.artifacts.manifest import MANIFEST, SEAL, read_manifest, verify_files
from m6rec_jax.artifacts.schemas import CHECKPOINT
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note

FOLDER = "checkpoints"


def step_folder(run: Path | str, step: int) -> Path:
    """Where a step lies, as an absolute path: the storage layer takes no other."""
    return Path(run).absolute() / FOLDER / str(step)


def steps(run: Path | str) -> list[int]:
    """Steps of a run that were saved to the end, in rising order; their digests are not checked here."""
    folder = Path(run) / FOLDER
    found = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    return sorted(int(p.name) for p in found if (p / MANIFEST).is_file())


def manifest(run: Path | str, step: int) -> dict[str, Any]:
    """The manifest of a step: `step, rows, metrics, shapes, content, files`. Raises InputError when it is not as written."""
    folder = step_folder(run, step)
    said = read_manifest(folder, *CHECKPOINT)
    if SEAL not in said:
        raise InputError(f"{folder / MANIFEST}: not as it was written (it has no seal); take it from a copy")
    return said


def best_step(run: Path | str) -> int:
    """The good step that is best by the run's `train.best`, the first of equals; the newest one when none was measured.
    Steps whose manifest is damaged do not count.

    Raises InputError when the run has no checkpoint.
    """
    known = steps(run)
    if not known:
        raise InputError(f"{Path(run) / FOLDER}: no finished checkpoint; train the run, or name another one")
    name, read, scores = metric_of(run), list[int](), dict[int, float]()
    for step in known:
        with suppress(InputError):  # whoever loads a step says what is wrong with it
            metrics = manifest(run, step)["metrics"]
            read.append(step)
            if name in metrics:
                scores[step] = gain(name, metrics[name])
    return max(scores, key=lambda step: (scores[step], -step)) if scores else (read or known)[-1]


def check_step(run: Path | str, step: int, part: str | None = None) -> list[str]:
    """What is wrong with the bytes of a step (or of one part of it, such as `params`), a line each."""
    try:
        files = manifest(run, step)["files"]
    except InputError as error:
        return [str(error)]
    if part is not None:
        files = {name: facts for name, facts in files.items() if "/" not in name or name.startswith(f"{part}/")}
    return verify_files(step_folder(run, step), files)


def tree_shapes(tree: Any) -> dict[str, list[Any]]:
    """`path -> [shape, dtype]` of every array of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): [list(x.shape), str(np.dtype(x.dtype))] for path, x in leaves}


def check_content(run: Path | str, step: int, **parts: Any) -> list[str]:
    """Which arrays of these parts of a step (`params=tree`), as they were loaded, are not those that were saved."""
    said, folder = manifest(run, step)["content"], step_folder(run, step)
    return [
        f"{folder}: {part}{path} does not hold what was saved (its digest differs)"
        for part, tree in parts.items()
        for path in differing(tree, said[part])
    ]


def check_arrays(run: Path | str, step: int) -> list[str]:
    """Load every array of a step, whole and on this process's first device, and say which are not those that were saved,
    a line each. Asks for no model: names and shapes are those of the storage layer."""
    said, folder = manifest(run, step)["content"], step_folder(run, step)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    problems = []
    for part, expected in said.items():  # one after the other: each is as large as the model, or larger
        try:
            kept = ocp.checkpointables_metadata(folder).metadata[part]
            asked = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), kept)
            found = digests(content(ocp.load_checkpointables(folder, {part: asked})[part]))
        except Exception as error:
            problems.append(f"{folder}: {part} cannot be loaded ({str(error).splitlines()[0] or type(error).__name__})")
            continue
        loaded = {_plain(path): digest for path, digest in found.items()}
        problems += [
            f"{folder}: {part}{path} does not hold what was saved (its digest differs)"
            for path, digest in expected.items()
            if loaded.get(_plain(path)) != digest
        ]
    return problems


def _plain(path: str) -> str:
    """A path without what tells a tuple's field from a key: loaded without a model, all are keys."""
    return "/".join(re.findall(r"[\w-]+", path))


def check_shapes(run: Path | str, step: int, wanted: Any, part: str = "params") -> None:
    """Raise InputError naming the first array whose shape differs from `wanted` (or that is missing)."""
    found, folder = manifest(run, step)["shapes"][part], step_folder(run, step)
    for path, shape in tree_shapes(wanted).items():
        if found.get(path) != shape:
            raise InputError(
                f"{folder}: {part}{path} is {_shown(found.get(path))} there and {_shown(shape)} in this model; "
                "use the configuration and dataset the run was trained with, or train anew what an earlier version trained"
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
        params = ocp.load_checkpointables(step_folder(run, step), {"params": abstract})["params"]
        if problems := check_content(run, step, params=params):
            note(f"checkpoint {step} is damaged and passed over: {problems[0]}")
            continue
        return step, params
    raise InputError(f"{Path(run) / FOLDER}: every checkpoint is damaged; restore one from a copy or train again")


def _shown(shape: list[Any] | None) -> str:
    return "missing" if shape is None else f"{'x'.join(map(str, shape[0])) or 'scalar'} {shape[1]}"
