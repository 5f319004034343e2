"""Cross-entropy over vocabulary slices, in chunks that never hold `[tokens, vocab]`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.backend import get_default_device
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
        # On a CPU turned once, before the chunks: so each chunk's gradient comes out as its product makes it and is added up
        # so. Without a gradient, and where a turned side costs nothing, no copy is made.
        once = key is not None and get_default_device().platform == "cpu"
        apart = jax.lax.optimization_barrier if once else lambda x: x
        turned = [None if i in samples else apart(t.ids.T) for i, t in enumerate(tables)]
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
                here, at = jnp.any(slice_id == i), target - s.offset
                if i in samples:
                    over = partial(_if_here, partial(_sampled_nll, sample=samples[i], size=s.size, smoothing=smoothing))
                    # Alone, a chunk's logits are there at its backward pass anyway: computing them twice saves nothing.
                    over = jax.checkpoint(over) if len(chunks[1]) > 1 else over
                    value = over(here, h, at, table, legal)
                else:
                    groups = jnp.asarray(option_groups(model.vocab)) if s.name == OPTIONS else None
                    even, real = 0.0 if s.name == OPTIONS else smoothing, None if s.size == s.padded else s.size
                    rows = jax.lax.stop_gradient(table.ids)
                    value = _slice_nll(real, even, here, h, turned[i], rows, at, legal, groups)
                total = total + jnp.where(slice_id == i, value, 0)
            return None, total

        _, losses = jax.lax.scan(nll, None, chunks)
        losses = losses.reshape(-1)[: targets.shape[0]]
        of_task = jax.nn.one_hot(task_ids, n_tasks, dtype=jnp.float32)
        loss = (losses * weights[by_slice]) @ of_task[by_slice]
        return TaskLoss(*(sharding.psum(x, sharding.TOKENS) for x in (loss, weights @ of_task)))

    row, no = ("batch", "position"), (None,)
    in_tables, in_seen = [table.axes for table in tables], [("vocab",)] * len(seen)
    in_axes = ((*row, None), row, row, row, in_tables, dict.fromkeys(samples, no), in_seen)
    run = sharding.per_shard(local, in_axes, TaskLoss(no, no))
    return run(hidden, targets, weights, task_ids, tables, samples, seen)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _slice_nll(
    real: int | None,
    smoothing: float,
    here: Bool[Array, ""],
    h: Float[Array, "c D"],
    turned: Float[Array, "D V"],
    table: Float[Array, "V D"],
    target: Int[Array, " c"],
    legal: Bool[Array, " V"] | None,
    groups: Int[Array, " padded"] | None,
) -> Float[Array, " c"]:
    """Negative log-likelihood of row `target` of a table that may be sharded along tensor; zeros where no target of the chunk
    is `here`.

    The table is given twice, and its gradient is that of `turned`. `real`: how many rows are no spare ones, None: all.
    `groups`: a target is normalised over the rows of its own group. Of the logits the backward pass keeps their
    log-sum-exp alone: it multiplies once more, and then needs one pass over the products.
    """
    return _slice_forward(real, smoothing, here, h, turned, table, target, legal, groups)[0]


def _slice_forward(
    real: int | None, smoothing: float, here: Array, h: Array, turned: Array, table: Array, target: Array,
    legal: Array | None, groups: Array | None,
) -> tuple[Array, tuple[Any, ...]]:  # fmt: skip
    def present(h: Array, turned: Array, table: Array) -> tuple[Array, Array]:
        scores, allowed = _allowed_scores(h, turned, target, real, legal, groups)
        top = sharding.pmax(jnp.max(scores, axis=-1), sharding.TENSOR)
        mass = sharding.psum(jnp.sum(jnp.exp(scores - top[:, None]), axis=-1), sharding.TENSOR)
        hit = jnp.sum(h.astype(jnp.float32) * _rows_of(table, target).astype(jnp.float32), axis=-1)
        hit = sharding.pmean(hit, sharding.TENSOR)  # the same on every shard
        mass = top + jnp.log(mass)
        if smoothing == 0:
            return mass - hit, mass
        total = sharding.psum(jnp.sum(jnp.where(allowed, scores, 0), axis=-1), sharding.TENSOR)
        return mass - (1 - smoothing) * hit - smoothing * total / _count(allowed, len(table)), mass

    nothing = sharding.pmax(h[:, 0].astype(jnp.float32) * 0, sharding.TENSOR)
    value, mass = jax.lax.cond(here, present, lambda *_: (nothing, nothing), h, turned, table)
    return value, (here, h, turned, table, target, legal, groups, mass)


def _slice_backward(real: int | None, smoothing: float, kept: tuple[Any, ...], g: Array) -> tuple[Array | None, ...]:
    here, h, turned, table, target, legal, groups, mass = kept

    def present(h: Array, turned: Array, table: Array) -> tuple[Array, Array]:
        scores, allowed = _allowed_scores(h, turned, target, real, legal, groups)
        share = jnp.exp(scores - mass[:, None])
        if smoothing:
            share = share - jnp.where(allowed, smoothing / _count(allowed, len(table))[:, None], 0)
        share = share - jnp.where(_row_numbers(len(table)) == target[:, None], 1 - smoothing, 0)
        return _scores_backward(h, table, share * g[:, None])

    of_h, of_turned = jax.lax.cond(here, present, lambda h, turned, table: (h * 0, turned * 0), h, turned, table)
    return None, of_h, of_turned, None, None, None, None


_slice_nll.defvjp(_slice_forward, _slice_backward)


def _if_here(nll: Callable[..., Array], here: Array, h: Array, target: Array, table: OutputTable, legal: Any) -> Array:
    """`nll` of a chunk in which the slice has targets; zeros of any other."""
    nothing = sharding.pmax(h[:, 0].astype(jnp.float32) * 0, sharding.TENSOR)
    return jax.lax.cond(
        here, lambda h, target: nll(h, target, table, legal=legal), lambda h, target: nothing, h, target
    )


def _allowed_scores(
    h: Array, turned: Array, target: Array, real: int | None, legal: Array | None, groups: Array | None
) -> tuple[Float[Array, "c V"], Bool[Array, "#c V"] | bool]:
    """Products of states and rows in float32, `NEVER` where a target is not normalised over the row; and where it is."""
    scores = jnp.einsum("cd,dv->cv", h, turned, preferred_element_type=jnp.float32)
    rows = _row_numbers(turned.shape[1])
    inside = True if real is None else (rows < real)[None]
    if groups is not None:
        allowed = groups[rows] == groups[target][:, None]
    elif legal is not None:
        allowed = inside & (legal[: len(rows)] | (rows == target[:, None]))
    elif real is None:
        return scores, True
    else:
        allowed = inside
    return jnp.where(allowed, scores, NEVER), allowed


def _count(allowed: Array | bool, rows: int) -> Float[Array, "#c"]:
    """Over how many rows a target is normalised."""
    allowed = jnp.broadcast_to(allowed, (*jnp.shape(allowed)[:-1], rows)[-2:])
    return jnp.atleast_1d(sharding.psum(jnp.sum(allowed, axis=-1).astype(jnp.float32), sharding.TENSOR))


def _row_numbers(held: int) -> Int[Array, " V"]:
    """Which rows of the whole table a shard along tensor that has so many holds."""
    return sharding.tensor_index() * held + jnp.arange(held)


def option_groups(vocab: Vocab) -> np.ndarray:
    """Which task with options each row of the options slice belongs to, int32 `[padded]`; -1 for spare rows."""
    groups = np.full(vocab.slices[-1].padded, -1, np.int32)
    groups[: sum(vocab.options)] = np.repeat(np.arange(len(vocab.options)), vocab.options)
    return groups


def _scores_backward(h: Array, table: Array, g: Float[Array, "c V"]) -> tuple[Array, Array]:
    """Gradients of states, and of rows turned, from that of their products. It is rounded to the type of the states before it is multiplied, and
    where a side of a product has to be turned it is the small one: XLA for a CPU multiplies bfloat16 by float32, and
    turned matrices, several times slower."""
    g = g.astype(h.dtype)
    # Two letters that are summed over: of one, XLA would multiply by the turned matrix itself instead of a turned copy.
    parts = next(n for n in (4, 2, 1) if len(h) % n == 0)
    two = lambda x: x.reshape(parts, -1, x.shape[1])  # noqa: E731
    return jnp.einsum("cv,vd->cd", g, table), jnp.einsum("abd,abv->dv", two(h), two(g))


def _sampled_nll(
    h: Float[Array, "c D"],
    target: Int[Array, " c"],
    table: OutputTable,
    legal: Bool[Array, " V"] | None,
    size: int,
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
