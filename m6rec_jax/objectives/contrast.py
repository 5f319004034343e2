"""In-batch contrastive softmax of queries over items, corrected for how often each is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m6rec_jax.data.plan import Pool
from m6rec_jax.model import sharding
from m6rec_jax.model.attention import NEVER
from m6rec_jax.model.transformer import Transformer
from m6rec_jax.objectives.loss import TaskLoss
from m6rec_jax.objectives.retrieval import OWN
from m6rec_jax.vocab import SPECIALS, UNK

TEMPERATURE = 0.07  # M6-Rec


class Pairs(NamedTuple):
    """What a step must know of retrieval: which pools it is, and how many pairs a row holds at most. Static."""

    pools: tuple[int, ...]
    most: int


def pairs_of(pools: Sequence[Pool], length: int, mask_rate: float) -> Pairs | None:
    """The pairs in rows of `length` packed from these pools; None where no pool is of objective retrieval."""
    which = tuple(i for i, pool in enumerate(pools) if pool.objective.name == "retrieval")
    shortest = length
    for pool in (pools[i] for i in which if len(pools[i].records)):
        for draw in (0.0, 1.0):
            sizes = pool.task.sizes(pool.tokens, pool.tokens * 0 + draw, pool.facts)
            shortest = min(shortest, int(pool.objective.length(*sizes, mask_rate).min()))
    return Pairs(which, length // shortest) if which else None


def of_pairs(pairs: Pairs, task_ids: Int[Array, "B T"]) -> Array:
    """Which positions belong to pairs, whose targets are no tokens."""
    return reduce(jnp.logical_or, [task_ids == pool for pool in pairs.pools])


def counted(tokens: Int[Array, "*n T"], inside: Bool[Array, "*n T"]) -> Bool[Array, "*n T"]:
    """Whose states a segment's vector is made of: of the tokens `inside` it those that say something, text and codes; all of
    them where there are only control symbols, which are alike everywhere and would drown a short text."""
    said = inside & ((tokens >= len(SPECIALS)) | (tokens == UNK))
    return jnp.where(said.any(-1, keepdims=True), said, inside)


def pooled(states: Float[Array, "B T D"], chosen: Bool[Array, "B *P T"]) -> Float[Array, "B *P D"]:
    """Sums of the chosen states, float32: of vectors that `unit` brings to length one, the mean."""
    wide = {"preferred_element_type": jnp.float32, "precision": "highest"}
    return jnp.einsum("b...t,btd->b...d", chosen.astype(states.dtype), states, **wide)


def unit(states: Float[Array, "*n D"], projection: Float[Array, "D V"]) -> Float[Array, "*n V"]:
    """States as vectors of length one, float32."""
    made = jnp.einsum("...d,dv->...v", states.astype(jnp.float32), projection.astype(jnp.float32))
    return made * jax.lax.rsqrt(jnp.sum(made * made, axis=-1, keepdims=True) + 1e-12)


def contrastive(
    model: Transformer,
    states: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    task_ids: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    n_tasks: int,
    pairs: Pairs,
) -> TaskLoss:
    """Loss sums a task of the pairs in a batch (laid out by `arrange_retrieval`): cosine over `TEMPERATURE` of a query and
    all items of its task in the batch, on whatever device, less the log of how often training asks for each (logQ, Yi et
    al. 2019). The same item again, and items of the query's own, are no wrong answers.
    """
    P = pairs.most

    def local(states, tokens, targets, weights, task_ids, segment_ids, of_query, of_item):
        B = len(targets)
        after = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
        ends = of_pairs(pairs, task_ids) & (segment_ids > 0) & (segment_ids != after)
        at = lambda x, places: jnp.take_along_axis(x, places, axis=1)  # noqa: E731
        query, item = (
            jnp.argsort(~(ends & chosen), axis=1, stable=True)[:, :P] for chosen in (weights > 0, weights == 0)
        )
        there = at(ends & (weights > 0), query)

        def vectors(places: Array, projection: Array) -> Array:
            chosen = counted(tokens[:, None], segment_ids[:, None] == at(segment_ids, places)[..., None])
            T = states.shape[1]
            here = jax.lax.dynamic_slice_in_dim(chosen, sharding.index(sharding.SEQUENCE) * T, T, axis=2)
            return unit(sharding.psum(pooled(states, here), sharding.SEQUENCE).reshape(B * P, -1), projection)

        flat = lambda x: x.reshape(B * P, *x.shape[2:])  # noqa: E731
        queries, items = vectors(query, of_query), vectors(item, of_item)
        rows, task, real = flat(at(targets, item)), flat(at(task_ids, query)), flat(there)
        drawn = jnp.log(jnp.maximum(flat(at(targets, query)), 1).astype(jnp.float32))
        before = query[..., None] - 1 - jnp.arange(OWN)
        own = jnp.take_along_axis(targets[:, None], jnp.maximum(before, 0), axis=2)
        same = (
            jnp.take_along_axis(segment_ids[:, None], jnp.maximum(before, 0), axis=2)
            == at(segment_ids, query)[..., None]
        )
        own = flat(jnp.where(same & (before >= 0), own, 0))

        all_items, all_rows, all_tasks, all_real, all_drawn = map(
            sharding.gather_rows, (items, rows, task, real, drawn)
        )
        scores = jnp.einsum("qv,iv->qi", queries, all_items) / TEMPERATURE - all_drawn
        right = sharding.index(sharding.BATCH) * (B * P) + jnp.arange(B * P)
        right = right[:, None] == jnp.arange(len(all_rows))
        known = (all_rows == rows[:, None]) | (own[:, :, None] == all_rows).any(1)
        wrong = all_real & (all_tasks == task[:, None]) & ~(known & (all_rows > 0))
        total = jax.nn.logsumexp(jnp.where(wrong | right, scores, NEVER), axis=1)
        loss = jnp.where(real, total - jnp.sum(jnp.where(right, scores, 0), axis=1), 0)
        of_task = jax.nn.one_hot(task, n_tasks, dtype=jnp.float32)
        return TaskLoss(*(sharding.psum(x @ of_task, sharding.BATCH) for x in (loss, real.astype(jnp.float32))))

    whole, no = ("batch", None), (None,)
    in_axes = (("batch", "position", None), whole, whole, whole, whole, whole, (None, None), (None, None))
    of = model.projections()
    run = sharding.per_shard(local, in_axes, TaskLoss(no, no))
    return run(states, tokens, targets, weights, task_ids, segment_ids, of["query"], of["item"])
