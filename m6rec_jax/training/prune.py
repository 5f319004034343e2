"""Gradual magnitude pruning: ever more of the smallest weights of each matrix are zero for good (Zhu and Gupta 2017)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m6rec_jax.config import PruneConfig
from m6rec_jax.model import sharding


class Masks(NamedTuple):
    """Part of the state: `share` of each pruned matrix that is zero, and by its path (`block.query`) which weights are `kept`."""

    share: jax.Array
    kept: dict[str, jax.Array]


def fresh(config: PruneConfig, params: Any) -> Masks | None:
    """Masks that keep all, placed like the parameters; None where nothing is to be pruned."""
    if not config.sparsity:
        return None
    everything = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.ones_like(x, bool), tree))
    return Masks(jnp.zeros((), jnp.float32), everything(pruned(config, params)))


def pruned(config: PruneConfig, params: Any) -> dict[str, Any]:
    """The parameters that are pruned, by path: matrices of layers, experts among them, and with `tables` those of tokens.

    Norms, routers and projections of item content are few numbers that every token or item passes through.
    """
    block, embeddings = params["block"], params["embeddings"]
    found = {f"block.{name}": x for name, x in block.items() if x.ndim > 2 and name != "router"}
    if config.tables:
        found |= {f"tables.{name}": x for name, x in embeddings["tables"].items()}
        found |= {name: embeddings[name] for name in ("projection",) if name in embeddings}
    return found


def share_at(config: PruneConfig, step: jax.Array) -> jax.Array:
    """Of the final sparsity, how much a state of `step` steps shall have: cubic from 0 after `begin` to 1 at `end`."""
    length = config.end - config.begin
    passed = (step - config.begin) // config.every * config.every / max(length, 1)
    part = 1 - (1 - jnp.clip(passed, 0.0, 1.0)) ** 3
    return jnp.where(step >= config.end, 1.0, part).astype(jnp.float32)


def advanced(config: PruneConfig, masks: Masks, params: Any, step: jax.Array) -> Masks:
    """The masks for a state of `step` steps, by the magnitudes of `params`, inside jit.

    Weights are ranked anew only where the share has grown; those that are zero already are the smallest, so none comes
    back. Exactly `sparsity` of each matrix, rounded, goes in the end.
    """
    part = share_at(config, step)
    share = part * config.sparsity

    def again(params: Any) -> Masks:
        kept = {name: _kept(config, name, x, part) for name, x in pruned(config, params).items()}
        return Masks(share, kept)

    return jax.lax.cond(share > masks.share, again, lambda _: masks, params)


def masked(kept: dict[str, jax.Array], params: Any) -> Any:
    """Parameters (or gradients) with zeros where `kept` is false."""
    cut = lambda name, x: jnp.where(kept[name], x, 0) if name in kept else x  # noqa: E731
    embeddings = params["embeddings"]
    tables = {name: cut(f"tables.{name}", x) for name, x in embeddings["tables"].items()}
    embeddings = {**{name: cut(name, x) for name, x in embeddings.items()}, "tables": tables}
    return {**params, "block": {n: cut(f"block.{n}", x) for n, x in params["block"].items()}, "embeddings": embeddings}


def _kept(config: PruneConfig, name: str, x: jax.Array, part: jax.Array) -> jax.Array:
    """All but the smallest of each matrix in `x`, whole on every device while they are ranked: sorting asks for it."""
    matrices = math.prod(x.shape[: 2 if name.startswith("block.expert") else 1 if name.startswith("block.") else 0])
    whole = sharding.place(x, *(None,) * x.ndim).reshape(matrices, -1)
    most = round(config.sparsity * whole.shape[1])
    gone = jnp.where(part >= 1, most, jnp.floor(part * most).astype(jnp.int32))
    rank = jnp.argsort(jnp.argsort(jnp.abs(whole), axis=1, stable=True), axis=1)
    kept = (rank >= gone).reshape(x.shape)
    return jax.sharding.reshard(kept, jax.typeof(x).sharding) if sharding.has_mesh() else kept
