"""Products of layers in eight bits while training (qwix, extra `quant`): `model.quantise`.

Each side is rounded to eight bits with a float scale for every row that a product does not sum over, anew at every step;
parameters and their gradients stay as they are, and rounding counts as the identity (Bengio et al. 2013). Of the three
products of a step two are in eight bits, that of the layer and that of the gradient going back through it. The weight's
gradient, which sums over all tokens, is in the arithmetic of the run (Wortsman et al. 2023, SwitchBack).
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from m6rec_jax.errors import InputError

TYPES = {
    "int8": (jnp.int8, jnp.int8),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}  # of numbers, and of their gradients


def check_quantise(quantise: str) -> None:
    """InputError where `model.quantise` needs a package that is not there."""
    if quantise != "none" and importlib.util.find_spec("qwix") is None:
        raise InputError(f"model.quantise={quantise} needs the package qwix: pip install 'm6rec-jax[quant]'; or none")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def quantised_product(subscripts: str, quantise: str, place: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    """`jnp.einsum(subscripts, x, w)` of both rounded to eight bits, in the type of `x`."""
    return _forward(subscripts, quantise, place, x, w)[0]


def _forward(subscripts: str, quantise: str, place: Any, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple]:
    made = _multiplied(subscripts, x, w, *(TYPES[quantise][0],) * 2, place)
    return made.astype(x.dtype), (x, w)


def _backward(subscripts: str, quantise: str, place: Any, kept: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, w), (ins, out) = kept, subscripts.split("->")
    of_x, of_w = ins.split(",")
    where = lambda like: None if place is None else jax.typeof(like).sharding.spec  # noqa: E731
    numbers, gradients = TYPES[quantise]
    dx = _multiplied(f"{out},{of_w}->{of_x}", g, w, gradients, numbers, where(x))
    dw = jnp.einsum(f"{of_x},{out}->{of_w}", x, g, out_sharding=where(w))
    return dx.astype(x.dtype), dw.astype(w.dtype)


quantised_product.defvjp(_forward, _backward)


def _multiplied(subscripts: str, x: jax.Array, y: jax.Array, of_x: Any, of_y: Any, place: Any) -> jax.Array:
    """The product of both sides rounded, placed as `place` says. Of its letters those of `x` come first, as a product of two
    arrays gives them: qwix's own einsum puts the sides the other way round, which no placing survives."""
    import qwix

    ins, out = subscripts.split("->")
    letters = ins.split(",")
    sides = [
        qwix.quantize(side, qtype, channelwise_axes=[i for i, letter in enumerate(of) if letter in out])
        for of, side, qtype in zip(letters, (x, y), (of_x, of_y), strict=True)
    ]
    summed = [[of.index(letter) for letter in letters[0] if letter not in out] for of in letters]
    total = jnp.int32 if jnp.issubdtype(of_x, jnp.integer) else jnp.float32
    left, right = (side.qvalue for side in sides)
    made = jax.lax.dot_general(left, right, (summed, ([], [])), preferred_element_type=total, out_sharding=place)
    made = made.astype(jnp.float32)
    for of, side, sums in zip(letters, sides, summed, strict=True):
        scale = jax.lax.squeeze(side.scale.astype(jnp.float32), sums)
        made = made * jax.lax.expand_dims(scale, [i for i, letter in enumerate(out) if letter not in of])
    return made
