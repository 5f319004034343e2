"""The model that a tuned task runs: the backbone's layers that stay, fresh ones on top, or a backbone of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from m6rec_jax.model import tuning
from m6rec_jax.model.block import Block
from m6rec_jax.model.items import Catalogues, widened
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.tuning import Tuned, TuneSpec

CLOSING = ("output", "down", "expert_down")  # what a layer's branches end with: zero makes it pass everything on


@dataclass(frozen=True)
class Backbone:
    """A frozen model: its shape, its parameters as a checkpoint has them, its catalogue, and its `run` and `step`."""

    blueprint: Blueprint
    params: dict[str, Any]
    items: Catalogues
    source: dict[str, Any]


def begin(
    spec: TuneSpec,
    blueprint: Blueprint,
    params: dict[str, Any],
    seed: int,
    rows: Float[Array, "C D"] | None = None,
) -> Tuned:
    """All numbers that tuning begins with; fresh layers are identities. `rows`: see `tuning.init`."""
    key, key_added = jax.random.split(jax.random.key(seed))
    text = widened(params["embeddings"], params["embeddings"]["tables"]["text"][: blueprint.vocab.text.size])
    tuned = tuning.init(spec, blueprint.config, text, key, rows)
    if spec.add:
        fresh = nnx.to_pure_dict(nnx.state(Block(replace(blueprint.config, layers=spec.add), rngs=nnx.Rngs(key_added))))
        tuned = tuned._replace(added={name: x * 0 if name in CLOSING else x for name, x in fresh.items()})
    if spec.method == "full":
        tuned = tuned._replace(backbone=jax.tree.map(jnp.copy, _cut(spec, blueprint, params)))
    return tuned


def assembled(
    spec: TuneSpec, blueprint: Blueprint, params: dict[str, Any], tuned: Tuned
) -> tuple[Blueprint, dict[str, Any]]:
    """The model and the parameters that rows go through; the backbone's own arrays wherever all its layers stay."""
    params = tuned.backbone or _cut(spec, blueprint, params)
    if spec.add:
        block = {name: jnp.concatenate([x, tuned.added[name]]) for name, x in params["block"].items()}
        params = {**params, "block": block}
    return replace(blueprint, config=replace(blueprint.config, layers=spec.layers)), params


def trained(spec: TuneSpec, blueprint: Blueprint) -> int:
    """How many numbers are trained; nothing is allocated."""
    config, shapes = blueprint.config, blueprint.shapes()
    # Layers, prompts and heads by shape; of the block by a layer's share.
    count = spec.prompts * config.width + sum(map(prod, tuning.shapes(spec, config).values()))
    if spec.options and spec.method not in tuning.OPTIONED:
        count += spec.options * (config.width + 1)
    layer = sum(x.size for x in jax.tree.leaves(shapes["block"])) // config.layers
    count += spec.add * layer
    if spec.method == "full":
        count += blueprint.parameters() - (config.layers - len(spec.keep)) * layer
    return count


def _cut(spec: TuneSpec, blueprint: Blueprint, params: dict[str, Any]) -> dict[str, Any]:
    if spec.keep == tuple(range(blueprint.config.layers)):
        return params
    return {**params, "block": jax.tree.map(lambda x: x[np.array(spec.keep)], params["block"])}
