"""Meshes, and where the arrays of a run live on them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from m6rec_jax.config import Config, MeshConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import ITEM_AXES, Catalogues, ItemTable
from m6rec_jax.model.sharding import AXES, BATCH, spec
from m6rec_jax.vocab import PAD_MULTIPLE

BATCH_AXES = (None, "batch", None)  # [accumulation slice, row, position]


def make_mesh(config: MeshConfig, devices: int | None = None) -> jax.sharding.Mesh:
    """The mesh of a configuration over all devices, or over the first `devices` of them; see `mesh_of`."""
    return mesh_of(config, jax.devices()[:devices])


def mesh_of(config: MeshConfig, devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """The mesh of a configuration over these devices.

    Raises InputError when the axes do not multiply to the number of devices, before anything is compiled.
    """
    count = len(devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    shown = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise InputError(f"mesh {shown}: only one axis may be -1 (all devices that are left)")
    fixed = int(np.prod([size for size in sizes.values() if size > 0]))
    if open_axes:
        if count % fixed:
            raise InputError(f"mesh {shown}: {fixed} does not divide the {count} devices; change an axis")
        sizes[open_axes[0]] = count // fixed
    elif fixed != count:
        raise InputError(f"mesh {shown} needs {fixed} devices and there are {count}; set one axis to -1 or change them")
    # Neighbours in a torus stay neighbours; an axis of 4 may be half of one of 8, which `jax.make_mesh` refuses.
    placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))


def row_shards(mesh: jax.sharding.Mesh) -> int:
    """Over how many devices the rows of a batch are dealt."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH]))


def check_fit(mesh: jax.sharding.Mesh, config: Config) -> None:
    """Raise InputError, before compiling, when rows, heads or widths do not divide over the mesh."""
    rows, model = config.data.rows, config.model
    over = row_shards(mesh)
    if rows % (over * config.train.accumulate):
        raise InputError(
            f"data.rows={rows} does not divide over {over} row shards (mesh {' x '.join(BATCH)}) times "
            f"train.accumulate={config.train.accumulate}; make it a multiple of {over * config.train.accumulate}"
        )
    for axis, name, size in (
        ("tensor", "kv heads (model.kv_heads, or model.heads)", model.n_kv),
        ("tensor", "columns of the feed-forward layer (model.ffn)", model.ffn_width),
        ("tensor", "rows to which tables are padded", PAD_MULTIPLE),
        ("fsdp", "model.width", model.width),
    ):
        if size % mesh.shape[axis]:
            raise InputError(f"mesh.{axis}={mesh.shape[axis]} does not divide the {size} {name}; change one of them")


def place_items(mesh: jax.sharding.Mesh, items: Catalogues) -> Catalogues:
    """The frozen facts of a catalogue, or of several, on the mesh; every process holds them whole and gives its shards."""
    if not isinstance(items, ItemTable):
        return tuple(place_items(mesh, one) for one in items)  # type: ignore[misc]
    return ItemTable(*(_shard(mesh, x, axes) for x, axes in zip(items, ITEM_AXES, strict=True)))


def place_batch(mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray], accumulate: int) -> dict[str, jax.Array]:
    """A process's rows `[B_local, T]` as its part of global arrays `[accumulate, B / accumulate, T]`.

    A global batch is dealt to processes in runs of rows, so which rows share a slice depends on the process
    count; their sum does not.
    """
    sharding = jax.NamedSharding(mesh, spec(*BATCH_AXES))
    return {
        name: jax.make_array_from_process_local_data(sharding, x.reshape(accumulate, -1, x.shape[-1]))
        for name, x in batch.items()
    }


def _shard(mesh: jax.sharding.Mesh, x: np.ndarray, axes: tuple[str | None, ...]) -> jax.Array:
    return jax.make_array_from_callback(x.shape, jax.NamedSharding(mesh, spec(*axes)), lambda index: x[index])
