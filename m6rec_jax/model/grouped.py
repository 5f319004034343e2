"""Rows in groups of uneven size, each group by a matrix of its own.

On a TPU `jax.lax.ragged_dot` is a kernel of the compiler's. On a CPU or GPU jax multiplies every row by every matrix and
throws the rest away; there a loop over blocks of rows does only what is asked, and keeps nothing beside its result.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.backend import get_default_device
from jaxtyping import Array, Float, Int

BLOCK = 128  # rows that are multiplied at a time; where a group ends within a block, the block is multiplied once more


def grouped(rows: Float[Array, "m D"], matrices: Float[Array, "E D F"], sizes: Int[Array, " E"]) -> Float[Array, "m F"]:
    """The first `sizes[0]` rows times `matrices[0]`, the next `sizes[1]` times `matrices[1]`, and so on.

    What lies past the groups is not to be read. Within `shard_map` all three must differ along the same mesh axes, as the
    gradient of each does.
    """
    if get_default_device().platform == "tpu":
        return jax.lax.ragged_dot(rows, matrices, sizes)
    return _by_blocks(rows, matrices, sizes)


@jax.custom_vjp
def _by_blocks(rows: Array, matrices: Array, sizes: Array) -> Array:
    def one(out: Array, expert: Array, take: Callable[[Array], Array], inside: Array, at: Array) -> Array:
        made = take(rows) @ matrices[expert]
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(inside, made, take(out)), at, 0)

    return _walk(one, (rows.shape[0], matrices.shape[2]), rows.dtype, rows, sizes)


def _forward(rows: Array, matrices: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _by_blocks(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(kept: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None]:
    rows, matrices, sizes = kept

    def one(out: Array, expert: Array, take: Callable[[Array], Array], inside: Array, at: Array) -> Array:
        x, dy = jnp.where(inside, take(rows), 0), jnp.where(inside, take(g), 0)
        return out.at[expert].add(jnp.einsum("md,mf->df", x, dy, preferred_element_type=jnp.float32))

    of_matrices = _walk(one, matrices.shape, jnp.float32, rows, sizes)
    return _by_blocks(g, jnp.swapaxes(matrices, 1, 2), sizes), of_matrices.astype(matrices.dtype), None


_by_blocks.defvjp(_forward, _backward)


def _walk(one: Callable[..., Array], shape: tuple[int, ...], dtype: jnp.dtype, like: Array, sizes: Array) -> Array:
    """`one(out, group, take, inside, at)` for each pair of a group and a block of rows that meet, from zeros `shape`.

    `take(x)` is the block of `x` from row `at` on; `inside`: which of its rows are met, each once.
    """
    many = like.shape[0]
    block = min(BLOCK, many)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first = starts // block
    counts = jnp.where(sizes > 0, -(-ends // block) - first, 0)
    before = jnp.cumsum(counts)

    def step(number: Array, out: Array) -> Array:
        group = jnp.sum(before <= number)
        start = (first[group] + number - before[group] + counts[group]) * block
        at = jnp.minimum(start, many - block)  # the last block begins earlier, and its first rows have been taken
        row = at + jnp.arange(block)
        inside = ((row >= jnp.maximum(start, starts[group])) & (row < ends[group]))[:, None]
        return one(out, group, lambda x: jax.lax.dynamic_slice_in_dim(x, at, block, 0), inside, at)

    nothing = jnp.where(False, like[0, 0], 0).astype(dtype)  # which differs along the mesh axes that rows do
    return jax.lax.fori_loop(0, before[-1], step, jnp.broadcast_to(nothing, shape))
