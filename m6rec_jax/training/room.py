"""The memory that training takes on a device, told before it starts; what cannot fit is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from m6rec_jax.config import Config, ModelConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model.block import UNROLLED
from m6rec_jax.model.load import Blueprint
from m6rec_jax.objectives.loss import CHUNK
from m6rec_jax.progress import note
from m6rec_jax.training.distill import ROWS
from m6rec_jax.training.optim import make_optimizer

GIB = 1 << 30
TOLD = 1.0  # GiB; less than this needs no line
SURE = 1.3  # what is told is within so much of what the compiler asks for; only beyond it is anything refused
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def memory_needed(
    blueprint: Blueprint, config: Config, mesh: Mapping[str, int], catalogue: Sequence[int], donated: bool = True,
    generator: Blueprint | None = None, teacher: Blueprint | None = None,
) -> dict[str, float]:  # fmt: skip
    """Bytes a device, by what they hold. `mesh`: size of each axis; `catalogue`: items of each domain; `generator`: of
    replaced-token detection; `teacher`: up to the layer that is looked at.

    Parameters, what the optimiser keeps, gradients and the running mean are counted; activations are what `model.remat` keeps for
    the backward pass, and one layer at work. Without donation (CPU) a step makes its new state beside the old one: in its
    room have been, as far as they fit, the gradients and the tables that targets are compared with, each of which is
    there as it is, turned, and as a gradient (objectives/loss).
    """
    model, data = config.model, config.data
    tensor, sequence, stages = mesh["tensor"], mesh["sequence"], mesh["stage"]
    of_layers = sum(leaf.size for leaf in jax.tree.leaves(blueprint.shapes()["block"]))
    of_experts = 3 * model.layers * model.experts * model.width * model.expert_width
    elsewhere = of_layers * (1 - 1 / stages) + of_experts * (1 - 1 / mesh["expert"])  # experts and stages are not mixed
    beside, taught = (
        0.0 if m is None else 4.0 * m.parameters() / (tensor * mesh["fsdp"]) for m in (generator, teacher)
    )
    one = 4.0 * (blueprint.parameters() - elsewhere) / (tensor * mesh["fsdp"])
    kept = jax.eval_shape(make_optimizer(config.optim, config.train.steps).init, blueprint.shapes())
    state = 1 + sum(x.size for x in jax.tree.leaves(kept)) / blueprint.parameters() + (config.optim.average > 0)
    of_generator = state - (config.optim.average > 0)
    state += (config.prune.sparsity > 0) / 4  # a byte beside each weight
    slices = 1 + (config.train.accumulate > 1)  # one gradient, and the sum of those before it
    rows = data.rows / (mesh["data"] * mesh["fsdp"] * mesh["expert"] * config.train.accumulate)
    tokens = rows * data.length / sequence
    activations = _activations(model, mesh, tokens, data.length, donated)
    if generator is not None:
        activations += _activations(generator.config, mesh, tokens, data.length, donated)
    if teacher is not None:  # nothing of it is kept for a backward pass: one layer at work, and relations of some rows
        activations += _layer(teacher.config, mesh, tokens, data.length) / 2
        activations += 16 * min(ROWS, rows) * (config.distill.heads or model.heads) * data.length**2
    # On a CPU all three of a table are in the model's type, to which the gradient of scores is rounded in a copy of its own.
    # XLA for another device turns nothing and rounds where it multiplies.
    size = jax.numpy.dtype(model.dtype).itemsize
    an_entry, a_score = (8, 4) if donated else (3 * size, 4 if size == 4 else 4 + size)
    scores = tables = 0.0
    for s in blueprint.vocab.slices:
        sampled = 0 < config.optim.negatives < s.size
        columns = config.optim.negatives if sampled else s.padded / tensor
        scores = max(scores, (12 if sampled else a_score) * min(CHUNK, tokens) * columns)
        of_tables = model.table_width + (0 if generator is None else generator.config.table_width)
        tables += 0 if sampled else an_entry * columns * of_tables
    gradients = one * slices
    made = gradients if donated else max(gradients, one * state)
    tables = tables if donated else max(0.0, gradients + tables - made)
    widths = (blueprint.content_width, *blueprint.more_widths)
    return {
        "parameters and moments": one * state,
        "gradients and the new state": made,
        "the generator": beside * (of_generator + slices + (0 if donated else of_generator)),
        "item features": sum(4.0 * items * columns for items, columns in zip(catalogue, widths, strict=True)) / tensor,
        "the teacher": taught,
        "activations": activations,
        "scores over the vocabulary": scores + tables,
    }


def _layer(model: ModelConfig, mesh: Mapping[str, int], tokens: float, length: int) -> float:
    """Bytes of one layer at work on so many tokens of a device, forward and backward."""
    tensor, width = mesh["tensor"], model.width
    # Without a limit an expert's device must have room for every choice of all tokens along the axis (model/experts).
    spread = mesh["expert"] if model.routing == "dropless" else model.capacity_factor
    choices = tokens * model.experts_per_token * spread * (model.experts > 0)
    size = jax.numpy.dtype(model.dtype).itemsize
    mixed = choices * size * (4 * width + 4 * model.expert_width / tensor)
    return (
        mixed
        + tokens * size * (10 * width + 4 * model.dense_width / tensor)
        + 8 * tokens * model.heads / tensor * length
    )


def _activations(model: ModelConfig, mesh: Mapping[str, int], tokens: float, length: int, donated: bool) -> float:
    """Bytes of what `model.remat` keeps of so many tokens of a device, of the layer at work, and of the states around them."""
    stages, size = mesh["stage"], jax.numpy.dtype(model.dtype).itemsize
    layer, carried = _layer(model, mesh, tokens, length), tokens * size * model.width
    dots = tokens * size * (6 * model.width + 2 * model.dense_width / mesh["tensor"])
    # A stage runs a microbatch at a time, and keeps those of all ticks, the idle ones too, for the backward pass.
    parts = (model.microbatches or stages) if stages > 1 else 1
    held, one_layer = model.layers / stages * (parts + stages - 1) / parts, layer / parts
    layers = {"none": held * layer, "dots": held * dots + one_layer, "full": held * carried + one_layer}
    # On a CPU few layers are no loop, and `dots` keeps as much as `none` there (docs/training-speed.md).
    alike = not donated and stages == 1 and model.layers <= UNROLLED and model.remat == "dots"
    return layers["none" if alike else model.remat] + 6 * carried


def memory_there() -> float | None:
    """Bytes that a device has left for this process; of several processes what the poorest has. None: nothing says."""
    left = _left()
    found = np.inf if left is None else left
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        found = float(np.min(multihost_utils.process_allgather(np.array(found))))
    return found if np.isfinite(found) else None


def _left() -> float | None:
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return float(stats["bytes_limit"] - stats.get("bytes_in_use", 0)) if "bytes_limit" in stats else None
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        free = 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    try:  # a container may have less than its machine; "max" is no number, and cached files give way
        limit, used, told = ((CGROUP / f"memory.{part}").read_text("ascii") for part in ("max", "current", "stat"))
        kinds = dict(line.split() for line in told.splitlines())
        cached = int(kinds.get("active_file", 0)) + int(kinds.get("inactive_file", 0))
        free = min(free, float(int(limit) - int(used) + cached))
    except (OSError, ValueError):
        pass
    return free / jax.local_device_count()


def check_room(
    blueprint: Blueprint, config: Config, mesh: jax.sharding.Mesh, catalogue: Sequence[int],
    generator: Blueprint | None = None, teacher: Blueprint | None = None,
) -> None:  # fmt: skip
    """Say what training needs, where it is much, and raise InputError, on all processes, when a device has far less."""
    parts = memory_needed(blueprint, config, mesh.shape, catalogue, jax.default_backend() != "cpu", generator, teacher)
    need, there = sum(parts.values()), memory_there()
    short = there is not None and need > there
    if need / GIB < TOLD and not short:
        return
    told = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items() if value / GIB >= 0.05)
    has = "" if there is None else f" of {there / GIB:.1f} GiB that are free"
    said = f"memory a device: about {need / GIB:.1f} GiB{has} ({told}; {int(np.sum(catalogue)):,} items)"
    way_out = f"{WAYS_OUT[max(parts, key=lambda name: parts[name])]}, or take more devices (mesh.fsdp, mesh.tensor)"
    if there is not None and need > SURE * there:
        raise InputError(f"{said}: it does not fit; {way_out}")
    note(f"{said}: it may not fit; if so, {way_out}" if short else said)


WAYS_OUT = {
    "parameters and moments": "make model.width smaller, or give items several code levels (prepare --levels 3)",
    "gradients and the new state": "make model.width smaller, or give items several code levels (prepare --levels 3)",
    "the generator": "make replaced.width smaller",
    "the teacher": "name a smaller one with --distill-from, or a lower distill.teacher_layer",
    "item features": "prepare with a smaller --content-width",
    "activations": "make data.rows smaller, raise train.accumulate, or set model.remat=full",
    "scores over the vocabulary": "set optim.negatives to 2048 or so",
}
