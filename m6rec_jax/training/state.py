"""Everything a step changes: parameters, optimiser moments, step count."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from m6rec_jax.config import PruneConfig
from m6rec_jax.model.load import Blueprint
from m6rec_jax.objectives.generator import Replacing
from m6rec_jax.training.beside import Beside, begun
from m6rec_jax.training.guards import NEW, Guard
from m6rec_jax.training.prune import Masks, fresh


class TrainState(NamedTuple):
    """`params` and `optimizer` trees on the mesh; `step` counts batches, `skipped` those that changed nothing.

    `average`: the running mean of the parameters (`optim.average`), None without one. `guard`: what tells such batches.
    `masks`: which weights are pruned (`prune.sparsity`), None where none are to be. `beside`: what replaced-token detection
    trains beside the model.
    """

    params: Any
    optimizer: Any
    step: jax.Array
    skipped: jax.Array
    average: Any = None
    guard: Guard = NEW
    masks: Masks | None = None
    beside: Beside | None = None

    @property
    def served(self) -> Any:
        """The parameters that are validated, kept and served."""
        return self.params if self.average is None else self.average

    def begun_with(self, params: Any) -> TrainState:
        """This state with other parameters to begin with."""
        return self._replace(params=params, average=None if self.average is None else jax.tree.map(jnp.copy, params))


def init_state(
    blueprint: Blueprint,
    optimizer: optax.GradientTransformation,
    seed: int,
    averaged: bool = False,
    prune: PruneConfig = PruneConfig(),  # noqa: B008  frozen
    replacing: Replacing | None = None,
) -> TrainState:
    """A fresh state, placed by the mesh in force."""
    params, zero = blueprint.init(seed), jnp.zeros((), jnp.int32)
    average = jax.tree.map(jnp.copy, params) if averaged else None
    guard = Guard(*map(jnp.array, NEW))
    beside = begun(replacing, blueprint.config.width, optimizer, seed)
    return TrainState(
        params, jax.jit(optimizer.init)(params), zero, jnp.copy(zero), average, guard, fresh(prune, params), beside
    )


def abstract_state(state: TrainState) -> TrainState:
    """Shapes, types and places of a state, without its values: what a checkpoint is loaded into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
