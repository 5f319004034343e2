"""The parts of a Transformer layer as plain functions over arrays, and how a parameter is declared."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.backend import get_default_device
from jaxtyping import Array, Float, Int

from m6rec_jax.model import sharding

Part = tuple[Array, int] | None  # (number of a microbatch, how many there are); row r of a batch is in `r % how many`


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from a normal cut at two deviations, with its logical axes beside it."""
    value = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32) * std
    return nnx.Param(value, axes=axes)


def scale(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """The gain of an RMSNorm, stored as its distance from one."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)


def _apart(like: Array, *x: Array) -> tuple[Array, ...]:
    """`x` as arrays that are made before what reads them is, where that pays: on a CPU, of what is narrower than float32.

    There a loop makes one array, so XLA keeps in float32 what two of them share, and makes float32 of what stands around a
    sum. In float32 to make it once is cheaper.
    """
    narrow = like.dtype != jnp.float32 and get_default_device().platform == "cpu"
    return jax.lax.optimization_barrier(x) if narrow else x


def rms_norm(x: Float[Array, "*n D"], gain: Float[Array, " D"], eps: float) -> Float[Array, "*n D"]:
    """Root-mean-square norm in float32 (Zhang and Sennrich 2019)."""
    # Where a program is one device's part, jax must say itself over which devices a gradient is summed.
    manual = bool(jax.sharding.get_abstract_mesh().manual_axes)
    return _normed(x, gain, eps)[0] if manual else _rms_norm(eps, x, gain)


def _normed(x: Array, gain: Array, eps: float) -> tuple[Array, Array]:
    y = x.astype(jnp.float32)
    size = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * size * (1.0 + gain)).astype(x.dtype), size


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(eps: float, x: Array, gain: Array) -> Array:
    return _normed(x, gain, eps)[0]


def _rms_norm_forward(eps: float, x: Array, gain: Array) -> tuple[Array, tuple[Array, ...]]:
    out, size = _normed(x, gain, eps)
    return out, (x, gain, size)


def _rms_norm_backward(eps: float, kept: tuple[Array, ...], g: Array) -> tuple[Array, Array]:
    """From `x` as it came: jax would keep two float32 copies of it."""
    x, gain, size = kept
    y, wide = x.astype(jnp.float32) * size, g.astype(jnp.float32)
    of_y = wide * (1.0 + gain)
    (along,) = _apart(x, jnp.mean(of_y * y, axis=-1, keepdims=True))
    dx = size * (of_y - y * along)
    return dx.astype(x.dtype), jnp.sum(wide * y, axis=tuple(range(x.ndim - 1))).astype(gain.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class Turns(NamedTuple):
    """Sine and cosine of the angle of each pair of a head at each position, float32."""

    sin: Float[Array, "*n h2"]
    cos: Float[Array, "*n h2"]

    def over(self, axes: int) -> Turns:
        """The same for so many head axes, which stand before the pairs."""
        return Turns(*(jnp.expand_dims(x, range(-1 - axes, -1)) for x in self))


@jax.custom_vjp
def rope(x: Float[Array, "*n h"], turns: Turns) -> Float[Array, "*n h"]:
    """Rotate pairs (i, i + h/2) of a head (Su et al. 2021), in float32.

    Its gradient is rotated back: what jax would derive adds up halves padded with zeros, in float32. `turns` have none.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = turns
    halves = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([half.astype(x.dtype) for half in halves], axis=-1)


rope.defvjp(lambda x, turns: (rope(x, turns), turns), lambda turns, g: (rope(g, Turns(-turns.sin, turns.cos)), None))


def rope_turns(positions: Int[Array, "*n"], head_dim: int, theta: float) -> Turns:
    """By how much each pair is turned at each position; the same for all layers.

    The barrier keeps XLA from taking sines anew wherever they are read: in each layer, for each head, forth and back.
    """
    inverse = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * inverse
    return Turns(*jax.lax.optimization_barrier((jnp.sin(angles), jnp.cos(angles))))


@jax.custom_vjp
def swiglu(gate: Float[Array, "*n F"], up: Float[Array, "*n F"]) -> Float[Array, "*n F"]:
    """silu(gate) * up (Shazeer 2020), in float32: rounded once, and not after each of its steps.

    Its gradient is made of the arguments anew: what jax would keep of the steps in between is three float32 arrays.
    """
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def _swiglu_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    gate, up = _apart(g, *kept)
    x, wide = gate.astype(jnp.float32), g.astype(jnp.float32)
    share = jax.nn.sigmoid(x)
    d_gate = (wide * up.astype(jnp.float32) * share * (1 + x * (1 - share))).astype(gate.dtype)
    d_gate, gate = _apart(g, d_gate, gate)
    x = gate.astype(jnp.float32)
    return d_gate, (wide * x * jax.nn.sigmoid(x)).astype(up.dtype)


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


def dropout(x: Array, rate: float, key: jax.Array | None, *axes: str | None, part: Part = None) -> Array:
    """Zero a share of entries and scale up the rest; `key=None` or a rate of 0 leaves `x` as it is.

    One random byte an entry decides (random bits are a real cost on CPU), so the rate is rounded to 1/256.
    `axes` are the logical axes of `x`; of a microbatch the mask is that of its rows in the whole batch.
    """
    threshold = round(rate * 256)
    if key is None or threshold == 0:
        return x
    keep = keep_mask(key, x.shape, threshold, *axes, part=part)
    return jnp.where(keep, x * (256.0 / (256 - threshold)), 0).astype(x.dtype)


def keep_mask(key: jax.Array, shape: tuple[int, ...], threshold: int, *axes: str | None, part: Part = None) -> Array:
    """True with probability 1 - threshold/256."""
    if part is None:
        return sharding.place(jax.random.bits(key, shape, jnp.uint8), *axes) >= threshold
    number, parts = part
    bits = sharding.place(jax.random.bits(key, (shape[0] * parts, *shape[1:]), jnp.uint8), *axes)
    return jax.lax.dynamic_index_in_dim(sharding.split_rows(bits, parts), number, axis=1, keepdims=False) >= threshold
