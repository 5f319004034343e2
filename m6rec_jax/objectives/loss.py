"""Cross-entropy over vocabulary slices, in chunks that never hold `[tokens, vocab]`."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from m6rec_jax.model import sharding
from m6rec_jax.model.attention import NEVER
from m6rec_jax.model.experts import Routing
from m6rec_jax.model.items import Catalogues, OutputTable, catalogues
from m6rec_jax.model.transformer import Transformer
from m6rec_jax.vocab import OPTIONS, Vocab

CHUNK = 1024  # positions whose logits exist at one time


class TaskLoss(NamedTuple):
    """Sums a task: weighted negative log-likelihood and weight, both `[tasks]`. The mean is taken once, by the caller.

    `routing`: of a model with experts, sums of what the router is judged by. `exits`: in training with `model.exits`, what
    other layers than the last add to the sum (`objectives.exits`). `relation`: of one that is taught, the sum over tokens of
    how far its relations are from the teacher's. `detection`: of replaced tokens, what was measured (`objectives.detection`).
    """

    loss: Float[Array, " tasks"]
    weight: Float[Array, " tasks"]
    routing: Routing | None = None
    exits: Float[Array, ""] | None = None
    relation: Float[Array, ""] | None = None
    detection: Any = None


def cross_entropy(
    model: Transformer,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    task_ids: Int[Array, "B T"],
    n_tasks: int,
    items: Catalogues,
    key: jax.Array | None = None,
    smoothing: float = 0.0,
    negatives: int = 0,
    chunk: int = CHUNK,
) -> TaskLoss:
    """Weighted cross-entropy a task; a target is normalised over its own slice (DESIGN section 5, mode `level`), an option
    over those of its own task.

    Positions are sorted by slice, so a chunk multiplies by the one or two tables it needs, and positions
    without a target cost nothing. Atomic items that nobody has used are no negatives. In training (with a `key`):
    `smoothing`, share of a target's mass spread evenly over its slice (Szegedy et al. 2016); `negatives`, a slice of
    more ids than that is normalised over a sample of so many (see `_sampled_nll`); 0 = over all. Options have neither.
    """
    hidden = model.embeddings.narrowed(hidden)
    keys = (None,) * len(model.vocab.slices) if key is None else jax.random.split(key, len(model.vocab.slices))
    seen = [facts.seen for facts in catalogues(items)]
    samples, tables = {}, []
    for i, s in enumerate(model.vocab.slices):
        if key is not None and 0 < negatives < s.size and s.name != OPTIONS:
            samples[i] = jax.random.randint(jax.random.fold_in(keys[i], 1), (negatives,), 0, s.size)
            tables.append(model.embeddings.table_parts(i, items, keys[i]).astype(hidden.dtype))
        else:
            tables.append(OutputTable(model.embeddings.table(i, items, keys[i]).astype(hidden.dtype)))

    def local(hidden, targets, weights, task_ids, tables, samples, seen):
        hidden, targets, weights, task_ids = (x.reshape(-1, *x.shape[2:]) for x in (hidden, targets, weights, task_ids))
        hidden = _vary(hidden, sharding.TENSOR)
        tables = jax.tree.map(lambda x: _vary(x, sharding.TOKENS), tables)
        slices = model.vocab.slices
        ends = jnp.array([s.end for s in slices])
        slice_of = jnp.where(weights > 0, jnp.searchsorted(ends, targets, side="right"), len(slices))
        size = min(chunk, targets.shape[0])
        spare = -targets.shape[0] % size
        by_slice = jnp.argsort(slice_of, stable=True)
        pad = lambda x, fill: jnp.pad(x, ((0, spare), *((0, 0),) * (x.ndim - 1)), constant_values=fill)  # noqa: E731
        cut = lambda x, fill: pad(x[by_slice], fill).reshape(-1, size, *x.shape[1:])  # noqa: E731
        chunks = (cut(hidden, 0), cut(targets, 0), cut(slice_of, len(slices)))

        def nll(_, inputs):
            h, target, slice_id = inputs
            total = jnp.zeros_like(target, jnp.float32) * h[:, 0].astype(jnp.float32)
            total = sharding.pmax(total, sharding.TENSOR)
            for i, (s, table) in enumerate(zip(slices, tables, strict=True)):
                legal = seen[s.domain] if s.atomic and model.config.content else None
                if i in samples:
                    over = partial(_sampled_nll, sample=samples[i])
                else:
                    groups = option_groups(model.vocab) if s.name == OPTIONS else None
                    over, table = partial(_slice_nll, groups=groups), table.ids
                value = jax.lax.cond(
                    jnp.any(slice_id == i),
                    lambda h, t, over=over, table=table, s=s, legal=legal: over(
                        h, t - s.offset, table, s.size, legal, 0.0 if s.name == OPTIONS else smoothing
                    ),
                    lambda h, t, total=total: total * 0,
                    h,
                    target,
                )
                total = total + jnp.where(slice_id == i, value, 0)
            return None, total

        # Alone, a chunk's logits are there at its backward pass anyway: computing them twice saves nothing.
        _, losses = jax.lax.scan(jax.checkpoint(nll) if len(chunks[1]) > 1 else nll, None, chunks)
        losses = losses.reshape(-1)[: targets.shape[0]]
        of_task = jax.nn.one_hot(task_ids, n_tasks, dtype=jnp.float32)
        loss = (losses * weights[by_slice]) @ of_task[by_slice]
        return TaskLoss(*(sharding.psum(x, sharding.TOKENS) for x in (loss, weights @ of_task)))

    row, no = ("batch", "position"), (None,)
    in_tables, in_seen = [table.axes for table in tables], [("vocab",)] * len(seen)
    in_axes = ((*row, None), row, row, row, in_tables, dict.fromkeys(samples, no), in_seen)
    run = sharding.per_shard(local, in_axes, TaskLoss(no, no))
    return run(hidden, targets, weights, task_ids, tables, samples, seen)


def _slice_nll(
    h: Float[Array, "c D"],
    target: Int[Array, " c"],
    table: Float[Array, "V D"],
    size: int,
    legal: Bool[Array, " V"] | None,
    smoothing: float,
    groups: np.ndarray | None = None,
) -> Float[Array, " c"]:
    """Negative log-likelihood of row `target` of a table that may be sharded along tensor.

    `groups [padded]`: a target is normalised over the rows of its own group.
    """
    first = sharding.tensor_index() * table.shape[0]
    rows = first + jnp.arange(table.shape[0])
    is_target = rows == target[:, None]
    allowed = rows < size if legal is None else (rows < size) & (legal[: table.shape[0]] | is_target)
    if groups is not None:
        group = jnp.asarray(groups)
        allowed = group[rows] == group[target][:, None]
    scores = _scores(h, table)
    scores = jnp.where(allowed, scores, NEVER)
    top = sharding.pmax(jnp.max(scores, axis=-1), sharding.TENSOR)
    mass = sharding.psum(jnp.sum(jnp.exp(scores - top[:, None]), axis=-1), sharding.TENSOR)
    hit = sharding.psum(jnp.sum(jnp.where(is_target, scores, 0), axis=-1), sharding.TENSOR)
    if smoothing == 0:
        return top + jnp.log(mass) - hit
    total = sharding.psum(jnp.sum(jnp.where(allowed, scores, 0), axis=-1), sharding.TENSOR)
    count = sharding.psum(jnp.sum(allowed, axis=-1), sharding.TENSOR)
    return top + jnp.log(mass) - (1 - smoothing) * hit - smoothing * total / count


def option_groups(vocab: Vocab) -> np.ndarray:
    """Which task with options each row of the options slice belongs to, int32 `[padded]`; -1 for spare rows."""
    groups = np.full(vocab.slices[-1].padded, -1, np.int32)
    groups[: sum(vocab.options)] = np.repeat(np.arange(len(vocab.options)), vocab.options)
    return groups


@jax.custom_vjp
def _scores(h: Float[Array, "c D"], table: Float[Array, "V D"]) -> Float[Array, "c V"]:
    """Products of states and rows in float32. Their gradient is rounded to the type of the states before it is multiplied,
    and where a side of a product has to be turned it is the small one: XLA for a CPU multiplies bfloat16 by float32, and
    turned matrices, several times slower."""
    return jnp.einsum("cd,vd->cv", h, table, preferred_element_type=jnp.float32)


def _scores_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    h, table = kept
    g = g.astype(h.dtype)
    # Two letters that are summed over: of one, XLA would multiply by the turned matrix itself instead of a turned copy.
    parts = next(n for n in (4, 2, 1) if len(h) % n == 0)
    two = lambda x: x.reshape(parts, -1, x.shape[1])  # noqa: E731
    turned = jnp.einsum("abd,abv->dv", two(h), two(g))
    return jnp.einsum("cv,vd->cd", g, table), jax.lax.optimization_barrier(turned).T


_scores.defvjp(lambda h, table: (_scores(h, table), (h, table)), _scores_backward)


def _sampled_nll(
    h: Float[Array, "c D"],
    target: Int[Array, " c"],
    table: OutputTable,
    size: int,
    legal: Bool[Array, " V"] | None,
    smoothing: float,
    sample: Int[Array, " n"],
) -> Float[Array, " c"]:
    """`_slice_nll` with the mass of the wrong answers estimated from ids drawn evenly (Jean et al. 2015, section 3).

    Each stands for (wrong answers in the slice) / (wrong answers drawn), which corrects the logits for how they were
    drawn; a drawn target or an id that is no negative is left out. One sample serves all positions of a step, and
    every shard along tensor, having gathered it, computes the same.
    """
    drawn, right = (_output_rows(table, rows) for rows in (sample, target))
    held = table.ids.shape[0]
    counted = True if legal is None else _rows_of(legal[:held, None], sample)[:, 0] > 0
    wrong = counted & (sample != target[:, None])
    scores = jnp.einsum("cd,nd->cn", h, drawn, preferred_element_type=jnp.float32)
    hit = jnp.sum(h.astype(jnp.float32) * right.astype(jnp.float32), axis=-1)
    there = size if legal is None else sharding.psum(jnp.sum(legal[:held]), sharding.TENSOR)
    stands_for = jnp.log((there - 1) / jnp.maximum(jnp.sum(wrong, axis=-1), 1))
    scores = jnp.where(wrong, scores + stands_for[:, None], NEVER)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1), hit))
    mass = jnp.sum(jnp.exp(scores - top[:, None]), axis=-1) + jnp.exp(hit - top)
    nll = top + jnp.log(mass) - (1 - smoothing) * hit
    if smoothing == 0:
        return sharding.pmean(nll, sharding.TENSOR)
    mean = jnp.sum(jnp.where(wrong, scores - stands_for[:, None], 0), axis=-1) / jnp.maximum(jnp.sum(wrong, axis=-1), 1)
    return sharding.pmean(nll - smoothing * mean, sharding.TENSOR)


def _output_rows(table: OutputTable, rows: Int[Array, " n"]) -> Array:
    """Whole rows of an output table: only what is asked for is projected."""
    ids = _rows_of(table.ids, rows)
    return ids if table.content is None else ids + _rows_of(table.content, rows) @ table.projection


def _rows_of(table: Array, rows: Int[Array, " n"]) -> Array:
    """Rows of a table sharded along tensor, whole on every shard."""
    local = rows - sharding.tensor_index() * table.shape[0]
    inside = (local >= 0) & (local < table.shape[0])
    picked = jnp.where(inside[:, None], table[jnp.where(inside, local, 0)], 0)
    return sharding.psum(picked.astype(jnp.int32) if picked.dtype == bool else picked, sharding.TENSOR)


def _vary(x: Array, axes: str | tuple[str, ...]) -> Array:
    """Mark a shard as differing along `axes` before the loop, so that its gradient is summed there once, after it."""
    return jax.lax.pcast(x, axes, to="varying") if sharding.has_axes(axes) else x
