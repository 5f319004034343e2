"""Losses of replaced-token detection: the model finds what a generator wrote, the generator learns to fill in (ELECTRA,
Clark et al. 2020) and, if asked to, to be taken for real."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m6rec_jax.model import sharding
from m6rec_jax.model.items import Catalogues
from m6rec_jax.model.transformer import Transformer
from m6rec_jax.objectives.generator import Batch, Replacing, Written, in_pools
from m6rec_jax.objectives.loss import cross_entropy

BINS, SPAN = 256, 8.0  # logits between -SPAN and SPAN are counted in so many bins, for the area under the curve


class Detection(NamedTuple):
    """Sums over a batch: of the model's detection, and of what the generator learns from it.

    `loss`: weighted negative log-likelihood of "was replaced"; `asked` positions, answered `right`; `logits [2, BINS]`, how
    often each was given to a token that stood there and to one that did not. `generator`: what it minimises, of which
    `filled` is its own cross-entropy, at so many `hidden` positions; `reward` at so many `replaced` ones.
    """

    loss: Float[Array, ""]
    asked: Float[Array, ""]
    right: Float[Array, ""]
    replaced: Float[Array, ""]
    logits: Float[Array, "2 n"]
    generator: Float[Array, ""]
    filled: Float[Array, ""]
    hidden: Float[Array, ""]
    reward: Float[Array, ""]

    def means(self) -> dict[str, float]:
        """What is logged, of sums that are known. AUC is that of the bins, equals counted half."""
        asked, replaced, hidden = (max(float(n), 1.0) for n in (self.asked, self.replaced, self.hidden))
        real, false = np.asarray(self.logits, np.float64)
        below = np.cumsum(real) - real / 2
        auc = float(below @ false / max(real.sum() * false.sum(), 1.0))
        return {
            "detection/accuracy": float(self.right) / asked,
            "detection/auc": auc,
            "detection/replaced": float(self.replaced) / asked,
            "detection/original": float(self.reward) / replaced,
            "generator/loss": float(self.filled) / hidden,
        }


def detect(
    replacing: Replacing,
    params: dict[str, Any],
    baseline: Float[Array, ""],
    hidden: Float[Array, "B T D"],
    batch: Batch,
    written: Written,
    n_tasks: int,
    items: Catalogues,
    key: jax.Array,
    negatives: int = 0,
) -> tuple[Float[Array, " tasks"], Float[Array, " tasks"], Detection]:
    """Loss sums and weights a task of detection, and all that was measured. `batch` as it was before it was rewritten;
    `hidden`: the model's states of it rewritten, from which `params["head"]` (`gain [D]`, `bias`) makes a logit a position.

    A token that the generator wrote and that stood there is no replaced one. Only the model and the head have a gradient
    from `loss`, only the generator from `generator`: its cross-entropy at the hidden positions and, with `reward`, the
    policy gradient (REINFORCE, Williams 1992) of log p(original) as the model has it, less `baseline`, where it replaced.
    """
    head, generator = params["head"], replacing.generator.bind(params["generator"])
    asked = jnp.where(in_pools(replacing.tasks, batch["task_ids"]), batch["loss_weights"], 0)
    replaced = written.hidden & (written.tokens != written.original)

    def local(hidden, replaced, asked, task_ids, gain, bias):
        logit = jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), gain) + bias
        nll = jax.nn.softplus(jnp.where(replaced, -logit, logit))
        of_task = jax.nn.one_hot(task_ids, n_tasks, dtype=jnp.float32)
        there = asked > 0
        count = lambda x: jnp.sum(x, dtype=jnp.float32)  # noqa: E731
        places = jnp.clip((logit + SPAN) / (2 * SPAN) * BINS, 0, BINS - 1).astype(jnp.int32)
        made = jnp.stack([
            jnp.zeros(BINS).at[places.reshape(-1)].add((there & of).reshape(-1).astype(jnp.float32))
            for of in (~replaced, replaced)
        ])  # fmt: skip
        sums = (
            jnp.einsum("bt,btn->n", nll * asked, of_task),
            jnp.einsum("bt,btn->n", asked, of_task),
            count(there),
            count(there & ((logit > 0) == replaced)),
            count(there & replaced),
            made,
        )
        return tuple(sharding.psum(x, sharding.TOKENS) for x in sums), jax.nn.log_sigmoid(-logit)

    row, no = ("batch", "position"), (None,)
    out_axes = ((no, no, (), (), (), (None, None)), row)
    run = sharding.per_shard(local, ((*row, None), row, row, row, no, ()), out_axes)
    found, original = run(hidden, replaced, asked, batch["task_ids"], head["gain"], head["bias"])
    loss, weight, n_asked, right, n_replaced, logits = found
    filled, total = _of_generator(replacing, generator, baseline, written, replaced & (asked > 0), original, items, key, negatives)  # fmt: skip
    reward = jnp.sum(jnp.where(replaced & (asked > 0), original, 0))
    n_hidden = jnp.sum(written.hidden, dtype=jnp.float32)
    measured = Detection(jnp.sum(loss), n_asked, right, n_replaced, logits, total, filled, n_hidden, reward)
    return loss, weight, measured


def _of_generator(
    replacing: Replacing,
    generator: Transformer,
    baseline: Float[Array, ""],
    written: Written,
    replaced: Array,
    original: Float[Array, "B T"],
    items: Catalogues,
    key: jax.Array,
    negatives: int,
) -> tuple[Array, Array]:
    """Sums: the generator's cross-entropy at hidden positions, and that with the policy gradient added."""

    def nll(targets: Int[Array, "B T"], weights: Array, *how: Any) -> Array:
        one = jnp.zeros_like(targets)
        return cross_entropy(generator, written.states, targets, weights, one, 1, items, *how).loss[0]

    filled = nll(written.original, written.hidden.astype(jnp.float32), key, 0.0, negatives)
    if not replacing.config.reward:
        return filled, filled
    # Of a cross-entropy with weights only positive ones count: what was better than usual, less what was worse.
    gained = jax.lax.stop_gradient(jnp.where(replaced, original - baseline, 0))
    policy = nll(written.tokens, jnp.maximum(gained, 0)) - nll(written.tokens, jnp.maximum(-gained, 0))
    return filled, filled + replacing.config.reward * policy


def added(replacing: Replacing, found: Detection, total: Float[Array, ""]) -> Float[Array, ""]:
    """What, added to the mean of all tasks' losses over `total` targets, gives detection its weight and the generator its
    sum: nothing else reaches its parameters, so its gradient is brought to a mean afterwards."""
    return (replacing.config.weight - 1) * found.loss / total + found.generator
