"""The optimisers, their schedules, and what weight decay leaves alone: all of it is decided here."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers
from optax.contrib._muon import orthogonalize_via_newton_schulz

from m6rec_jax.config import OptimConfig
from m6rec_jax.model import sharding
from m6rec_jax.model.block import Block

# Newton-Schulz coefficients, each step its own (Ahn et al. 2025, Dion): singular values end within a few hundredths of one.
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
MUON_RMS = 0.2  # of an update's entries, as AdamW's have it, so that both share a learning rate (Liu et al. 2025, 2.2)
SMALL = 32  # a matrix with a shorter side keeps its second moments whole: heads are as short as that
COOLDOWN = 0.2  # share of the steps in which `wsd` comes down


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then by `schedule` down to `final` of the peak at the last step.

    cosine, linear: all the way; constant: not at all; wsd: the last fifth of the steps (Hu et al. 2024, MiniCPM).
    """
    peak, low, end = config.learning_rate, config.learning_rate * config.final, max(steps, config.warmup + 1)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup, end, low)
    stays = {"linear": config.warmup, "constant": end, "wsd": max(config.warmup, end - round(COOLDOWN * steps))}
    held = stays[config.schedule]
    down = optax.linear_schedule(peak, low if held < end else peak, max(end - held, 1))
    parts = (optax.linear_schedule(0.0, peak, config.warmup), optax.constant_schedule(peak), down)
    return optax.join_schedules(parts if config.warmup else parts[1:], ([config.warmup] if config.warmup else []) + [held])  # fmt: skip


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then `config.name`, with decoupled decay on layer matrices only.

    adamw (Loshchilov and Hutter 2019); muon: orthogonal updates of layer matrices (Jordan et al. 2024), AdamW for all
    else; adafactor: second moments kept as rows and columns (Shazeer and Stern 2018), no first; sgd: momentum `b1`.
    """
    rate = learning_rate(config, steps)
    adam = optax.adamw(rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=decays)
    if config.name == "adamw":
        return optax.chain(optax.clip_by_global_norm(config.clip), adam)

    def decayed(*rule: optax.GradientTransformation) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(config.weight_decay, decays)
        return optax.chain(*rule, decay, optax.scale_by_learning_rate(rate))

    if config.name == "sgd":
        rule = decayed(optax.trace(config.b1))
    elif config.name == "adafactor":
        rule = decayed(whole(optax.scale_by_factored_rms(min_dim_size_to_factor=SMALL)), optax.clip_by_block_rms(1.0))
    else:
        muon = decayed(optax.trace(config.b1, nesterov=True), whole(optax.stateless(orthogonal)))
        kind = lambda params: jax.tree.map(lambda yes: "muon" if yes else "adamw", decays(params))  # noqa: E731
        rule = optax.partition({"muon": muon, "adamw": adam}, kind)
    return optax.chain(optax.clip_by_global_norm(config.clip), rule)


def orthogonal(updates: Any, params: Any = None) -> Any:
    """Each layer's matrix with all singular values brought near one, times `MUON_RMS` x sqrt(its longer side)."""
    del params

    def one(path: tuple, x: jax.Array) -> jax.Array:
        name = next(key.key for key in reversed(path) if isinstance(getattr(key, "key", None), str))
        inwards, outwards = matrix_axes(name)
        sides = [math.prod(x.shape[a] for a in axes) for axes in (inwards, outwards)]
        even = orthogonalize_via_newton_schulz(
            x, jnp.array(NEWTON_SCHULZ), dimension_numbers=MuonDimensionNumbers(inwards, outwards)
        )
        return even * (MUON_RMS * max(sides) ** 0.5)

    return jax.tree_util.tree_map_with_path(one, updates)


def matrix_axes(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of a stacked layer weight that its product sums over, and those it leaves; every other is one of many matrices."""
    axes = Block.AXES[name]
    embed = axes.index("embed")
    rest = tuple(i for i, axis in enumerate(axes) if i and axis != "embed" and (i, axis) != (1, "experts"))
    return (rest, (embed,)) if embed == len(axes) - 1 else ((embed,), rest)


def whole(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule` on unsharded arrays: on a mesh gradients are gathered for it, and its updates cut up again.

    What mixes the entries of a matrix (reshapes, products, means) is refused on sharded axes; what such a rule keeps,
    it keeps on every device.
    """

    def gathered(tree: Any) -> Any:
        if tree is None or not sharding.has_mesh():
            return tree
        return jax.tree.map(lambda x: sharding.place(x, *(None,) * x.ndim), tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new, state = rule.update(gathered(updates), state, gathered(params))
        if sharding.has_mesh():
            new = jax.tree.map(lambda x, like: jax.sharding.reshard(x, jax.typeof(like).sharding), new, updates)
        return new, state

    return optax.GradientTransformation(lambda params: rule.init(gathered(params)), update)


def decays(params: Any) -> Any:
    """True for matrices inside layers; norms and embedding tables are left alone."""
    layer_matrix = lambda path, x: "block" in jax.tree_util.keystr(path) and x.ndim > 2  # noqa: E731
    return jax.tree_util.tree_map_with_path(layer_matrix, params)


def pure(state: nnx.State) -> Any:
    """A state as nested dicts of arrays: what optax and Orbax see."""
    return nnx.to_pure_dict(state)
