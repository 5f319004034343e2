"""The memory that training takes on a device, told before it starts; what cannot fit is refused."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from m6rec_jax.config import Config
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.objectives.loss import CHUNK
from m6rec_jax.progress import note

GIB = 1 << 30
TOLD = 1.0  # GiB; less than this needs no line
MEMINFO = "/proc/meminfo"


def memory_needed(blueprint: Blueprint, config: Config, mesh: jax.sharding.Mesh, catalogue: Sequence[int]) -> dict[str, float]:  # fmt: skip
    """Bytes a device, by what they hold. `catalogue`: items of each domain.

    Parameters, both moments, gradients and the running mean are exact; activations are those kept for the backward pass,
    to within half. On CPU nothing is donated, so a step makes its new state beside the old one.
    """
    model, data, shape = config.model, config.data, mesh.shape
    tensor, over_params = shape["tensor"], shape["tensor"] * shape["fsdp"]
    one = 4.0 * blueprint.parameters() / over_params
    state = 3 + (config.optim.average > 0)
    copies = state if jax.default_backend() == "cpu" else 0
    rows = data.rows / (shape["data"] * shape["fsdp"] * config.train.accumulate)
    tokens, size = rows * data.length, jax.numpy.dtype(model.dtype).itemsize
    layers = 1 if model.remat == "full" else model.layers
    kept = tokens * size * (layers * (10 * model.width + 4 * model.ffn_width / tensor) + 6 * model.width)
    attention = 8 * layers * rows * model.heads / tensor * data.length**2
    scores = tables = 0.0
    for s in blueprint.vocab.slices:
        sampled = 0 < config.optim.negatives < s.size
        columns = config.optim.negatives if sampled else s.padded / tensor
        scores = max(scores, 12 * min(CHUNK, tokens) * columns)
        tables += 0 if sampled else 8 * columns * model.width
    widths = (blueprint.content_width, *blueprint.more_widths)
    features = sum(4.0 * items * width for items, width in zip(catalogue, widths, strict=True)) / tensor
    return {
        "parameters and moments": one * state,
        "gradients and the new state": one * (1 + copies),
        "item features": features,
        "activations": kept + attention,
        "scores over the vocabulary": scores + tables,
    }


def memory_there() -> float | None:
    """Bytes a device has for this process; None where nothing says."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    try:
        with open(MEMINFO, encoding="ascii") as lines:
            free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    return 1024.0 * free / jax.local_device_count()


def check_room(blueprint: Blueprint, config: Config, mesh: jax.sharding.Mesh, catalogue: Sequence[int]) -> None:
    """Say what training needs, where it is much, and raise InputError when a device has less."""
    parts, there = memory_needed(blueprint, config, mesh, catalogue), memory_there()
    need = sum(parts.values())
    if need / GIB < TOLD and (there is None or need < there):
        return
    told = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items() if value / GIB >= 0.05)
    has = "" if there is None else f" of {there / GIB:.1f} GiB that are free"
    said = f"memory a device: about {need / GIB:.1f} GiB{has} ({told}; {int(np.sum(catalogue)):,} items)"
    if there is not None and need > there:
        largest = max(parts, key=lambda name: parts[name])
        raise InputError(f"{said}: it does not fit; {WAYS_OUT[largest]}, or take more devices (mesh.fsdp, mesh.tensor)")
    note(said)


WAYS_OUT = {
    "parameters and moments": "make model.width smaller, or give items several code levels (prepare --levels 3)",
    "gradients and the new state": "make model.width smaller, or give items several code levels (prepare --levels 3)",
    "item features": "prepare with a smaller --content-width",
    "activations": "make data.rows smaller, raise train.accumulate, or set model.remat=full",
    "scores over the vocabulary": "set optim.negatives to 2048 or so",
}
