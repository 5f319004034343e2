"""Everything a step changes: parameters, optimiser moments, step count."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from m6rec_jax.model.load import Blueprint


class TrainState(NamedTuple):
    """`params` and `optimizer` trees on the mesh; `step` counts batches, `skipped` those with a gradient not finite."""

    params: Any
    optimizer: Any
    step: jax.Array
    skipped: jax.Array


def init_state(blueprint: Blueprint, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state, placed by the mesh in force."""
    params = blueprint.init(seed)
    return TrainState(params, jax.jit(optimizer.init)(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def abstract_state(state: TrainState) -> TrainState:
    """Shapes, types and places of a state, without its values: what a checkpoint is loaded into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
