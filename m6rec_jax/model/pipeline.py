"""Layers dealt over devices, rows flowing through them in microbatches (GPipe, Huang et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from m6rec_jax.model.sharding import STAGE, shards, split_rows

# (microbatch, its layers' inputs, what else its rows have, (number of the microbatch, how many)) -> the microbatch after them
Run = Callable[[Array, Any, Any, tuple[Array, int]], Array]


def pipelined(run: Run, x: Float[Array, "B T D"], layers: Any, rows: Any, microbatches: int) -> Float[Array, "B T D"]:
    """`x` after all layers, each stage of the mesh in force holding a run of them.

    `layers`: arrays `[N, ...]`, of which `run` gets this stage's; `rows`: arrays `[B, ...]`, of which it gets those of the
    microbatch. Row r is in microbatch `r % microbatches`, so that every device keeps its rows. At each of
    `microbatches + stages - 1` ticks all stages work at once, each hands on what it has done, and
    `stages - 1` ticks of each are idle (spent on zeros).
    """
    stages = shards("layers")
    onward = [(i, i + 1) for i in range(stages - 1)]

    def flow(x: Array, layers: Any, rows: Any) -> Array:
        stage = jax.lax.axis_index(STAGE)

        def tick(held: Array, now: Array) -> tuple[Array, Array]:
            at = lambda y, i: jax.lax.dynamic_index_in_dim(y, jnp.clip(i, 0, microbatches - 1), keepdims=False)  # noqa: E731
            number = now - stage  # of the microbatch that is here
            done = run(
                jnp.where(stage == 0, at(x, now), held),
                layers,
                jax.tree.map(lambda y: at(y, number), rows),
                (jnp.clip(number, 0, microbatches - 1), microbatches),
            )
            return jax.lax.ppermute(done, STAGE, onward), done

        _, done = jax.lax.scan(tick, jnp.zeros_like(x[0]), jnp.arange(microbatches + stages - 1))
        return jax.lax.psum(jnp.where(stage == stages - 1, done[stages - 1 :], 0), STAGE)

    whole = lambda tree: jax.tree.map(lambda _: P(), tree)  # noqa: E731
    x, rows = jax.tree.map(lambda y: jnp.swapaxes(split_rows(y, microbatches), 0, 1), (x, rows))
    in_specs = (P(), jax.tree.map(lambda _: P(STAGE), layers), whole(rows))
    y = jax.shard_map(flow, in_specs=in_specs, out_specs=P(), axis_names={STAGE}, check_vma=False)(x, layers, rows)
    y = jnp.swapaxes(y, 0, 1)
    where = jax.typeof(y).sharding.spec
    return jax.lax.reshape(y, (y.shape[0] * y.shape[1], *y.shape[2:]), out_sharding=P(where[0], *where[2:]))
