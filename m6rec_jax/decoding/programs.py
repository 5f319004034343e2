"""The jitted programs of the engine. Parameters are arguments, so another checkpoint of a model runs the same ones.

All take `define` (the graph of the model) as a static argument, and arrays padded to one of few shapes
(`decoding.shapes`): right-padded `tokens`, `item_rows [B, T]` with `lengths [B]`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m6rec_jax.decoding.beam import Normalise, search, show
from m6rec_jax.decoding.cache import Prefix, append, prefill
from m6rec_jax.decoding.reuse import read_pages, write_pages, write_tail
from m6rec_jax.decoding.scoring import in_lots, mixed, spelled_logp, spelling_states
from m6rec_jax.decoding.slots import advance, begin
from m6rec_jax.decoding.steps import walked
from m6rec_jax.model.sharding import spec


class Settings(NamedTuple):
    """What decides the program of a list, beside shapes: items in it, beams kept between levels, what codes sum over."""

    k: int
    lanes: int
    normalise: Normalise


class Asked(NamedTuple):
    """What B users ask, as arrays: prefixes `[B, T]`, and as `show` and `search` take them."""

    tokens: Int[Array, "B T"]
    item_rows: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    exclude: Int[Array, "B H"]
    support: Int[Array, "B J"]
    mass: Float[Array, "B J"]
    gate: Float[Array, " B"]
    temperature: Float[Array, " B"]


@partial(jax.jit, static_argnums=0, static_argnames="both_ways")
def read(define, params, items, tokens, item_rows, lengths, both_ways=False):
    """Whole prefixes, read once."""
    return prefill(nnx.merge(define, params), items, tokens, item_rows, lengths, both_ways=both_ways)


@partial(jax.jit, static_argnums=(0, 1))
def find(define, settings, params, items, trie, under, prefix, asked):
    """Lists of the best items after prefixes."""
    shown = show(trie, under, asked.exclude, asked.support, asked.mass, asked.gate)
    return search(
        nnx.merge(define, params), items, trie, prefix, shown, beams=settings.lanes, k=settings.k,
        temperature=asked.temperature, normalise=settings.normalise,
    )  # fmt: skip


def recommend(define, settings, both_ways, params, items, trie, under, asked):
    """Read whole prefixes and search after them.

    Two programs: the second also follows prefixes that were kept, and as one they take longer on CPU.
    """
    prefix = read(define, params, items, asked.tokens, asked.item_rows, asked.lengths, both_ways=both_ways)
    return find(define, settings, params, items, trie, under, prefix, asked)


@partial(jax.jit, static_argnums=(0, 1, 2))
def spread(program, static, mesh, shared, own):
    """`program(*static, *shared, *own)`, each device of the mesh (static) for its own users: left to itself, XLA exchanges
    arrays, and programs of two threads may wait for each other."""
    alone = jax.shard_map(
        lambda shared, own: program(*static, *shared, *own),
        mesh=mesh, in_specs=(spec(), spec("batch")), out_specs=spec("batch"), check_vma=False,
    )  # fmt: skip
    return alone(shared, own)


@partial(jax.jit, donate_argnames="pages")
def keep(pages, table, prefix):
    """The pages with whole prefixes in the places of `table`."""
    return write_pages(pages, table, prefix)


@partial(jax.jit, static_argnums=(0, 1), donate_argnames="pages")
def read_on(define, new, params, items, asked, pages, table, kept, known):
    """Prefixes whose first `known [B]` tokens lie in the pages of `table`, and the pages.

    At most `new` tokens follow them (static); only these are read, and written to the pages of `kept`.
    """
    model = nnx.merge(define, params)
    at = known[:, None] + jnp.arange(new)
    tokens, rows = (
        jnp.take_along_axis(x, at, axis=1, mode="fill", fill_value=fill)
        for x, fill in ((asked.tokens, 0), (asked.item_rows, -1))
    )
    nothing = jnp.zeros((len(known), model.config.width), model.config.dtype)
    prefix = Prefix(asked.tokens, asked.item_rows, known, read_pages(pages, table, known), nothing)
    prefix = append(model, items, prefix, tokens, rows, asked.lengths - known)
    return prefix, write_tail(pages, kept, prefix, known, new)


@partial(jax.jit, static_argnums=(0, 1))
def rank(define, lot, params, items, tokens, item_rows, lengths, codes, mass, gate, temperature):
    """Scores of each user's candidates `codes [B, J, L]`, and their two parts; read `lot` (static) at a time."""
    model = nnx.merge(define, params)
    prefix = prefill(model, items, tokens, item_rows, lengths)
    logp = in_lots(lambda some: spelled_logp(model, items, prefix, some, temperature), codes, lot)
    scores, logmass = mixed(logp, mass, gate)
    return scores, logp, logmass


@partial(jax.jit, static_argnums=(0, 1, 2))
def walk(define, others, lot, params, items, trie, under, sign, tokens, item_rows, lengths, given, rows, temperature):
    """The steps to each user's items `rows [B, J]`, `lot` (static) at a time, with as many `others` (static) beside each."""
    model = nnx.merge(define, params)
    prefix = prefill(model, items, tokens, item_rows, lengths)
    steps = lambda some: walked(model, items, trie, prefix, under, given, sign, some, temperature, others)  # noqa: E731
    return in_lots(steps, rows, lot)


@partial(jax.jit, static_argnums=0)
def score(define, params, items, heats, tokens, item_rows, lengths, codes):
    """The model's log-probability `[B, n]` of one spelling `codes [B, L]` a user, at each of n temperatures."""
    model = nnx.merge(define, params)
    prefix = prefill(model, items, tokens, item_rows, lengths)
    logp = jnp.zeros((len(codes), len(heats)))
    for t, hidden in enumerate(spelling_states(model, items, prefix, codes[:, None])):
        logits = model.logits(hidden[:, 0], t + 1, items)
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


@partial(jax.jit, static_argnums=0, donate_argnames="slots")
def begin_text(define, params, items, slots, slot, tokens, item_rows, lengths, sampling):
    """Read one prompt `[1, T]` into a slot."""
    return begin(nnx.merge(define, params), items, slots, slot, tokens, item_rows, lengths, sampling)


@partial(jax.jit, static_argnums=(0, 1), donate_argnames="slots")
def advance_texts(define, steps, params, items, slots, alive):
    """Write on in the slots that are `alive`, at most `steps` tokens each."""
    return advance(nnx.merge(define, params), items, slots, alive, steps)
