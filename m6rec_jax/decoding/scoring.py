"""Scores of given items after a prefix that is read once: many candidates, one history."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m6rec_jax.decoding.beam import GATE_MOST, mix
from m6rec_jax.decoding.cache import Prefix
from m6rec_jax.model.items import ItemTable
from m6rec_jax.model.transformer import Transformer


def spelling_states(
    model: Transformer, items: ItemTable, prefix: Prefix, codes: Int[Array, "B J L"]
) -> list[Float[Array, "B J D"]]:
    """The states that each level's code is asked of, L of them; the first is one for all candidates, `[B, 1, D]`.

    What is known of a spelling is known at once, so all its codes but the last are read in one step, each candidate in
    a lane of its own beside the shared prefix (arXiv 2403.08845).
    """
    _, J, L = codes.shape
    first = prefix.hidden[:, None]
    if L == 1:
        return [first]
    tokens = codes[..., :-1] + jnp.array([s.offset for s in model.vocab.levels[:-1]])
    positions = jnp.broadcast_to(prefix.lengths[:, None, None] + jnp.arange(L - 1), tokens.shape)
    own = jnp.broadcast_to(jnp.arange(J)[:, None], tokens.shape)
    read, _ = model.extend(
        tokens, jnp.full_like(tokens, -1), positions, items, prefix.kv, prefix.lengths, prefix.lanes(L - 1, J), own, 0
    )
    return [first, *(read[:, :, level] for level in range(L - 1))]


def level_logps(
    model: Transformer,
    items: ItemTable,
    prefix: Prefix,
    codes: Int[Array, "B J L"],
    temperature: Float[Array, " B"],
) -> Iterator[tuple[Float[Array, "B J V"], Float[Array, "B J"]]]:
    """Level by level: the log-probability of every code of the level, `[B, 1, V]` at the first, and of those spelled.

    Normalised as `beam.search` does (`level`).
    """
    for level, hidden in enumerate(spelling_states(model, items, prefix, codes)):
        logits = model.logits(hidden, level + 1, items) / temperature[:, None, None]
        every = jax.nn.log_softmax(logits, axis=-1)
        code = codes[:, None, :, 0] if level == 0 else codes[:, :, level, None]
        yield every, jnp.take_along_axis(every, code, axis=-1).reshape(codes.shape[:2])


def spelled_logp(
    model: Transformer,
    items: ItemTable,
    prefix: Prefix,
    codes: Int[Array, "B J L"],
    temperature: Float[Array, " B"],
) -> Float[Array, "B J"]:
    """The model's log-probability of each of J spellings after each prefix, normalised as `beam.search` does."""
    return sum((said for _, said in level_logps(model, items, prefix, codes, temperature)), jnp.zeros(codes.shape[:2]))


def in_lots(of: Callable[[Array], Any], rows: Int[Array, "B J ..."], lot: int) -> Any:
    """What `of` makes of `rows`, arrays `[B, J, ...]`, from `lot` rows a user at a time: the memory of one lot.

    `lot` divides J, or is at least J.
    """
    B, J = rows.shape[:2]
    if lot >= J:
        return of(rows)
    lots = jnp.moveaxis(rows.reshape(B, J // lot, lot, *rows.shape[2:]), 1, 0)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, J, *x.shape[3:]), jax.lax.map(of, lots))


def mixed(
    logp: Float[Array, "B J"], mass: Float[Array, "B J"], gate: Float[Array, " B"]
) -> tuple[Float[Array, "B J"], Float[Array, "B J"]]:
    """(scores, log of the memory's share) of candidates: memory renormalised over them, as `beam.show` does."""
    total = mass.sum(-1)
    logmass = jnp.log(mass / jnp.where(total > 0, total, 1.0)[:, None])
    gate = jnp.where(total > 0, jnp.clip(gate, 0.0, GATE_MOST), 0.0)
    return mix(logp, logmass, gate[:, None]), logmass
