"""Slots: a fixed number of texts written side by side, each with its own prefix, settings and place.

A text takes a slot when its prompt has been read, and leaves it to the next one when it ends, so that a long text holds
up nobody. What a slot writes depends on its own prompt, seed and settings alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from m6rec_jax.config import ModelConfig
from m6rec_jax.decoding.cache import Prefix, append, prefill
from m6rec_jax.decoding.sampling import Sampling, draw, penalise, writable
from m6rec_jax.model.items import ItemTable
from m6rec_jax.model.transformer import Transformer
from m6rec_jax.vocab import EOS, ITEM, Vocab


@dataclass(frozen=True)
class Slots:
    """S texts, or what is left of texts that ended.

    `prefix`: prompts and what was written behind them. `held [S, V]`: which text ids a prompt or its text holds.
    `count [S]`: tokens written.
    """

    prefix: Prefix
    sampling: Sampling
    held: Bool[Array, "S V"]
    count: Int[Array, " S"]


jax.tree_util.register_dataclass(Slots)


def empty(config: ModelConfig, vocab: Vocab, slots: int, room: int) -> Slots:
    """Slots in which nothing was written yet; `room`: tokens of a prompt and its text."""
    each = lambda kind: jnp.zeros(slots, kind)  # noqa: E731
    kv = (config.layers, slots, config.n_kv, room, config.head_dim)
    dtype = jnp.dtype(config.dtype)
    prefix = Prefix(
        tokens=jnp.zeros((slots, room), jnp.int32), item_rows=jnp.full((slots, room), -1, jnp.int32),
        lengths=each(jnp.int32), kv=(jnp.zeros(kv, dtype), jnp.zeros(kv, dtype)),
        hidden=jnp.zeros((slots, config.width), dtype),
    )  # fmt: skip
    sampling = Sampling(
        temperature=each(jnp.float32), top_k=each(jnp.int32), top_p=each(jnp.float32), seed=each(jnp.uint32),
        limit=each(jnp.int32), repetition=each(jnp.float32), items=each(bool),
    )  # fmt: skip
    return Slots(prefix, sampling, jnp.zeros((slots, vocab.text.padded), bool), each(jnp.int32))


def begin(
    model: Transformer,
    items: ItemTable,
    slots: Slots,
    slot: Int[Array, ""],
    tokens: Int[Array, "1 T"],
    item_rows: Int[Array, "1 T"],
    lengths: Int[Array, " 1"],
    sampling: Sampling,
) -> Slots:
    """The slots with one prompt read into slot number `slot`, over all that was there."""
    T, V = tokens.shape[1], slots.held.shape[1]
    prefix = prefill(model, items, tokens, item_rows, lengths, room=slots.prefix.room - T)
    read = jnp.where(jnp.arange(T) < lengths, tokens[0], V)  # padding and codes lie past the end: dropped
    held = jnp.zeros((1, V), bool).at[0, read].set(True, mode="drop")
    new = Slots(prefix, sampling, held, jnp.zeros(1, jnp.int32))

    def put(path: tuple, old: Array, new: Array) -> Array:
        axis = 1 if jax.tree_util.GetAttrKey("kv") in path else 0
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis)

    return jax.tree_util.tree_map_with_path(put, slots, new)


def advance(
    model: Transformer, items: ItemTable, slots: Slots, alive: Bool[Array, " S"], steps: int
) -> tuple[Slots, Int[Array, "S steps"], Int[Array, " S"], Int[Array, " S"]]:
    """Up to `steps` more tokens in every slot that is `alive`, fewer when all have ended.

    Returns the slots; the new tokens `[S, steps]`; how many of them each wrote `[S]`; the token that ended each
    `[S]`, </s> or `<item>`, 0 where none did. A text that
    reached its limit (`sampling.limit`) writes no more either.
    """
    sampling, S = slots.sampling, len(alive)
    may = writable(model.vocab.text, sampling.items)
    rows = jnp.arange(S)

    def on(state: tuple) -> Array:
        step, *_, going, _ = state
        return (step < steps) & going.any()

    def one(state: tuple) -> tuple:
        step, prefix, held, count, out, going, ended = state
        logits = penalise(model.logits(prefix.hidden, 0, items), held, sampling.repetition)
        token = draw(jnp.where(may, logits, -jnp.inf), sampling, count)
        ends = (token == EOS) | (token == ITEM)
        ended = jnp.where(going & ends, token, ended)
        going = going & ~ends
        out = out.at[:, step].set(token)
        held = held.at[rows, token].max(going)
        count = count + going
        prefix = append(model, items, prefix, token[:, None], jnp.full((S, 1), -1), going.astype(jnp.int32))
        return step + 1, prefix, held, count, out, going & (count < sampling.limit), ended

    going = alive & (slots.count < sampling.limit)
    start = (0, slots.prefix, slots.held, slots.count, jnp.zeros((S, steps), jnp.int32), going, jnp.zeros(S, jnp.int32))
    _, prefix, held, count, out, _, ended = jax.lax.while_loop(on, one, start)
    return Slots(prefix, sampling, held, count), out, count - slots.count, ended
