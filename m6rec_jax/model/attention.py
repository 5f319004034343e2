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
    prefix: tuple[Float[Array, "B P K h"], Float[Array, "B P K h"]],
    prefix_lengths: Int[Array, " B"],
    suffix: tuple[Float[Array, "B S M K h"], Float[Array, "B S M K h"]],
    ancestors: Int[Array, "B M S"],
    slot: int,
) -> Float[Array, "B M T K G h"]:
    """Beams attend to one prefix a user and to their own short suffix (bifurcated attention, arXiv 2403.08845).

    Beams are folded into the query axis, so the prefix is read once a user. `ancestors[b, m, s]` is the lane
    that wrote slot s of beam m; query t sits in slot `slot + t` and sees slots up to its own.
    """
    prefix_k, prefix_v = prefix
    rows = jnp.arange(q.shape[0])[:, None, None], jnp.arange(ancestors.shape[2])[None, None, :]
    suffix_k, suffix_v = (x[rows[0], rows[1], ancestors] for x in suffix)  # [B, M, S, K, h]
    head_scale = q.shape[-1] ** -0.5
    far = jnp.einsum("bmtkgh,bpkh->bmtkgp", q, prefix_k, preferred_element_type=jnp.float32) * head_scale
    near = jnp.einsum("bmtkgh,bmskh->bmtkgs", q, suffix_k, preferred_element_type=jnp.float32) * head_scale
    in_prefix = jnp.arange(prefix_k.shape[1]) < prefix_lengths[:, None]
    written = jnp.arange(ancestors.shape[2]) <= slot + jnp.arange(q.shape[2])[:, None]
    far = jnp.where(in_prefix[:, None, None, None, None], far, NEVER)
    near = jnp.where(written[None, None, :, None, None], near, NEVER)
    weights = jax.nn.softmax(jnp.concatenate([far, near], axis=-1), axis=-1).astype(q.dtype)
    far, near = jnp.split(weights, [prefix_k.shape[1]], axis=-1)
    return jnp.einsum("bmtkgp,bpkh->bmtkgh", far, prefix_v) + jnp.einsum("bmtkgs,bmskh->bmtkgh", near, suffix_v)
