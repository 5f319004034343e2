"""The optimiser, its schedule, and what weight decay leaves alone."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx

from m6rec_jax.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine down to `final` of the peak at the last step."""
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup, max(steps, config.warmup + 1), config.learning_rate * config.final
    )


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov and Hutter 2019) with decay on layer matrices only."""
    adam = optax.adamw(
        learning_rate(config, steps), config.b1, config.b2, weight_decay=config.weight_decay, mask=decays
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adam)


def decays(params: Any) -> Any:
    """True for matrices inside layers; norms and embedding tables are left alone."""
    layer_matrix = lambda path, x: "block" in jax.tree_util.keystr(path) and x.ndim > 2  # noqa: E731
    return jax.tree_util.tree_map_with_path(layer_matrix, params)


def pure(state: nnx.State) -> Any:
    """A state as nested dicts of arrays: what optax and Orbax see."""
    return nnx.to_pure_dict(state)
