"""The unfinished tuning of a task: one file, replaced whole, from which the same command goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from m6rec_jax.artifacts.atomic import atomic_path
from m6rec_jax.artifacts.tuned import write_arrays
from m6rec_jax.errors import InputError
from m6rec_jax.model.tuning import Tuned
from m6rec_jax.training.tune.step import TuneState

FILE = "unfinished.safetensors"


class Best(NamedTuple):
    """The best validation so far: its step, its figures, the numbers it was of, and validations since."""

    step: int
    figures: dict[str, float]
    tuned: Tuned
    since: int


def save(folder: Path, state: TuneState, best: Best) -> None:
    """Atomically write all that tuning goes on from."""
    about = {"step": int(state.step), "best": [best.step, best.figures, best.since]}
    parts = {"tuned": state.tuned, "moments": state.moments, "best": best.tuned}
    leaves = {name: {f"{i:05}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))} for name, tree in parts.items()}  # fmt: skip
    with atomic_path(folder / FILE) as path:
        write_arrays(path, leaves, {"about": json.dumps(about)})


def restore(folder: Path, fresh: TuneState) -> tuple[TuneState, Best] | None:
    """What `save` wrote, shaped like `fresh`; None when nothing was written. Raises InputError when it is damaged."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads(file.metadata()["about"])

            def tree(name: str, like: Any) -> Any:
                leaves, shape = jax.tree.flatten(like)
                found = [file.get_tensor(f"{name}.{i:05}") for i in range(len(leaves))]
                if differ := [(x.shape, y.shape) for x, y in zip(found, leaves, strict=True) if x.shape != y.shape]:
                    raise ValueError(f"{name} is {differ[0][0]} and not {differ[0][1]}")
                return shape.unflatten([jnp.asarray(x) for x in found])

            state = TuneState(tree("tuned", fresh.tuned), tree("moments", fresh.moments), jnp.int32(about["step"]))
            step, figures, since = about["best"]
            return state, Best(step, figures, tree("best", fresh.tuned), since)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not as it was written ({type(error).__name__}: {error}); remove it to begin anew") from None  # fmt: skip
