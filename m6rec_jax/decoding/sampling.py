"""Text, one token after another: temperature, top-k, top-p, repetition penalty, a seed a request, an end at </s>.

What a request gets depends on its own prompt, seed and settings alone, never on its neighbours in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m6rec_jax.vocab import EOS, ITEM, SPECIALS, Slice


@dataclass(frozen=True)
class Sampling:
    """How each of B requests draws its tokens.

    `temperature [B]`: 0 takes the most likely token. `top_k [B]`: only the k most likely (0 = all). `top_p [B]`: only
    the most likely ones that together reach p (1 = all). `seed [B]` uint32. `limit [B]`: most tokens written.
    `repetition [B]`: scores of tokens that the prompt or the text holds already are divided by it where above 0, and
    multiplied where below (1 = off; CTRL, arXiv 1909.05858, section 4.1). `items [B]` bool: may write `<item>`, which ends
    the text as </s> does, for an item to be spelled.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    seed: Int[Array, " B"]
    limit: Int[Array, " B"]
    repetition: Float[Array, " B"]
    items: Bool[Array, " B"]


jax.tree_util.register_dataclass(Sampling)


def draw(logits: Float[Array, "B V"], sampling: Sampling, place: Int[Array, " B"]) -> Int[Array, " B"]:
    """One token a request; `place [B]` is its number in the text, which with the seed decides the randomness.

    Logits are sorted only when somebody asks for top-k or top-p; what others draw is the same either way.
    """
    greedy = sampling.temperature <= 0
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None]
    cuts = ~greedy & ((sampling.top_k > 0) | (sampling.top_p < 1))
    kept = jax.lax.cond(cuts.any(), _kept, lambda scaled, _: jnp.ones_like(scaled, bool), scaled, sampling)

    def noise(seed: Array, place: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), place), (logits.shape[-1],))

    drawn = jnp.where(kept, scaled + jax.vmap(noise)(sampling.seed, place), -jnp.inf)
    return jnp.argmax(jnp.where(greedy[:, None], logits, drawn), axis=-1)


def _kept(scaled: Float[Array, "B V"], sampling: Sampling) -> Bool[Array, "B V"]:
    """Which tokens top-k and top-p leave; of equals, those with lower ids come first."""
    ranked, token = jax.lax.top_k(scaled, scaled.shape[-1])
    p = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p  # mass of all more likely tokens
    rank = jnp.arange(scaled.shape[-1])
    by_mass = (sampling.top_p[:, None] >= 1) | (before < sampling.top_p[:, None])  # a sum of all may round above 1
    by_rank = (sampling.top_k[:, None] == 0) | (rank < sampling.top_k[:, None])
    rows = jnp.arange(len(scaled))[:, None]
    return jnp.zeros_like(scaled, bool).at[rows, token].set((by_mass & by_rank) | (rank == 0))


def penalise(
    logits: Float[Array, "B V"], held: Bool[Array, "B V"], repetition: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Scores with those of the tokens held already lowered by the repetition penalty."""
    by = jnp.where(held, repetition[:, None], 1.0)
    return jnp.where(logits > 0, logits / by, logits * by)


def writable(text: Slice, items: Bool[Array, " B"]) -> Bool[Array, "B V"]:
    """Which ids of the padded text slice each text may hold: pieces, </s>, which ends it, and `<item>` where `items` says
    so; never another reserved id."""
    token = jnp.arange(text.padded)
    plain = (token == EOS) | ((token >= len(SPECIALS)) & (token < text.size))
    return plain | (items[:, None] & (token == ITEM))
