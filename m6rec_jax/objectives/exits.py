"""Early exit in training: every layer answers tasks with options (`model.exits`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m6rec_jax.errors import InputError
from m6rec_jax.model.items import Catalogues
from m6rec_jax.model.transformer import Transformer
from m6rec_jax.objectives.loss import cross_entropy
from m6rec_jax.vocab import OPTIONS


def exit_term(
    model: Transformer,
    states: Float[Array, "N B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    items: Catalogues,
) -> Float[Array, ""]:
    """What, added to the last layer's summed loss, makes of it for options the sum over layers k of 2k / (N (N + 1)) x the loss
    of layer k (M6-Rec, arXiv 2205.08084; the weights sum to 1). Other targets are asked of the last layer only.

    Each layer answers through the final norm and the same tables. Raises InputError when no task has options.
    """
    if not model.vocab.options:
        raise InputError("model.exits=true: no dataset has a task with options, and early exit answers no other; set model.exits=false")  # fmt: skip
    N, own = states.shape[0], model.vocab.slices[-1]
    assert own.name == OPTIONS
    weights = jnp.where((targets >= own.offset) & (targets < own.end), weights, 0)
    share = 2 * jnp.arange(1, N + 1) / (N * (N + 1)) - (jnp.arange(1, N + 1) == N)

    def add(total: Array, layer: tuple[Array, Array]) -> tuple[Array, None]:
        state, share = layer
        found = cross_entropy(model, state, targets, weights, jnp.zeros_like(targets), 1, items)
        return total + share * found.loss[0], None

    return jax.lax.scan(jax.checkpoint(add), jnp.zeros(()), (states, share))[0]
