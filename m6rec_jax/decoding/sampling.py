"""Text, one token after another: temperature, top-k, top-p, repetition penalty, a seed a request, an end at </s>.

What a request gets depends on its own prompt, seed and settings alone, never on its neighbours in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m6rec_jax.decoding.cache import Prefix, append
from m6rec_jax.model.items import ItemTable
from m6rec_jax.model.transformer import Transformer
from m6rec_jax.vocab import EOS, SPECIALS


@dataclass(frozen=True)
class Sampling:
    """How each of B requests draws its tokens.

    `temperature [B]`: 0 takes the most likely token. `top_k [B]`: only the k most likely (0 = all). `top_p [B]`: only
    the most likely ones that together reach p (1 = all). `seed [B]` uint32. `limit [B]`: most tokens written.
    `repetition [B]`: scores of tokens that the prompt or the text holds already are divided by it where above 0, and
    multiplied where below (1 = off; CTRL, arXiv 1909.05858, section 4.1).
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    seed: Int[Array, " B"]
    limit: Int[Array, " B"]
    repetition: Float[Array, " B"]


jax.tree_util.register_dataclass(Sampling)


def draw(logits: Float[Array, "B V"], sampling: Sampling, place: Int[Array, " B"]) -> Int[Array, " B"]:
    """One token a request; `place [B]` is its number in the text, which with the seed decides the randomness."""
    greedy = sampling.temperature <= 0
    ranked, token = jax.lax.top_k(logits, logits.shape[-1])
    ranked = ranked / jnp.where(greedy, 1.0, sampling.temperature)[:, None]
    p = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p  # mass of all more likely tokens
    rank = jnp.arange(logits.shape[-1])
    kept = (before < sampling.top_p[:, None]) & ((sampling.top_k[:, None] == 0) | (rank < sampling.top_k[:, None]))
    kept = (kept & ~greedy[:, None]) | (rank == 0)

    def noise(seed: Array, place: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), place), (logits.shape[-1],))

    drawn = jnp.where(kept, ranked + jax.vmap(noise)(sampling.seed, place), -jnp.inf)
    return jnp.take_along_axis(token, jnp.argmax(drawn, axis=-1)[:, None], axis=1)[:, 0]


def penalise(
    logits: Float[Array, "B V"], held: Bool[Array, "B V"], repetition: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Scores with those of the tokens held already lowered by the repetition penalty."""
    by = jnp.where(held, repetition[:, None], 1.0)
    return jnp.where(logits > 0, logits / by, logits * by)


def write(
    model: Transformer, items: ItemTable, prefix: Prefix, sampling: Sampling, room: int
) -> tuple[Int[Array, "B R"], Int[Array, " B"]]:
    """Continue each prefix by text: tokens `[B, room]` and how many of them were written before </s> or the limit.

    The prefix must have `room` free places. Reserved ids other than </s> are never written.
    """
    B = prefix.lengths.shape[0]
    may = _writable(model.vocab.text.padded)
    limit = jnp.minimum(sampling.limit, room)
    rows = jnp.arange(B)
    V = model.vocab.text.padded  # a code is past it, and dropped below
    read = jnp.where(jnp.arange(prefix.room) < prefix.lengths[:, None], prefix.tokens, V)
    held = jnp.zeros((B, V), bool).at[rows[:, None], read].set(True, mode="drop")

    def going(state: tuple) -> Array:
        return ~state[3].all()

    def one(state: tuple) -> tuple:
        prefix, out, count, done, held = state
        logits = penalise(model.logits(prefix.hidden, 0, items), held, sampling.repetition)
        token = draw(jnp.where(may, logits, -jnp.inf), sampling, count)
        done = done | (token == EOS)
        out = out.at[rows, jnp.where(done, room, count)].set(token, mode="drop")
        held = held.at[rows, token].set(True)
        count = count + ~done
        done = done | (count >= limit)
        step = (~done).astype(jnp.int32)
        return append(model, items, prefix, token[:, None], jnp.full((B, 1), -1), step), out, count, done, held

    start = (prefix, jnp.zeros((B, room), jnp.int32), jnp.zeros(B, jnp.int32), limit <= 0, held)
    _, out, count, *_ = jax.lax.while_loop(going, one, start)
    return out, count


def _writable(size: int) -> Bool[Array, " V"]:
    token = jnp.arange(size)
    return (token == EOS) | (token >= len(SPECIALS))
