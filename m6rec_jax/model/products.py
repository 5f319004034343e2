"""Products of activations with weights, whose gradients are written in the order that every backend multiplies fast.

What jax derives for a weight's gradient is a product with both sides turned. XLA's program for a CPU multiplies that in
bfloat16 by its slowest loop, at a fortieth of the speed of the same product the other way about.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from m6rec_jax.model.quantised_products import quantised_product

KEPT = "product"  # by this name model.remat=dots keeps them: no policy sees into a gradient rule
Places = jax.sharding.PartitionSpec | None


def product(subscripts: str, x: jax.Array, w: jax.Array, place: Places = None, quantise: str = "none") -> jax.Array:
    """`jnp.einsum(subscripts, x, w, out_sharding=place)`; no letter may be on one side alone, so that gradients are sums.

    `quantise`: int8 or fp8 rounds both sides first (model/quantised_products)."""
    if quantise != "none":
        return checkpoint_name(quantised_product(subscripts, quantise, place, x, w), KEPT)
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
    x = jax.lax.optimization_barrier(x)  # as it was kept: or it is made anew, entry by entry, while it is turned
    dx = jnp.einsum(f"{out},{of_w}->{of_x}", g, w, out_sharding=where(x))
    if x.size <= g.size:
        dw = jnp.einsum(f"{of_x},{out}->{of_w}", x, g, out_sharding=where(w))
    else:
        dw = _turned(of_x, out, of_w, x, g, where(w))
    return dx.astype(x.dtype), dw.astype(w.dtype)


_product.defvjp(_forward, _backward)


def _turned(of_x: str, out: str, of_w: str, x: jax.Array, g: jax.Array, place: Any) -> jax.Array:
    """A weight's gradient with the letters of `g` first, then turned: so that of the two sides the smaller one is."""
    order = sorted(range(len(of_w)), key=lambda i: of_w[i] not in out)
    turned = "".join(of_w[i] for i in order)
    if place is not None:
        spec = (*place.spec, *(None,) * (len(of_w) - len(place.spec)))
        place = place.update(spec=jax.sharding.PartitionSpec(*(spec[i] for i in order)))
    dw = jnp.einsum(f"{out},{of_x}->{turned}", g, x, out_sharding=place)
    back = [order.index(i) for i in range(len(order))]
    return jnp.transpose(jax.lax.optimization_barrier(dw), back)
