"""One step of tuning, and the scores of instances: gradients go to the tuned numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from m6rec_jax.model import depth, tuning
from m6rec_jax.model.items import Catalogues
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import Transformer, asked, causal
from m6rec_jax.model.tuning import Tuned, TuneSpec
from m6rec_jax.objectives.loss import cross_entropy
from m6rec_jax.training.tune.settings import Rule, optimizer

Batch = dict[str, Array]


class TuneState(NamedTuple):
    """What a step changes."""

    tuned: Tuned
    moments: Any
    step: Array


def states(
    spec: TuneSpec, blueprint: Blueprint, params: Any, tuned: Tuned, batch: Batch, items: Catalogues, key: Array | None
) -> tuple[Transformer, Float[Array, "B T D"]]:
    """The model and the last hidden states of a batch; rows of a task with options are read as pretraining reads them
    (objectives/scoring), others are causal."""
    own, weights = depth.assembled(spec, blueprint, params, tuned)
    model, lengths = own.bind(weights), batch["lengths"]
    view = causal(batch["tokens"].shape, lengths)
    if spec.options:
        view = asked(batch["tokens"], lengths)
    applied = tuning.alone(spec, tuned, lengths.shape[0])
    return model, model.routed(batch["tokens"], batch["item_rows"], view, items, key, applied)[0]


def losses(
    spec: TuneSpec, blueprint: Blueprint, params: Any, tuned: Tuned, batch: Batch, items: Catalogues, key: Array | None
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, "B C"]]:
    """(sum of losses, what it is a sum over, log-probabilities of the options): over instances, or tokens of answers."""
    model, hidden = states(spec, blueprint, params, tuned, batch, items, key)
    if not spec.options:
        of = cross_entropy(model, hidden, batch["targets"], batch["weights"], batch["targets"] * 0, 1, items)
        return of.loss[0], of.weight[0], jnp.zeros((len(batch["lengths"]), 0))
    last = jnp.take_along_axis(hidden, (batch["lengths"] - 1)[:, None, None], axis=1)[:, 0]
    logp = jax.nn.log_softmax(tuning.option_logits(last, *tuning.classifier(spec, tuned)))
    hit = jnp.take_along_axis(logp, batch["labels"][:, None], axis=1)[:, 0]
    return -jnp.sum(hit * batch["counts"]), jnp.sum(batch["counts"]), logp


def make_step() -> Callable[..., tuple[TuneState, Array, Array]]:
    """The jitted `step`, the same for everybody: tunings that differ in rate, seed and length share its programs."""
    donated = () if jax.default_backend() == "cpu" else ("state",)
    return jax.jit(step, static_argnames=("spec", "blueprint", "rule"), donate_argnames=donated)


def step(
    spec: TuneSpec, blueprint: Blueprint, rule: Rule, state: TuneState, params: Any, batch: Batch, items: Catalogues,
    rate: Float[Array, ""], seed: Int[Array, ""],
) -> tuple[TuneState, Array, Array]:  # fmt: skip
    """One step with learning rate `rate`: (state, mean loss, gradient norm). The backbone is read only; a step whose
    gradient is not finite changes nothing but the count."""
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def mean(tuned: Tuned) -> Array:
        total, weight, _ = losses(spec, blueprint, params, tuned, batch, items, key)
        return total / jnp.maximum(weight, 1.0)

    loss, grads = jax.value_and_grad(mean)(state.tuned)
    norm = optax.tree.norm(grads)
    updates, moments = optimizer(rule).update(grads, state.moments, state.tuned)
    keep = lambda new, old: jnp.where(jnp.isfinite(norm), new, old)  # noqa: E731
    updates = jax.tree.map(lambda x: -rate * x, updates)
    tuned = jax.tree.map(keep, optax.apply_updates(state.tuned, updates), state.tuned)
    return TuneState(tuned, jax.tree.map(keep, moments, state.moments), state.step + 1), loss, norm


@partial(jax.jit, static_argnames=("spec", "blueprint"))
def scores(
    spec: TuneSpec, blueprint: Blueprint, tuned: Tuned, params: Any, batch: Batch, items: Catalogues
) -> tuple[Array, Array, Array]:
    """`losses` without dropout."""
    return losses(spec, blueprint, params, tuned, batch, items, None)
