"""One optimiser step and one evaluation of the losses: pure functions of (state, batch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from m6rec_jax.config import PruneConfig
from m6rec_jax.model.experts import penalty
from m6rec_jax.model.items import Catalogues
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import View
from m6rec_jax.objectives.contrast import Pairs, contrastive, of_pairs
from m6rec_jax.objectives.detection import added, detect
from m6rec_jax.objectives.exits import exit_term
from m6rec_jax.objectives.generator import Replacing, in_pools, rewritten
from m6rec_jax.objectives.loss import TaskLoss, cross_entropy
from m6rec_jax.training.beside import Beside, stepped
from m6rec_jax.training.distill import Lesson, relation_loss
from m6rec_jax.training.guards import Guard, judge
from m6rec_jax.training.prune import advanced, masked
from m6rec_jax.training.state import TrainState

Batch = dict[str, jax.Array]

# Where a CPU has vectors of 512 bits: XLA prefers those of 256, with which exponentials take half as long again.
CPU_OPTIONS = {"xla_cpu_prefer_vector_width": 512}


class StepMetrics(NamedTuple):
    """What a step measured: loss sums and weights a task, gradient norm before clipping, real tokens, skips so far and in a row;
    with pruning, the share of each matrix that is zero."""

    losses: TaskLoss
    grad_norm: jax.Array
    tokens: jax.Array
    skipped: jax.Array
    guard: Guard
    sparsity: jax.Array | None = None


def slice_losses(
    blueprint: Blueprint,
    n_tasks: int,
    params: Any,
    batch: Batch,
    items: Catalogues,
    key: jax.Array | None = None,
    smoothing: float = 0.0,
    negatives: int = 0,
    pairs: Pairs | None = None,
    lesson: Lesson | None = None,
    teacher: Any = None,
    replacing: Replacing | None = None,
    beside: Beside | None = None,
) -> TaskLoss:
    """Loss sums of one `[B, T]` slice of a batch; `key` turns dropout on. `pairs`: of the retrieval tasks, if there are any.
    `lesson`, `teacher`: whose relations are learnt. `replacing`, `beside`: who rewrites tokens that are to be detected; in
    training only."""
    key_model, key_loss = (None, None) if key is None else jax.random.split(key)
    model = blueprint.bind(params)
    given, written = batch, None
    if replacing is not None and beside is not None and key is not None:
        generator = beside.params["generator"]
        batch, written = rewritten(replacing, generator, given, items, jax.random.fold_in(key, 2))
    view = View(batch["positions"], batch["k_start"], batch["k_end"])
    rows, relation = (batch["tokens"], batch["item_rows"], view, items, key_model), None
    exits = blueprint.config.exits and key is not None
    if lesson is None:
        hidden, routing = model.routed(*rows, every=exits)
    else:
        hidden, routing, vectors = model.observed(*rows, lesson.layer_of(model), every=exits)
        of_teacher = lesson.vectors(teacher, batch, items)
        relation = relation_loss(vectors, of_teacher, view.k_start, view.k_end, lesson.heads_of(model))
    states, hidden = (hidden, hidden[-1]) if exits else (None, hidden)
    targets, weights, task_ids = batch["targets"], batch["loss_weights"], batch["task_ids"]
    tokens = weights if pairs is None else jnp.where(of_pairs(pairs, task_ids), 0, weights)
    if replacing is not None:
        tokens = jnp.where(in_pools(replacing.tasks, task_ids), 0, tokens)
    losses = cross_entropy(model, hidden, targets, tokens, task_ids, n_tasks, items, key_loss, smoothing, negatives)
    if pairs is not None:
        of_rows = (batch["tokens"], targets, weights, task_ids, batch["segment_ids"])
        meant = model.meant(hidden, batch["tokens"], batch["item_rows"], items, key_model)
        found = contrastive(model, meant, *of_rows, n_tasks, pairs)
        losses = TaskLoss(losses.loss + found.loss, losses.weight + found.weight)
    if replacing is not None and beside is not None and key is not None and written is not None:
        key_fill, of_beside = jax.random.fold_in(key, 3), (beside.params, beside.baseline)
        loss, weight, found = detect(replacing, *of_beside, hidden, given, written, n_tasks, items, key_fill, negatives)
        losses = losses._replace(loss=losses.loss + loss, weight=losses.weight + weight, detection=found)
    if states is not None:
        losses = losses._replace(exits=exit_term(model, states, targets, tokens, items))
    return losses._replace(routing=routing, relation=relation)


def make_train_step(
    blueprint: Blueprint,
    optimizer: optax.GradientTransformation,
    n_tasks: int,
    seed: int,
    smoothing: float = 0.0,
    negatives: int = 0,
    average: float = 0.0,
    explode: float = 0.0,
    pairs: Pairs | None = None,
    prune: PruneConfig = PruneConfig(),  # noqa: B008  frozen
    lesson: Lesson | None = None,
    replacing: Replacing | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The jitted step over a batch `[accumulate, B, T]`; the state is donated, but on CPU, where XLA then updates it in place one
    buffer after another and takes a third longer.

    The mean over target tokens is taken once, over all slices, and that of what a router pays over all tokens and
    layers. A running mean of the parameters (`average`: its decay, less over the first steps) follows them where the
    state holds one. A step whose gradient is not finite, or `explode` times as large as usual (0: however large),
    changes nothing but the counters (training/guards). With `prune` the state's masks follow its schedule, and what
    they cut stays zero. With a `lesson` the step takes the teacher's parameters as one more argument. With `replacing` the
    state's generator and head are trained beside the model.
    """

    def step(state: TrainState, batch: Batch, items: Catalogues, teacher: Any = None) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        total = jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0)
        tokens = jnp.sum(batch["segment_ids"] > 0)
        routed = jnp.maximum(tokens, 1) * blueprint.config.layers

        def slice_loss(learnt: Any, part: Batch, index: jax.Array) -> tuple[jax.Array, TaskLoss]:
            key_of, (params, others) = jax.random.fold_in(key, index), learnt
            beside = None if state.beside is None else state.beside._replace(params=others)
            losses = slice_losses(
                blueprint, n_tasks, params, part, items, key_of, smoothing, negatives, pairs, lesson, teacher, replacing, beside
            )  # fmt: skip
            loss = jnp.sum(losses.loss) / total
            if losses.exits is not None:
                loss = loss + losses.exits / total
            if lesson is not None:
                loss = loss + lesson.config.weight * losses.relation / jnp.maximum(tokens, 1)
            if losses.routing is not None:
                loss = loss + penalty(blueprint.config, losses.routing) / routed
            if replacing is not None:
                loss = loss + added(replacing, losses.detection, total)
            return loss, losses

        def add(carry: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            new = jax.grad(slice_loss, has_aux=True)(learnt, *part)
            return jax.tree.map(jnp.add, carry, new), None

        learnt = state.params, None if state.beside is None else state.beside.params
        slices = batch["tokens"].shape[0]
        numbered = (batch, jnp.arange(slices))
        carry = jax.grad(slice_loss, has_aux=True)(learnt, *jax.tree.map(lambda x: x[0], numbered))
        if slices > 1:
            carry, _ = jax.lax.scan(add, carry, jax.tree.map(lambda x: x[1:], numbered))
        (grads, of_others), losses = carry

        masks = state.masks
        if masks is not None:
            masks = advanced(prune, masks, state.params, state.step + 1)
            grads = masked(masks.kept, grads)
        norm, beside = optax.tree.norm(grads), None
        if replacing is not None:
            beside, finite = stepped(optimizer, state.beside, of_others, losses.detection)
            norm = jnp.where(finite, norm, jnp.nan)
        good, guard = judge(state.guard, norm, state.step - state.skipped, explode)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jnp.where(good, new, old)  # noqa: E731
        mean = state.average
        if mean is not None:
            decay = jnp.minimum(average, (1 + state.step) / (10 + state.step))
            mean = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), mean, params)
        if masks is not None:
            params, mean = (None if x is None else masked(masks.kept, x) for x in (params, mean))
            masks = jax.tree.map(keep, masks, state.masks)
        skipped = state.skipped + (1 - good.astype(jnp.int32))
        new = TrainState(
            jax.tree.map(keep, params, state.params),
            jax.tree.map(keep, moments, state.optimizer),
            state.step + 1,
            skipped,
            jax.tree.map(keep, mean, state.average),
            guard,
            masks,
            jax.tree.map(keep, beside, state.beside),
        )
        return new, StepMetrics(losses, norm, tokens, skipped, guard, None if masks is None else masks.share)

    on_cpu = jax.default_backend() == "cpu"
    return jax.jit(step, donate_argnums=() if on_cpu else 0, compiler_options=CPU_OPTIONS if on_cpu else None)


def make_eval_step(
    blueprint: Blueprint, n_tasks: int, pairs: Pairs | None = None
) -> Callable[[Any, Batch, Catalogues], TaskLoss]:
    """Jitted loss sums of a batch `[1, B, T]`, without dropout."""

    def losses(params: Any, batch: Batch, items: Catalogues) -> TaskLoss:
        part = {name: x[0] for name, x in batch.items()}
        return slice_losses(blueprint, n_tasks, params, part, items, pairs=pairs)

    return jax.jit(losses)
