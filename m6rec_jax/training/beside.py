"""What replaced-token detection trains beside the model: the generator and the head, saved with the optimiser, never served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m6rec_jax.config import Config
from m6rec_jax.data.records import HISTORY
from m6rec_jax.data.tasks import Task
from m6rec_jax.errors import InputError
from m6rec_jax.model import sharding
from m6rec_jax.model.load import Blueprint
from m6rec_jax.objectives.detection import Detection
from m6rec_jax.objectives.generator import Replacing, generator_of

FOLLOWS = 0.05  # share of a step's mean reward in the baseline


class Beside(NamedTuple):
    """Part of the state: `params` and `moments` of the `generator` and of the `head`, each clipped and moved by itself, and
    the running mean of the generator's reward, in nats."""

    params: dict[str, Any]
    moments: dict[str, Any]
    baseline: jax.Array


def begun(replacing: Replacing | None, width: int, optimizer: optax.GradientTransformation, seed: int) -> Beside | None:
    """A fresh generator and a head that knows nothing of states `width` wide; None where nothing is replaced."""
    if replacing is None:
        return None
    head = {"gain": sharding.place(jnp.zeros(width), None), "bias": jnp.zeros(())}
    params = {"generator": replacing.generator.init((seed + 1) % 2**32), "head": head}
    moments = {name: jax.jit(optimizer.init)(part) for name, part in params.items()}
    return Beside(params, moments, jnp.array(np.log(0.5), jnp.float32))


def stepped(
    optimizer: optax.GradientTransformation, beside: Beside, grads: dict[str, Any], found: Detection
) -> tuple[Beside, jax.Array]:
    """What stands beside the model after a step, and whether its gradients are finite, inside jit."""
    hidden = jnp.maximum(found.hidden, 1)
    grads = {**grads, "generator": jax.tree.map(lambda g: g / hidden, grads["generator"])}
    params, moments = {}, {}
    for name, part in beside.params.items():
        updates, moments[name] = optimizer.update(grads[name], beside.moments[name], part)
        params[name] = optax.apply_updates(part, updates)
    mean = found.reward / jnp.maximum(found.replaced, 1)
    baseline = jnp.where(found.replaced > 0, beside.baseline + FOLLOWS * (mean - beside.baseline), beside.baseline)
    return Beside(params, moments, baseline), jnp.isfinite(optax.tree.norm(grads))


def replacing_of(
    config: Config, blueprint: Blueprint, pools: Sequence[Task], mesh: jax.sharding.Mesh
) -> Replacing | None:
    """What a step must know of replaced-token detection; None where the mixture has no task of it. `pools`: the task of each.

    Raises InputError for settings that need such a task, or do not fit the items or the mesh.
    """
    tasks = tuple(i for i, task in enumerate(pools) if task.objective == "replaced")
    asked, way_out = config.replaced, "set mixture.tasks.behaviour-replaced=0.2, or replaced.{0}=0"
    if not tasks:
        for name in ("reward", "augment"):
            if value := getattr(asked, name):
                raise InputError(f"replaced.{name}={value}: no task of the mixture is of replaced-token detection, so there is no generator; {way_out.format(name)}")  # fmt: skip
        return None
    histories = tuple(i for i, task in enumerate(pools) if task.objective == "causal" and HISTORY in task.records)
    if asked.augment and not histories:
        raise InputError(f"replaced.augment={asked.augment}: no task of the mixture reads histories left to right; set mixture.tasks.next-item=0.8, or replaced.augment=0")  # fmt: skip
    spelled = [s.name for s in blueprint.vocab.slices if s.name.endswith("level2")]
    if asked.augment and spelled:
        raise InputError(f"replaced.augment={asked.augment}: items of the dataset are spelled by several codes, and half a spelling would be asked to go on as another; prepare with --levels 1, or set replaced.augment=0")  # fmt: skip
    generator = generator_of(blueprint, asked)
    _check_fit(generator, mesh)
    return Replacing(generator, asked, tasks, histories, config.data.replace_rate)


def _check_fit(generator: Blueprint, mesh: jax.sharding.Mesh) -> None:
    if mesh.shape["stage"] > 1:
        raise InputError(f"mesh.stage={mesh.shape['stage']} and a task of replaced-token detection: its generator is not dealt over stages; set mesh.stage=1, or take the task out")  # fmt: skip
    config = generator.config
    for axis, name, size in (
        ("tensor", "columns of the generator's feed-forward layer", config.ffn_width),
        ("fsdp", "numbers of the generator's width", config.width),
    ):
        if size % mesh.shape[axis]:
            raise InputError(f"mesh.{axis}={mesh.shape[axis]} does not divide the {size} {name}; change replaced.width, now {config.width}")  # fmt: skip
