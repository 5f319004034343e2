"""Meshes, and where the arrays of a run live on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import jax
import numpy as np
from jax.experimental import mesh_utils

from m6rec_jax.config import Config, MeshConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import ITEM_AXES, Catalogues, ItemTable
from m6rec_jax.model.sharding import AXES, BATCH, spec
from m6rec_jax.vocab import PAD_MULTIPLE

EXPLICIT = (jax.sharding.AxisType.Explicit,) * len(AXES)
BATCH_AXES = (None, "batch", "position")  # [accumulation slice, row, position]


def make_mesh(config: MeshConfig, devices: int | None = None) -> jax.sharding.Mesh:
    """The mesh of a configuration over all devices, or over the first `devices` of them; see `mesh_of`."""
    return mesh_of(config, jax.devices()[:devices])


def mesh_of(config: MeshConfig, devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """The mesh of a configuration over these devices, neighbours on the inner axes; `mesh.dcn` says which reach over slices.

    Raises InputError when the axes do not multiply to the number of devices, or the factors of `mesh.dcn` to the number
    of slices, before anything is compiled.
    """
    sizes = axis_sizes(config, len(devices))
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(_slice(device), []).append(device)
    named = len(slices) > 1 and hasattr(devices[0], "slice_index")
    said = f"there {'is 1' if len(slices) == 1 else f'are {len(slices)}'} ({'slices' if named else 'processes'} of devices)"
    factors = {axis: config.dcn.get(axis, 1) for axis in AXES}
    over = int(np.prod(list(factors.values())))
    if over == 1:
        if named and devices[0].platform == "tpu":
            raise InputError(f"mesh.dcn names no axis and {said}; say which one reaches over them, as in {{data: {len(slices)}}}")  # fmt: skip
        # Neighbours in a torus stay neighbours; an axis of 4 may be half of one of 8, which `jax.make_mesh` refuses.
        placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(placed, AXES, axis_types=EXPLICIT)
    shown = ", ".join(f"{axis}: {factor}" for axis, factor in config.dcn.items())
    if over != len(slices):
        raise InputError(
            f"mesh.dcn={{{shown}}} reaches over {over} slices and {said}; make its factors multiply to that"
        )
    if len(uneven := {len(held) for held in slices.values()}) > 1:
        raise InputError(f"mesh.dcn={{{shown}}}: slices of {' and '.join(map(str, sorted(uneven)))} devices; they must be of one size")  # fmt: skip
    for axis, size in sizes.items():
        if size % factors[axis]:
            raise InputError(f"mesh.dcn.{axis}={factors[axis]} does not divide the {size} devices along mesh.{axis}; change one of them")  # fmt: skip
    within = [size // factors[axis] for axis, size in sizes.items()]
    placed = mesh_utils.create_hybrid_device_mesh(
        within, list(factors.values()), devices, process_is_granule=not hasattr(devices[0], "slice_index"),
        allow_split_physical_axes=True,
    )  # fmt: skip
    return jax.sharding.Mesh(placed, AXES, axis_types=EXPLICIT)


def _slice(device: jax.Device) -> int:
    """The slice a device belongs to; where the platform knows none, a process is one."""
    return getattr(device, "slice_index", device.process_index)


def axis_sizes(config: MeshConfig, count: int) -> dict[str, int]:
    """Devices along each axis, of so many in all. Raises InputError when they do not multiply to that."""
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
    return sizes


def row_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Over how many devices the rows of a batch are dealt."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH]))


@cache
def row_part(mesh: jax.sharding.Mesh, process: int | None = None) -> tuple[int, int]:
    """Which part of a batch's rows a process (None: this one) reads, and in how many equal parts they are read.

    Processes that hold the same rows, as those between which tensor, sequence or stage reach, read the same part. Raises
    InputError when rows overlap between processes in another way.
    """
    process = jax.process_index() if process is None else process
    axes = [AXES.index(axis) for axis in BATCH]
    by_rows = np.moveaxis(mesh.devices, axes, range(len(axes))).reshape(row_shards(mesh), -1)
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(by_rows):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len({len(rows) for rows in parts}) > 1 or sum(map(len, parts)) != len(by_rows):
        shown = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in AXES)
        raise InputError(f"mesh {shown}: some processes share a part of their rows; let {' x '.join(BATCH)} be a multiple of the processes, or divide them")  # fmt: skip
    return parts.index(tuple(sorted(held[process]))), len(parts)


def check_fit(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, config: Config) -> None:
    """Raise InputError, before compiling, when rows, heads or widths do not divide over the mesh."""
    rows, model = config.data.rows, config.model
    over = row_shards(mesh)
    if rows % (over * config.train.accumulate):
        raise InputError(
            f"data.rows={rows} does not divide over {over} row shards (mesh {' x '.join(BATCH)}) times "
            f"train.accumulate={config.train.accumulate}; make it a multiple of {over * config.train.accumulate}"
        )
    if mesh.shape["expert"] > 1 and not model.experts:
        raise InputError(f"mesh.expert={mesh.shape['expert']} and model.experts=0: a dense model has no experts to shard; set mesh.expert=1 and give the devices to another axis")  # fmt: skip
    if mesh.shape["stage"] > 1 and model.experts:
        raise InputError(f"mesh.stage={mesh.shape['stage']} and model.experts={model.experts}: a pipeline of experts is not built; set mesh.stage=1 and shard over expert, fsdp and tensor")  # fmt: skip
    if mesh.shape["stage"] > 1 and model.exits:
        raise InputError(f"mesh.stage={mesh.shape['stage']} and model.exits=true: a pipeline gives the states of the last layer only; change one of them")  # fmt: skip
    if mesh.shape["stage"] > 1 and model.shared_layers:
        raise InputError(f"mesh.stage={mesh.shape['stage']} and model.shared_layers=true: one set of weights cannot be dealt over stages; set mesh.stage=1 and give the devices to another axis")  # fmt: skip
    if mesh.shape["stage"] > 1 and model.quantise != "none":
        raise InputError(f"mesh.stage={mesh.shape['stage']} and model.quantise={model.quantise}: products in a pipeline are not rounded; change one of them")  # fmt: skip
    of_experts = (
        ("expert", "experts of a layer (model.experts)", model.experts),
        ("tensor", "columns of an expert (model.expert_ffn)", model.expert_width),
    )
    stages = mesh.shape["stage"]
    micro, least = model.microbatches or stages, over * config.train.accumulate * (model.microbatches or stages)
    if stages > 1 and rows % least:
        raise InputError(
            f"data.rows={rows} does not divide over {over} row shards (mesh {' x '.join(BATCH)}) times "
            f"train.accumulate={config.train.accumulate} times {micro} microbatches (model.microbatches, or mesh.stage); "
            f"make it a multiple of {least}"
        )
    for axis, name, size in (
        ("tensor", "kv heads (model.kv_heads, or model.heads)", model.n_kv),
        *(
            of_experts
            if model.experts
            else (("tensor", "columns of the feed-forward layer (model.ffn)", model.ffn_width),)
        ),
        ("tensor", "rows to which tables are padded", PAD_MULTIPLE),
        ("fsdp", "model.width", model.width),
        *((("fsdp", "model.embed", model.embed),) if model.embed else ()),
        ("stage", "layers (model.layers)", model.layers),
        ("sequence", "positions of a row (data.length)", config.data.length),
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

    A global batch is dealt to processes (`row_part`) in runs of rows, so which rows share a slice depends on the process
    count; their sum does not.
    """
    sharding, (_, parts) = jax.NamedSharding(mesh, spec(*BATCH_AXES)), row_part(mesh)

    def place(x: np.ndarray) -> jax.Array:
        local = x.reshape(accumulate, -1, x.shape[-1])
        shape = (accumulate, local.shape[1] * parts, x.shape[-1])
        return jax.make_array_from_process_local_data(sharding, local, shape)

    return {name: place(x) for name, x in batch.items()}


def _shard(mesh: jax.sharding.Mesh, x: np.ndarray, axes: tuple[str | None, ...]) -> jax.Array:
    return jax.make_array_from_callback(x.shape, jax.NamedSharding(mesh, spec(*axes)), lambda index: x[index])
