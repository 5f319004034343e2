"""Products of activations with weights, whose gradients are written in the order that every backend multiplies fast.

What jax derives for a weight's gradient is a product with both sides turned. XLA's program for a CPU multiplies that in
bfloat16 by its slowest loop, at a fortieth of the speed of the same product the other way about.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

KEPT = "product"  # by this name model.remat=dots keeps them: no policy sees into a gradient rule
Places = jax.sharding.PartitionSpec | None


def product(subscripts: str, x: jax.Array, w: jax.Array, place: Places = None) -> jax.Array:
    """`jnp.einsum(subscripts, x, w, out_sharding=place)`; no letter may be on one side alone, so that gradients are sums."""
    # Where a program is one device's part, jax must say itself over which devices a gradient is summed.
    manual = bool(jax.sharding.get_abstract_mesh().manual_axes)
    made = jnp.einsum(subscripts, x, w, out_sharding=place) if manual else _product(subscripts, place, x, w)
    return checkpoint_name(made, KEPT)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(subscripts: str, place: Places, x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, w, out_sharding=place)


def _forward(
    subscripts: str, place: Places, x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(subscripts, place, x, w), (x, w)


def _backward(
    subscripts: str, place: Places, kept: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (x, w), (ins, out) = kept, subscripts.split("->")
    of_x, of_w = ins.split(",")
    where = lambda like: None if place is None else jax.typeof(like).sharding  # noqa: E731
    dx = jnp.einsum(f"{out},{of_w}->{of_x}", g, w, out_sharding=where(x))
    dw = jnp.einsum(f"{of_x},{out}->{of_w}", x, g, out_sharding=where(w))
    return dx.astype(x.dtype), dw.astype(w.dtype)


_product.defvjp(_forward, _backward)
