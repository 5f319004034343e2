"""Beam search over a trie, exact in its scores and honest about what it pruned.

A beam is a trie node with the model's log-probability of its spelling and the memory's mass below it (DESIGN section
6). Both only fall along a spelling, so a beam's score bounds every item under it: once the k-th item scores no less
than the best beam ever pruned, no other item can. Equal scores keep their order: earlier beam, then lower code.

An item that is spelled in several ways (`Trie.others`) scores what its best spelling scores, memory being that of the
canonical one; the search walks spellings and lists each item once. The proof stays the same: a spelling that was pruned
scores no more than the bound, and the bound no more than the k-th item, so neither an item that is not listed nor a
listed one by another spelling can score more than what is said. The best and not the sum, for a sum is known only when
all spellings of all items near the k-th have been read, and could be bounded only by their number times the bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m6rec_jax.decoding.cache import Prefix
from m6rec_jax.decoding.trie import NO_NODE, Trie
from m6rec_jax.model.items import ItemTable
from m6rec_jax.model.transformer import Transformer

GATE_MOST = 1 - 1e-6  # some of the model always stays, so that a list never ends with the memory's support
ROUNDING = 1e-6  # relative; a certificate must hold by more than float32 sums are off

# What a code's probability is divided by: the codes of its level; all ids of the vocabulary, text too (as Hugging Face's
# `generate` has it); or the beam's own children that have something to show, so that the spellings shown sum to 1.
Normalise = Literal["level", "vocab", "children"]


@dataclass(frozen=True)
class Shown:
    """What may be recommended to B users, and what their memories say about it, all in ranks of the trie.

    `under [S]` allowed spellings below each node; `excluded [B, H]` and `support [B, J]` ranks, N where there is none, the
    one of all spellings, the other of canonical ones;
    `mass [B, J]` sums to 1 or is 0; `gate [B]` the share of the memory, 0 without mass.
    """

    under: Int[Array, " S"]
    excluded: Int[Array, "B H"]
    support: Int[Array, "B J"]
    mass: Float[Array, "B J"]
    gate: Float[Array, " B"]


@dataclass(frozen=True)
class Beams:
    """M partial spellings a user, best first; a missing one has node -1 and score -inf.

    `logp`, `logmass [B, M]` of the spelling so far under model and memory; `tokens [B, M, t]` its codes; `bound [B]`
    the best score pruned so far. `excluded_at [B, H]`, `support_at [B, J]`: which beam each excluded or supported item
    lies under, -1 = none.
    """

    node: Int[Array, "B M"]
    logp: Float[Array, "B M"]
    logmass: Float[Array, "B M"]
    score: Float[Array, "B M"]
    tokens: Int[Array, "B M t"]
    bound: Float[Array, " B"]
    excluded_at: Int[Array, "B H"]
    support_at: Int[Array, "B J"]


@dataclass(frozen=True)
class Found:
    """The k best items of B users: catalogue rows (-1 = none left), scores, their two parts, and the certificate."""

    rows: Int[Array, "B k"]
    scores: Float[Array, "B k"]
    model_logp: Float[Array, "B k"]
    memory_logp: Float[Array, "B k"]
    exact: Bool[Array, " B"]


for _kind in (Shown, Beams, Found):
    jax.tree_util.register_dataclass(_kind)


def show(
    trie: Trie,
    under: Int[Array, " S"],
    exclude: Int[Array, "B H"],
    support: Int[Array, "B J"],
    mass: Float[Array, "B J"],
    gate: Float[Array, " B"],
) -> Shown:
    """Bring catalogue rows (-1 = none, in any order, repeats allowed) to ranks, and memory to what may be shown.

    Exclusions that the filter forbids anyway are dropped, as `under` counts them out already. Mass is renormalised
    over what is left (DESIGN section 6); a user without any has gate 0.
    """
    N = trie.row.shape[0]
    ranks = jnp.sort(every_rank(trie, under, exclude), axis=-1)
    again = jnp.pad(ranks[:, 1:] == ranks[:, :-1], ((0, 0), (1, 0)))
    excluded = jnp.sort(jnp.where(again, N, ranks), axis=-1)
    support = allowed_ranks(trie, under, support)
    at = jax.vmap(jnp.searchsorted)(excluded, support)
    gone = jnp.take_along_axis(excluded, jnp.minimum(at, excluded.shape[1] - 1), axis=1) == support
    mass = jnp.where(gone | (support == N), 0.0, mass)
    total = mass.sum(-1)
    mass = mass / jnp.where(total > 0, total, 1.0)[:, None]
    return Shown(under, excluded, support, mass, jnp.where(total > 0, jnp.clip(gate, 0.0, GATE_MOST), 0.0))


def allowed_ranks(trie: Trie, under: Array, rows: Array) -> Array:
    """Ranks of catalogue rows as they are spelled canonically; N for a row of -1 and for one that the filter forbids."""
    ranks = trie.rank[jnp.maximum(rows, 0)]
    return jnp.where((rows >= 0) & (under[trie.leaf0 + ranks] > 0), ranks, trie.row.shape[0])


def every_rank(trie: Trie, under: Array, rows: Int[Array, "B H"]) -> Int[Array, "B HE"]:
    """`allowed_ranks` of all spellings of catalogue rows, as many an item as the most there are."""
    ranks = allowed_ranks(trie, under, rows)
    if trie.most == 1:
        return ranks
    N = trie.row.shape[0]
    more = jnp.where((ranks < N)[..., None], trie.others[jnp.maximum(rows, 0)], N)
    return jnp.concatenate([ranks, more.reshape(len(rows), -1)], axis=1)


def mix(logp: Array, logmass: Array, gate: Array) -> Array:
    """log((1 - g) p + g m) from the logs of p and m."""
    return jnp.logaddexp(jnp.log1p(-gate) + logp, jnp.log(gate) + logmass)


def root(shown: Shown) -> Beams:
    """One beam a user: the empty spelling, under which every item lies."""
    B = shown.gate.shape[0]
    zero = jnp.zeros((B, 1), jnp.float32)
    return Beams(
        node=jnp.zeros((B, 1), jnp.int32), logp=zero, logmass=zero, score=zero, tokens=jnp.zeros((B, 1, 0), jnp.int32),
        bound=jnp.full(B, -jnp.inf), excluded_at=jnp.zeros_like(shown.excluded), support_at=jnp.zeros_like(shown.support),
    )  # fmt: skip


def step(
    trie: Trie,
    shown: Shown,
    beams: Beams,
    logp: Float[Array, "B M V"],
    level: int,
    width: int,
    among_children: bool = False,
) -> tuple[Beams, Int[Array, "B W"]]:
    """Spell one more code: the `width` best of all children with an item left under them, and the beam each grew from.

    `logp` is the model's log-probability of each code of this level after each beam; `among_children` divides it
    among those children. `level` (0 first), `width` and `among_children` are static.
    """
    B, M = beams.node.shape
    K = trie.width[level]
    # At the root all users look at the same children, so these arrays are [1, 1, K] there. Children lie side by side:
    # K nodes from the first one on are one slice, which at the end of the arrays begins before it.
    node = jnp.zeros((1, 1), jnp.int32) if level == 0 else jnp.maximum(beams.node, 0)
    first, end = trie.base[node], trie.base[node + 1]
    begin = _begin(trie, first, K)
    child = begin[..., None] + jnp.arange(K)
    real = (child >= first[..., None]) & (child < end[..., None]) & (beams.node >= 0)[..., None]

    excluded_slot = _slots(trie, shown.excluded, beams.excluded_at, level, M)
    support_slot = _slots(trie, shown.support, beams.support_at, level, M)
    rows = jnp.arange(B)[:, None]
    gone = jnp.zeros((B, M * K), jnp.int32).at[rows, excluded_slot].add(1, mode="drop")
    mass = jnp.zeros((B, M * K), jnp.float32).at[rows, support_slot].add(shown.mass, mode="drop")

    alive = real & (_runs(shown.under, begin, K) > gone.reshape(B, M, K))
    code_logp = jnp.take_along_axis(logp, _runs(trie.tok, begin, K), axis=-1, mode="clip")
    if among_children:
        code_logp = jax.nn.log_softmax(code_logp, axis=-1, where=alive)
    child_logp = (beams.logp[..., None] + code_logp).reshape(B, M * K)
    # Few children have any mass, so that only theirs is mixed in; the others keep mix(logp, -inf).
    pick = lambda x, slot: jnp.take_along_axis(x, slot, axis=1)  # noqa: E731
    at = jnp.minimum(support_slot, M * K - 1)
    mixed = mix(pick(child_logp, at), jnp.log(pick(mass, at)), shown.gate[:, None])
    score = (jnp.log1p(-shown.gate)[:, None] + child_logp).at[rows, support_slot].set(mixed, mode="drop")
    score = jnp.where(alive.reshape(B, M * K), score, -jnp.inf)
    spare = max(0, width + 1 - M * K)
    # Read through barriers: XLA knows a top-k by its one slice of a sort, and slices of that slice would hide it. One
    # for each result, for a barrier around the pair is what the XLA of jax 0.10 breaks off at on several devices.
    found = jax.lax.top_k(jnp.pad(score, ((0, 0), (0, spare)), constant_values=-jnp.inf), width + 1)
    best, slot = (jax.lax.optimization_barrier(x) for x in found)
    best, pruned, chosen = best[:, :width], best[:, width], slot[:, :width]
    slot = jnp.minimum(chosen, M * K - 1)

    parent = slot // K
    grown = pick(jnp.broadcast_to(begin, (B, M)), parent) + slot % K
    lives = best > -jnp.inf
    code = trie.tok[grown]
    history = jnp.take_along_axis(beams.tokens, parent[..., None], axis=1)
    kept = jnp.full((B, M * K), -1, jnp.int32)  # which new beam a child became
    kept = kept.at[rows, chosen].set(jnp.where(lives, jnp.arange(width), -1), mode="drop")
    beams = Beams(
        node=jnp.where(lives, grown, NO_NODE),
        logp=jnp.where(lives, pick(child_logp, slot), -jnp.inf),
        logmass=jnp.where(lives, jnp.log(pick(mass, slot)), -jnp.inf),
        score=best,
        tokens=jnp.concatenate([history, code[..., None]], axis=-1),
        bound=jnp.maximum(beams.bound, pruned),
        excluded_at=jnp.take_along_axis(kept, excluded_slot, axis=1, mode="fill", fill_value=-1),
        support_at=jnp.take_along_axis(kept, support_slot, axis=1, mode="fill", fill_value=-1),
    )
    return beams, parent


def _slots(trie: Trie, ranks: Int[Array, "B J"], at: Int[Array, "B J"], level: int, beams: int) -> Int[Array, "B J"]:
    """Where in `[M * K]` children the item of each rank lies, given the beam it lies under; M * K if nowhere."""
    K, N = trie.width[level], trie.row.shape[0]
    known = jnp.minimum(ranks, N - 1)
    offset = trie.ancestor[level + 1][known] - _begin(trie, trie.base[trie.ancestor[level][known]], K)
    return jnp.where((ranks < N) & (at >= 0), at * K + offset, beams * K)


def _begin(trie: Trie, first: Array, K: int) -> Array:
    """Where the K nodes begin that hold the children from node `first` on."""
    return jnp.minimum(first, trie.tok.shape[0] - K)


def _runs(x: Int[Array, " S"], begin: Array, K: int) -> Array:
    """`x[begin .. begin + K]` for each entry of `begin`: slices, which cost far less than K gathered numbers each."""
    if begin.size == 1:
        return jax.lax.dynamic_slice(x, (begin.reshape(()),), (K,)).reshape(*begin.shape, K)
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(begin.ndim,), collapsed_slice_dims=(), start_index_map=(0,))
    return jax.lax.gather(x, begin[..., None], numbers, (K,), mode="promise_in_bounds")


def check_normalise(normalise: str) -> None:
    """ValueError unless it is one of `Normalise`."""
    if normalise not in get_args(Normalise):
        raise ValueError(f"normalise={normalise!r}: must be one of {', '.join(get_args(Normalise))}")


def lanes_of(trie: Trie, beams: int, k: int) -> int:
    """Beams kept between levels: enough for k items, and no more than a level has nodes."""
    return min(max(beams, enough(trie, k)), max(trie.size[1:-1], default=1))


def enough(trie: Trie, k: int) -> int:
    """So many spellings are of at least k items: k - 1 items have fewer."""
    return (k - 1) * trie.most + 1


def distinct(rows: Int[Array, "B W"], k: int) -> tuple[Int[Array, "B k"], Bool[Array, "B k"]]:
    """(places of the first k different rows of each list, in order; which of them there are); -1 = no row."""
    users = jnp.arange(len(rows))[:, None]
    order = jnp.argsort(rows, axis=1, stable=True)
    like = jnp.take_along_axis(rows, order, axis=1)
    again = jnp.pad(like[:, 1:] == like[:, :-1], ((0, 0), (1, 0)))
    new = (rows >= 0) & ~jnp.zeros_like(again).at[users, order].set(again)
    places = jnp.argsort(~new, axis=1, stable=True)[:, :k]
    return places, jnp.take_along_axis(new, places, axis=1)


def search(
    model: Transformer,
    items: ItemTable,
    trie: Trie,
    prefix: Prefix,
    shown: Shown,
    *,
    beams: int,
    k: int,
    temperature: Float[Array, " B"] | None = None,
    normalise: Normalise = "level",
) -> Found:
    """The k best items after each prefix: one step a code level, `beams` kept in between.

    Codes are normalised over the slice of their level (`level`) or over all ids (`vocab`), so that a filter never
    changes the model's order, or over what may be shown (`children`), where it does: a code alone in its place is
    certain. Logits are divided by a user's `temperature` first. So many beams are kept that a list is filled whenever
    k items may be shown. Where items have several spellings, scores and their parts are those of the best one found:
    of the best one there is, if the list is exact.
    """
    check_normalise(normalise)
    L, B = trie.levels, prefix.lengths.shape[0]
    lanes = lanes_of(trie, beams, k)
    suffix = prefix.lanes(max(L - 1, 1), lanes)
    ancestors = jnp.zeros((B, lanes, max(L - 1, 1)), jnp.int32)
    own = jnp.arange(lanes)
    now, hidden = root(shown), prefix.hidden[:, None]
    for level in range(L):
        codes = model.vocab.levels[level]
        heat = None if temperature is None else temperature[:, None, None]
        logp = jax.nn.log_softmax(_logits(model, items, hidden, level + 1, heat), axis=-1)
        if normalise == "vocab":
            logp += _share(model, items, hidden, level + 1, heat)
        bound = now.bound  # what the last step prunes is below its k-th item by construction
        width = enough(trie, k) if level == L - 1 else lanes
        now, parent = step(trie, shown, now, logp, level, width, among_children=normalise == "children")
        if level == L - 1:
            break
        if level:
            ancestors = jnp.take_along_axis(ancestors, parent[..., None], axis=1)
        ancestors = ancestors.at[:, :, level].set(own)
        tokens = (codes.offset + now.tokens[..., -1])[..., None]
        positions = jnp.broadcast_to((prefix.lengths + level)[:, None, None], tokens.shape)
        hidden, suffix = model.extend(
            tokens, jnp.full_like(tokens, -1), positions, items, prefix.kv, prefix.lengths, suffix, ancestors, level
        )
        hidden = hidden[:, :, 0]
    return listed(trie, now, bound, k)


def listed(trie: Trie, beams: Beams, bound: Float[Array, " B"], k: int) -> Found:
    """The k best items of beams that are whole spellings, with the certificate; `bound`: the best score pruned before."""
    rows = jnp.where(beams.node >= 0, trie.row[jnp.maximum(beams.node - trie.leaf0, 0)], -1)
    score, model_logp, memory_logp = beams.score, beams.logp, beams.logmass
    if trie.most > 1:
        at, there = distinct(rows, k)
        pick = lambda x, none: jnp.where(there, jnp.take_along_axis(x, at, axis=1), none)  # noqa: E731
        rows = pick(rows, -1)
        score, model_logp, memory_logp = (pick(x, -jnp.inf) for x in (score, model_logp, memory_logp))
    slack = ROUNDING * jnp.maximum(1.0, jnp.abs(bound))
    exact = (bound == -jnp.inf) | (score[:, -1] >= bound + slack)
    return Found(rows, score, model_logp, memory_logp, exact)


def _logits(model: Transformer, items: ItemTable, hidden: Array, slice_index: int, heat: Array | None) -> Array:
    logits = model.logits(hidden, slice_index, items)
    return logits if heat is None else logits / heat


def _share(model: Transformer, items: ItemTable, hidden: Array, slice_index: int, heat: Array | None) -> Array:
    """Log-probability `[B, M, 1]` that the next id is of this slice and not of another."""
    slices = range(len(model.vocab.slices))
    mass = [jax.nn.logsumexp(_logits(model, items, hidden, s, heat), axis=-1, keepdims=True) for s in slices]
    return jax.nn.log_softmax(jnp.concatenate(mass, axis=-1), axis=-1)[..., slice_index, None]
