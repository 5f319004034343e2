"""Attention under the one visibility rule, for whole rows and for beams over a shared prefix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m6rec_jax.model import sharding

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
    (padding) gets a mean of values that no loss reads.
    """
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    s = jnp.arange(k.shape[1])
    seen = (s >= k_start[..., None]) & (s < k_end[..., None])
    scores = jnp.where(seen[:, None, None], scores * q.shape[-1] ** -0.5, NEVER)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v, out_sharding=sharding.out("batch", None, "kv", None, None))


def attend_prefix(
    q: Float[Array, "B M T K G h"],
    prefix: tuple[Float[Array, "B K P h"], Float[Array, "B K P h"]],
    prefix_lengths: Int[Array, " B"],
    suffix: tuple[Float[Array, "B S M K h"], Float[Array, "B S M K h"]],
    ancestors: Int[Array, "B M S"],
    slot: int,
) -> Float[Array, "B M T K G h"]:
    """Beams attend to one prefix a user and to their own short suffix (bifurcated attention, arXiv 2403.08845).

    Beams are folded into the query axis, so the prefix is read once a user. `ancestors[b, m, s]` is the lane
    that wrote slot s of beam m; query t sits in slot `slot + t` and sees slots up to its own. The two parts meet by
    their maxima and sums of exponentials, in float32.
    """
    B, M, T, K, G, h = q.shape
    prefix_k, prefix_v = prefix
    rows = jnp.arange(B)[:, None, None], jnp.arange(ancestors.shape[2])
    suffix_k, suffix_v = (x[*rows, ancestors] for x in suffix)  # [B, M, S, K, h]
    q = q * h**-0.5
    folded = jnp.moveaxis(q, 3, 1).reshape(B, K, M * T * G, h)
    far = jnp.einsum("bkqh,bkph->bkqp", folded, prefix_k, preferred_element_type=jnp.float32)
    far = jnp.where((jnp.arange(prefix_k.shape[2]) < prefix_lengths[:, None])[:, None, None], far, NEVER)
    near = own_products("bmtkgh,bmskh->bkmtgs", q, suffix_k)
    written = jnp.arange(ancestors.shape[2]) <= slot + jnp.arange(T)[:, None]
    near = jnp.where(written[:, None], near, NEVER)
    far = far.reshape(B, K, M, T, G, -1)
    most = jnp.maximum(far.max(-1), near.max(-1))[..., None]
    far, near = jnp.exp(far - most), jnp.exp(near - most)
    total = far.sum(-1) + near.sum(-1)
    folded = far.reshape(B, K, M * T * G, -1).astype(q.dtype)
    mixed = jnp.einsum("bkqp,bkph->bkqh", folded, prefix_v, preferred_element_type=jnp.float32)
    mixed = mixed.reshape(B, K, M, T, G, h) + own_products("bkmtgs,bmskh->bkmtgh", near, suffix_v)
    return jnp.moveaxis(mixed / total[..., None], 1, 3).astype(q.dtype)


SHORT = 8  # slots of a suffix up to which its products are no matrix products worth the name


def own_products(spec: str, x: Array, suffix: Float[Array, "B M S K h"]) -> Array:
    """`einsum(spec, x, suffix)` in float32, where every beam has a suffix of its own.

    Of a few slots that is thousands of tiny products, which as one sum of products cost a fraction.
    """
    if suffix.shape[2] > SHORT:
        return jnp.einsum(spec, x, suffix, preferred_element_type=jnp.float32)
    (left, right), out = spec.split("->")[0].split(","), spec.split("->")[1]
    summed = next(letter for letter in left if letter not in out)
    every = out + summed
    x, suffix = (_spread(part, letters, every) for part, letters in ((x, left), (suffix, right)))
    return jnp.sum(x.astype(jnp.float32) * suffix.astype(jnp.float32), axis=-1)


def _spread(x: Array, letters: str, every: str) -> Array:
    """Axes named by `letters` brought into the order of `every`, with axes of one where it has none."""
    x = x.transpose([letters.index(letter) for letter in every if letter in letters])
    return jnp.expand_dims(x, [i for i, letter in enumerate(every) if letter not in letters])
