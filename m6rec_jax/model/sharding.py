"""One table from logical axes to mesh axes. No mesh axis is named outside this file and `training/sharding`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor", "sequence", "expert", "stage")
BATCH = ("data", "fsdp", "expert")
TOKENS = (*BATCH, "sequence")  # over which the tokens of a batch are dealt
TENSOR = "tensor"
SEQUENCE = "sequence"
EXPERT = "expert"
STAGE = "stage"

RULES: dict[str | None, tuple[str, ...]] = {
    "batch": BATCH,  # rows of a batch
    "position": ("sequence",),  # tokens of a row; attention gathers the keys and values of all
    "embed": ("fsdp",),  # the model width of a weight; activations keep it whole
    "kv": ("tensor",),  # kv heads, and with them their query heads
    "ffn": ("tensor",),  # columns of the feed-forward layer
    "experts": ("expert",),  # feed-forward networks of a layer
    "vocab": ("tensor",),  # rows of an embedding table and of the item features
    "layers": (STAGE,),  # a run of layers each (model/pipeline)
    None: (),
}


def spec(*logical: str | None) -> P:
    """PartitionSpec of a tensor with these logical axes.

    Raises ValueError when an axis is unknown or when one mesh axis would land twice on the tensor.
    """
    used: list[str] = []
    parts: list[Any] = []
    for axis in logical:
        if axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r}; known: {sorted(a for a in RULES if a)}")
        mesh_axes = RULES[axis]
        if twice := set(mesh_axes) & set(used):
            raise ValueError(f"{logical}: mesh axis {sorted(twice)} would shard two dimensions of one tensor")
        used.extend(mesh_axes)
        parts.append(None if not mesh_axes else mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes)
    return P(*parts)


def has_mesh() -> bool:
    """Whether a mesh is in force (`jax.set_mesh`); without one every function here does nothing."""
    return not jax.sharding.get_abstract_mesh().empty


def _places() -> bool:
    """Whether arrays have a place on a mesh. Within a program that each device runs alone (`shard_map`) they have none."""
    return has_mesh() and not jax.sharding.get_abstract_mesh().are_all_axes_manual


def has_axes(axes: str | tuple[str, ...]) -> bool:
    """Whether the mesh in force has these axes."""
    return ({axes} if isinstance(axes, str) else set(axes)) <= set(jax.sharding.get_abstract_mesh().axis_names)


def shards(logical: str) -> int:
    """Over how many devices the mesh in force deals this logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in RULES[logical]) if _places() else 1


def out(*logical: str | None) -> P | None:
    """`out_sharding=` of a contraction, or None without a mesh."""
    return spec(*logical) if _places() else None


def place(x: jax.Array, *logical: str | None) -> jax.Array:
    """Bring `x` to the sharding of these logical axes (a no-op where it is there already)."""
    return jax.sharding.reshard(x, spec(*logical)) if _places() else x


def gather_weight(w: jax.Array, *logical: str | None) -> jax.Array:
    """A weight ready for use: gathered along fsdp (its "embed" axis), still sharded along tensor."""
    return place(w, *(None if axis == "embed" else axis for axis in logical))


def along(*logical: str | None) -> tuple[str, ...]:
    """Mesh axes over which a tensor with these logical axes is cut; none where arrays have no place on a mesh."""
    return tuple(axis for name in logical for axis in RULES[name]) if _places() else ()


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """Rows `[B, ...]` as `[B / parts, parts, ...]`, row r at `[r // parts, r % parts]`: none leaves its device."""
    where = jax.typeof(x).sharding.spec
    return jax.lax.reshape(x, (x.shape[0] // parts, parts, *x.shape[1:]), out_sharding=P(where[0], None, *where[1:]))


def per_shard(
    function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any, *, check: bool = True
) -> Callable[..., Any]:
    """`function` run on each device's shards; axes are tuples of logical names, one an argument.

    What explicit sharding refuses (scatter, sort, gathers over a sharded axis) runs in here. `check=False` does without
    the proof that results are alike on the axes they are not sharded along, for a kernel that does not say.
    """
    if not _places():
        return function
    is_axes = lambda x: isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)  # noqa: E731
    to_specs = lambda tree: jax.tree.map(lambda axes: spec(*axes), tree, is_leaf=is_axes)  # noqa: E731
    in_specs, out_specs = to_specs(in_axes), to_specs(out_axes)

    def run(*args: Any) -> Any:
        args = jax.tree.map(lambda x, s: jax.sharding.reshard(x, s), args, in_specs)
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=check)(*args)

    return run


def psum(x: Any, axes: str | tuple[str, ...]) -> Any:
    """Sum over mesh axes, inside `per_shard`; the value itself where no mesh has them."""
    return jax.lax.psum(x, axes) if has_axes(axes) else x


def pmean(x: Any, axes: str | tuple[str, ...]) -> Any:
    """Mean over mesh axes, inside `per_shard`: one value where every shard has computed the same."""
    return jax.lax.pmean(x, axes) if has_axes(axes) else x


def pmax(x: Any, axes: str | tuple[str, ...]) -> Any:
    """Maximum over mesh axes, inside `per_shard`; carries no gradient."""
    return jax.lax.pmax(jax.lax.stop_gradient(x), axes) if has_axes(axes) else jax.lax.stop_gradient(x)


def index(axes: str | tuple[str, ...]) -> jax.Array | int:
    """Which shard along mesh axes, the first outermost, this device holds, inside `per_shard`."""
    return jax.lax.axis_index(axes) if has_axes(axes) else 0


def tensor_index() -> jax.Array | int:
    """Which shard along the tensor axis this device holds, inside `per_shard`."""
    return index(TENSOR)


def gather_rows(x: jax.Array) -> jax.Array:
    """What the devices that share the rows of a batch hold, end to end in the order of `index(BATCH)`, inside `per_shard`."""
    return jax.lax.all_gather(x, BATCH, tiled=True) if has_axes(BATCH) else x
