"""Devices that are not here: programs are compiled for them, and nothing is run.

The compilers come with the extra `aot` (libtpu, jax's CUDA plugin). A topology is named `tpu:v5p:8x8x8` (chips along
the axes of the torus), `tpu:v5p:8x8x8*4` (four such slices) or `gpu:h100:4x8` (hosts x GPUs in each).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from m6rec_jax.errors import InputError

if TYPE_CHECKING:  # names are told (`known`, --help) without it
    import jax

TPUS = {"v4": "4x4x4", "v5e": "16x16", "v5p": "8x8x8", "v6e": "16x16", "tpu7x": "4x4x4"}  # a layout of each


class Gpu(NamedTuple):
    """What the compiler asks of a GPU, from the tables that XLA brings along (bytes, bytes a second, GHz)."""

    description: str
    capability: int
    cores: int
    units: int
    clock: float
    memory: int
    bandwidth: int
    cache: int
    shared_core: int
    shared_block: int
    features: str
    cudnn: tuple[int, int]


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 85100068864, 2039040000000, 41943040, 167936, 166912, "NONE", (8, 9)),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 8, 108, 64, 1.41, 42331013120, 1555200000000, 41943040, 167936, 166912, "NONE", (9, 10)),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 84942979072, 3352320000000, 52428800, 233472, 232448, "ACCELERATED_FEATURES", (9, 10)),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", 9, 132, 128, 1.98, 151397597184, 4800000000000, 52428800, 233472, 232448, "ACCELERATED_FEATURES", (9, 10)),
}  # fmt: skip

# The text form of stream_executor.GpuTargetConfigProto.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {0.shared_core} shared_memory_per_block_optin: {0.shared_block}
  core_count: {0.cores} fpus_per_core: {0.units} clock_rate_ghz: {0.clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {0.bandwidth} l2_cache_size: {0.cache} device_memory_size: {0.memory}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {0.capability} feature_extension: {0.features} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {0.cudnn[0]} minor: {0.cudnn[1]} }}
device_description_str: "{0.description}"
"""


class Topology(NamedTuple):
    """`devices` that can be compiled for and hold no array; `memory` of each in bytes, where it is known.

    The TPU compiler refuses a program that does not fit. The one for GPUs does not: compare with `memory` yourself.
    """

    name: str
    devices: list[jax.Device]
    memory: int | None


def known() -> str:
    """The topologies that can be named, for people."""
    tpus = ", ".join(f"tpu:{chip}:{layout}" for chip, layout in TPUS.items())
    return f"{tpus} (or another layout of these chips; *N after it for N slices), gpu:{{{','.join(GPUS)}}}:HOSTSxGPUS"


def topology(name: str) -> Topology:
    """The devices of `tpu:CHIP:LAYOUT`, of `tpu:CHIP:LAYOUT*SLICES` or of `gpu:NAME:HOSTSxGPUS`.

    Raises InputError when the name is unknown (the line lists the known ones) or its compiler is not installed.
    """
    platform, _, rest = name.partition(":")
    chip, _, layout = rest.partition(":")
    layout, star, slices = layout.partition("*")
    chips = {"tpu": TPUS, "gpu": GPUS}.get(platform, {})
    if chip not in chips or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", layout) or (platform == "gpu" and (star or layout.count("x") != 1)) or (star and not re.fullmatch(r"[1-9]\d*", slices)):  # fmt: skip
        raise InputError(f"{name}: unknown topology; known: {known()}")
    from jax.experimental import topologies

    try:
        if platform == "gpu":
            text = _TARGET.format(GPUS[chip])
            found = topologies.get_topology_desc(chip, "cuda", target_config=text, topology=f"1x{layout}")
            return Topology(name, found.devices, GPUS[chip].memory)
        with _without_chips():
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{chip}:{layout}", num_slices=int(slices or 1)
            )
        return Topology(name, found.devices, None)
    except Exception as error:  # a missing plugin is a RuntimeError here and another there
        said = " ".join(str(error).split())[:200]
        if "INVALID_ARGUMENT" in said:
            raise InputError(f"{name}: no such layout ({said}); known: {known()}") from error
        raise InputError(
            f"{name}: its compiler is not here ({said}); pip install 'm6rec-jax[aot]' on Linux x86-64"
        ) from error


NO_CHIPS = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}


def quiet_without_chips() -> None:
    """Keep libtpu, where it is installed and this machine has no TPU, from looking for one aloud. Called before jax starts."""
    if not (any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))):
        for name, value in NO_CHIPS.items():
            os.environ.setdefault(name, value)


@contextmanager
def _without_chips() -> Iterator[None]:
    """libtpu, loaded in here, asks no metadata server for this machine's place in a pod and takes no lock on its chips."""
    said = {**NO_CHIPS, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    ours = {name: value for name, value in said.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


@contextmanager
def aimed(at: Topology) -> Iterator[None]:
    """Programs traced in here are for this topology: kernels are chosen as on its devices."""
    import jax

    with jax.default_device(at.devices[0]):
        yield


def compiled(at: Topology, program: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """A jitted program, compiled for a topology.

    Arrays among the arguments only lend shape, type and, where they have one, PartitionSpec. The devices are those of
    the mesh in force (`jax.set_mesh`), or the first one where there is none.
    """
    import jax

    mesh = jax.sharding.get_mesh()
    everywhere = jax.NamedSharding(mesh, jax.P()) if mesh.size else jax.sharding.SingleDeviceSharding(at.devices[0])

    def shape(x: Any) -> Any:
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            return x
        there = getattr(x, "sharding", None)
        placed = (
            jax.NamedSharding(mesh, there.spec) if mesh.size and isinstance(there, jax.NamedSharding) else everywhere
        )
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

    platform = "cuda" if at.name.startswith("gpu") else "tpu"
    with aimed(at):
        traced = program.trace(*jax.tree.map(shape, arguments))  # type: ignore[attr-defined]
        return traced.lower(lowering_platforms=(platform,)).compile()
