"""What the model said on the way to an item: level by level the code that was spelled, and what else it might have been."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m6rec_jax.decoding.beam import every_rank
from m6rec_jax.decoding.cache import Prefix
from m6rec_jax.decoding.scoring import level_logps, spelled_logp
from m6rec_jax.decoding.trie import Trie
from m6rec_jax.model.items import ItemTable
from m6rec_jax.model.transformer import Transformer


@dataclass(frozen=True)
class Steps:
    """The L steps to each of J items of U users, and at each the A likeliest other codes, likeliest first.

    `codes [U, J, L]` and `logp`, the model's log-probability of each, which sum to that of the item; `place`, from 1, of
    the code among the `choices` that still led to an item that may be shown. `other_codes [U, J, L, A]`, `other_logp`
    and, at the last level, `other_rows`: the catalogue rows that they spell. Codes and rows are -1, log-probabilities
    -inf and counts 0 where there is nothing.
    """

    codes: Int[Array, "U J L"]
    logp: Float[Array, "U J L"]
    place: Int[Array, "U J L"]
    choices: Int[Array, "U J L"]
    other_codes: Int[Array, "U J L A"]
    other_logp: Float[Array, "U J L A"]
    other_rows: Int[Array, "U J L A"]

    @classmethod
    def empty(cls, users: int, items: int, levels: int, others: int) -> Steps:
        one, more = (users, items, levels), (users, items, levels, others)
        none = lambda shape: np.full(shape, -1, np.int32)  # noqa: E731
        count = lambda: np.zeros(one, np.int32)  # noqa: E731
        impossible = lambda shape: np.full(shape, -np.inf, np.float32)  # noqa: E731
        return cls(none(one), impossible(one), count(), count(), none(more), impossible(more), none(more))

    def put(self, who: np.ndarray, found: Steps, there: np.ndarray) -> None:
        """Write the steps of some users, computed for at least as many, to the items that are `there [n, J]`."""
        for name in self.__dataclass_fields__:
            whole, part = getattr(self, name), np.asarray(getattr(found, name))
            kept = there.reshape(there.shape + (1,) * (whole.ndim - 2))
            whole[who] = np.where(kept, part[: len(who), : there.shape[1]], whole[who])


jax.tree_util.register_dataclass(Steps)


def walked(
    model: Transformer,
    items: ItemTable,
    trie: Trie,
    prefix: Prefix,
    under: Int[Array, " S"],
    given: Int[Array, "B H"],
    sign: Int[Array, ""],
    rows: Int[Array, "B J"],
    temperature: Float[Array, " B"],
    others: int,
) -> Steps:
    """The steps to items `rows`; what may be shown is what `under` lets through, less `given` where `sign` is -1, and of
    `given` alone where it is 1 (distinct catalogue rows, -1 = none).

    Probabilities are over all codes of a level, as `beam.search` has them by default. Equal ones keep the order of codes.
    An item with several spellings is walked to by the one that the model finds likeliest; its others are other codes.
    """
    J, A = rows.shape[1], others
    rank, given = trie.rank[rows], every_rank(trie, under, given)
    if trie.most > 1:
        rank = _likeliest(model, items, trie, prefix, rows, temperature)
    codes = _codes(trie, rank)
    found = []
    for level, (every, said) in enumerate(level_logps(model, items, prefix, codes, temperature)):
        K = trie.width[level]
        node = jnp.zeros((len(rows), 1), jnp.int32) if level == 0 else trie.ancestor[level][rank]
        first = trie.base[node][..., None]
        child, chosen = first + jnp.arange(K), trie.ancestor[level + 1][rank][..., None]
        left = jnp.where(sign < 0, under[child], 0) + sign * _counted(trie, given, node, level)
        open_ = (child < trie.base[node + 1][..., None]) & (left > 0)
        # Compared with its own entry there, not with `said`: computed twice, one number may differ in its last bit.
        logp = jax.lax.optimization_barrier(jnp.take_along_axis(every, trie.tok[child], axis=-1, mode="clip"))
        own = jnp.take_along_axis(logp, chosen - first, axis=-1, mode="clip")
        logp = jnp.where(open_, logp, -jnp.inf)
        before = ((logp > own) | ((logp == own) & (child < chosen))) & (child != chosen)
        spare = ((0, 0), (0, 0), (0, max(0, A + 1 - K)))
        best, at = jax.lax.top_k(jnp.pad(logp, spare, constant_values=-jnp.inf), A + 1)
        best, at = (jnp.broadcast_to(x, (len(rows), J, A + 1)) for x in (best, first + at))
        order = jnp.argsort(at == chosen, axis=-1, stable=True)[..., :A]  # the chosen one, if it is there, last
        best, at = (jnp.take_along_axis(x, order, axis=-1) for x in (best, at))
        there = best > -jnp.inf
        spelled = trie.row[at - trie.leaf0] if level == trie.levels - 1 else -1
        choices = jnp.broadcast_to(open_.sum(-1), said.shape)
        found.append((said, 1 + before.sum(-1), choices, *(jnp.where(there, x, -1) for x in (trie.tok[at], spelled)), best))  # fmt: skip
    logp, place, choices, other_codes, other_rows, other_logp = (jnp.stack(x, axis=2) for x in zip(*found, strict=True))
    return Steps(codes, logp, place, choices, other_codes, other_logp, other_rows)


def _likeliest(
    model: Transformer, items: ItemTable, trie: Trie, prefix: Prefix, rows: Int[Array, "B J"],
    temperature: Float[Array, " B"],
) -> Int[Array, "B J"]:  # fmt: skip
    """Rank of the spelling of each item that the model finds likeliest; of equal ones the canonical."""
    N = trie.row.shape[0]
    ranks = jnp.concatenate([trie.rank[rows][..., None], trie.others[rows]], axis=-1)
    codes = _codes(trie, jnp.minimum(ranks, N - 1))
    said = spelled_logp(model, items, prefix, codes.reshape(len(rows), -1, trie.levels), temperature)
    best = jnp.argmax(jnp.where(ranks < N, said.reshape(ranks.shape), -jnp.inf), axis=-1)
    return jnp.take_along_axis(ranks, best[..., None], axis=-1)[..., 0]


def _codes(trie: Trie, rank: Array) -> Array:
    return jnp.moveaxis(trie.tok[trie.ancestor[1:, rank]], 0, -1)


def _counted(trie: Trie, given: Int[Array, "B H"], node: Int[Array, "B M"], level: int) -> Int[Array, "B M K"]:
    """How many of the `given` ranks (distinct) lie under each child of each node of a level."""
    K, N = trie.width[level], trie.row.shape[0]
    known = jnp.minimum(given, N - 1)
    parent = trie.ancestor[level][known]
    offset = trie.ancestor[level + 1][known] - trie.base[parent]
    here = (given < N)[:, None] & (parent[:, None] == node[..., None])  # [B, M, H]
    slot = jnp.where(here, offset[:, None], K)
    rows, lanes = jnp.arange(len(node))[:, None, None], jnp.arange(node.shape[1])[:, None]
    return jnp.zeros((*node.shape, K), jnp.int32).at[rows, lanes, slot].add(1, mode="drop")
