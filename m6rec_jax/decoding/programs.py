"""The jitted programs of the engine. Parameters are arguments, so another checkpoint of a model runs the same ones.

All take `define` (the graph of the model) as a static argument, and arrays padded to one of few shapes
(`decoding.shapes`): right-padded `tokens`, `item_rows [B, T]` with `lengths [B]`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from m6rec_jax.decoding.beam import search, show
from m6rec_jax.decoding.cache import prefill
from m6rec_jax.decoding.sampling import write as write_text


@partial(jax.jit, static_argnums=(0, 1, 2))
def recommend(
    define, k, beams, params, items, trie, under, tokens, item_rows, lengths, exclude, support, mass, gate, temperature
):
    model = nnx.merge(define, params)
    prefix = prefill(model, items, tokens, item_rows, lengths)
    shown = show(trie, under, exclude, support, mass, gate)
    return search(model, items, trie, prefix, shown, beams=beams, k=k, temperature=temperature)


@partial(jax.jit, static_argnums=0)
def score(define, params, items, tokens, item_rows, lengths, codes, heats):
    model = nnx.merge(define, params)
    B, L = codes.shape
    rows, level = jnp.arange(B)[:, None], jnp.arange(L)
    offsets = jnp.array([s.offset for s in model.vocab.levels])
    grown = ((0, 0), (0, L))
    tokens = jnp.pad(tokens, grown).at[rows, lengths[:, None] + level].set(codes + offsets)
    hidden, _ = model.prefill(tokens, jnp.pad(item_rows, grown, constant_values=-1), lengths + L, items)
    asks = hidden[rows, lengths[:, None] - 1 + level]
    logp = jnp.zeros((B, len(heats)))
    for t in range(L):
        logits = model.logits(asks[:, t], t + 1, items)
        hit = jnp.take_along_axis(logits, codes[:, t : t + 1], axis=1)
        logp += hit / heats - jax.lax.map(lambda heat, x=logits: jax.nn.logsumexp(x / heat, axis=-1), heats).T
    return logp


@partial(jax.jit, static_argnums=0)
def states(define, params, items, tokens, item_rows, lengths):
    return prefill(nnx.merge(define, params), items, tokens, item_rows, lengths).hidden.astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def item_vectors(define, params, items, codes, rows):
    model = nnx.merge(define, params)
    tokens = codes + jnp.array([s.offset for s in model.vocab.levels])
    completes = jnp.full(codes.shape, -1).at[:, -1].set(rows)
    read = model.embeddings.read(tokens, completes, items, None)
    return read.astype(jnp.dtype(model.config.dtype)).astype(jnp.float32).mean(1)


@partial(jax.jit, static_argnums=(0, 1))
def write(define, room, params, items, tokens, item_rows, lengths, sampling):
    model = nnx.merge(define, params)
    return write_text(model, items, prefill(model, items, tokens, item_rows, lengths, room=room), sampling, room)
