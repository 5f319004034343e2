"""Attention under the one visibility rule, for whole rows and for beams over a shared prefix."""

from __future__ import annotations

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

NEVER = -1e30  # a score that softmax turns into an exact zero, without the NaN of an all -inf row


def attend(
    q: Float[Array, "B T K G h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    k_start: Int[Array, "B T"],
    k_end: Int[Array, "B T"],
) -> Float[Array, "B T K G h"]:
    """Grouped-query attention where query t sees keys `k_start[t] <= s < k_end[t]` (DESIGN section 4).

    The range is compared inside the softmax fusion; no mask array is kept. A query with an empty range
    (padding) gets a mean of values that no loss reads. The backward pass computes scores again from each query's largest
    score and sum (Dao et al. 2022), so that no `[B, heads, T, S]` array lives from one pass to the other. Works on what one
    device holds: `kernels.attend` deals rows, heads and queries out.
    """
    B, T, K, G, h = q.shape
    rows = lambda x: jnp.tile(x, (1, G))[:, None, :]  # noqa: E731  of queries, the groups one behind another
    queries = _copied(jnp.moveaxis(q, 1, 3).reshape(B, K, G * T, h))
    keys, values = (_copied(jnp.swapaxes(x, 1, 2)) for x in (k, v))
    mixed = _attend(queries, keys, values, rows(k_start), rows(k_end))
    return jnp.moveaxis(mixed.reshape(B, K, G, T, h), 3, 1)


# Products of heads: letters b, k stand on both sides. XLA's programs for a CPU multiply bfloat16 as such only where both
# sides lie as a plain product of matrices reads them; of any other they make float32 first, and are several times slower.
def _heads(x: Array, y: Array, of_x: int, of_y: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Array:
    """Products of each head, summed over axis `of_x` of `x` and `of_y` of `y`."""
    dims = (((of_x,), (of_y,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=dtype)


def _copied(x: Float[Array, "B K m n"]) -> Float[Array, "B K m n"]:
    """A turned array laid out in its new order, before any product sees that it was turned."""
    return jax.lax.optimization_barrier(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


def _seen(start: Array, end: Array, keys: int) -> Array:
    """Which keys a query sees, keys in the last axis; the ranges have one axis of length 1 there."""
    s = jnp.arange(keys)
    return (s >= start) & (s < end)


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, start: Array, end: Array) -> Array:
    return _attend_forward(q, k, v, start, end)[0]


def _attend_forward(q: Array, k: Array, v: Array, start: Array, end: Array) -> tuple[Array, tuple[Array, ...]]:
    scores = _heads(q, k, 3, 3) * q.shape[-1] ** -0.5
    scores = jnp.where(_seen(start[..., None], end[..., None], k.shape[2]), scores, NEVER)
    most = jnp.max(scores, axis=-1)
    # What is summed is what values are multiplied by: rounded, and written once.
    weights = jax.lax.optimization_barrier(jnp.exp(scores - most[..., None]).astype(v.dtype))
    total = jnp.sum(weights.astype(jnp.float32), axis=-1)
    mixed = (_heads(weights, v, 3, 2) / total[..., None]).astype(q.dtype)
    return mixed, (q, k, v, start, end, mixed, most + jnp.log(total))


def _attend_backward(kept: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    q, k, v, start, end, mixed, mass = kept
    g = _copied(g)
    # Keys outside, queries inside: what is summed over queries then stands the right way for the products.
    row = lambda x: x[:, :, None, :]  # noqa: E731
    s = jnp.arange(k.shape[2])[:, None]
    seen = (s >= row(start)) & (s < row(end))
    scale = q.shape[-1] ** -0.5
    weights = jnp.exp(jnp.where(seen, _heads(k, q, 3, 3) * scale, NEVER) - row(mass))
    along = jnp.sum(g.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1)
    d_scores = (weights * (_heads(v, g, 3, 3) - row(along))).astype(q.dtype)
    scaled = lambda x: (x * scale).astype(q.dtype)  # noqa: E731
    dq = jnp.swapaxes(scaled(_heads(_copied(jnp.swapaxes(k, 2, 3)), d_scores, 3, 2)), 2, 3)
    dk, dv = scaled(_heads(d_scores, q, 3, 2)), _heads(weights.astype(v.dtype), g, 3, 2, v.dtype)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def attend_prefix(
    q: Float[Array, "B M T K G h"],
    prefix: tuple[Float[Array, "B K P h"], Float[Array, "B K P h"]],
    prefix_starts: Int[Array, " B"],
    prefix_lengths: Int[Array, " B"],
    suffix: tuple[Float[Array, "B S M K h"], Float[Array, "B S M K h"]],
    ancestors: Int[Array, "B M S"],
    slot: int | Int[Array, ""],
) -> Float[Array, "B M T K G h"]:
    """Beams attend to one prefix a user and to their own short suffix (bifurcated attention, arXiv 2403.08845).

    Beams are folded into the query axis, so the prefix is read once a user. `ancestors[b, m, s]` is the lane
    that wrote slot s of beam m; query t sits in slot `slot + t` and sees slots up to its own. The two parts meet by
    their maxima and sums of exponentials, in float32.
    """
    B, M, T, K, G, h = q.shape
    prefix_k, prefix_v = prefix
    queries, near, values = own(q * h**-0.5, suffix, ancestors, slot)
    folded = queries.reshape(B, K, M * T * G, h)
    far = jnp.einsum("bkqh,bkph->bkqp", folded, prefix_k, preferred_element_type=jnp.float32)
    seen = _seen(prefix_starts[:, None], prefix_lengths[:, None], prefix_k.shape[2])
    far = jnp.where(seen[:, None, None], far, NEVER)
    near = [scores.reshape(B, K, M * T * G, -1) for scores in near]
    most = reduce(jnp.maximum, [scores.max(-1, keepdims=True) for scores in (far, *near)])
    far, *near = (jnp.exp(scores - most) for scores in (far, *near))
    total = sum(weights.sum(-1, keepdims=True) for weights in (far, *near))
    mixed = jnp.einsum("bkqp,bkph->bkqh", far.astype(q.dtype), prefix_v, preferred_element_type=jnp.float32)
    mixed += mix_own([weights.reshape(B, K, M, T * G, -1) for weights in near], values).reshape(mixed.shape)
    return jnp.moveaxis((mixed / total).astype(q.dtype).reshape(B, K, M, T, G, h), 1, 3)


# What each beam wrote itself makes thousands of tiny products. Up to so many slots they are taken slot by slot, as sums of
# products in one loop, at a fraction of the cost of matrix products; of more slots all at once.
SHORT = 8


def own(
    q: Float[Array, "B M T K G h"],
    suffix: tuple[Float[Array, "B S M K h"], Float[Array, "B S M K h"]],
    ancestors: Int[Array, "B M S"],
    slot: int | Int[Array, ""],
) -> tuple[Float[Array, "B K M R h"], list[Float[Array, "B K M R s"]], list[Float[Array, "B K M s h"]]]:
    """Queries with R = T x G, and in lots of slots their scores with the beam's own keys, float32, and its values.

    `NEVER` where a query does not see a slot. Queries come scaled.
    """
    B, M, T, K, G, h = q.shape
    # What lies behind is not written yet.
    S = min(ancestors.shape[2], slot + T) if isinstance(slot, int) else ancestors.shape[2]
    queries = jnp.moveaxis(q, 3, 1).reshape(B, K, M, T * G, h)
    last = slot + jnp.repeat(jnp.arange(T), G)[:, None]  # slot of each query
    scores, values = [], []
    for lot in np.arange(S)[:, None] if S <= SHORT else [np.arange(S)]:
        at = jnp.arange(B)[:, None, None], lot, ancestors[:, :, lot]
        k, v = (jnp.moveaxis(x[at], 3, 1) for x in suffix)
        scores.append(jnp.where(lot <= last, _products(queries, k), NEVER))
        values.append(v)
    return queries, scores, values


def mix_own(
    weights: list[Float[Array, "B K M R s"]], values: list[Float[Array, "B K M s h"]]
) -> Float[Array, "B K M R h"]:
    """Values of the beams' own slots, weighted and summed, float32."""
    if len(values) == 1 and values[0].shape[3] > 1:
        return jnp.einsum("bkmrs,bkmsh->bkmrh", weights[0], values[0], preferred_element_type=jnp.float32)
    return reduce(jnp.add, [w * v.astype(jnp.float32) for w, v in zip(weights, values, strict=True)])


def _products(queries: Float[Array, "B K M R h"], keys: Float[Array, "B K M s h"]) -> Float[Array, "B K M R s"]:
    if keys.shape[3] > 1:
        return jnp.einsum("bkmrh,bkmsh->bkmrs", queries, keys, preferred_element_type=jnp.float32)
    return jnp.sum(queries.astype(jnp.float32) * keys.astype(jnp.float32), axis=-1, keepdims=True)
