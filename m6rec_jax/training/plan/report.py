"""`plan.json` and what is printed beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from m6rec_jax.config import Config
from m6rec_jax.model.load import Blueprint
from m6rec_jax.topologies import Topology
from m6rec_jax.training.optim import make_optimizer
from m6rec_jax.training.plan.hardware import chip_of
from m6rec_jax.training.plan.hlo import Sent, by_kind, collectives
from m6rec_jax.training.plan.lower import Compiled
from m6rec_jax.training.room import WAYS_OUT, memory_needed

GIB = 2.0**30


def model_flops(config: Config, blueprint: Blueprint, devices: int) -> float:
    """FLOPs of a step a device, nothing computed twice counted: a token costs 6 for each entry of a layer's matrices, 6 for
    each entry of the largest output table, and 6 N D T for attention that is causal (half of 12 N D T; Chowdhery et al.
    2022, appendix B).
    """
    model, data = config.model, config.data
    matrices = sum(x.size for x in jax.tree.leaves(blueprint.shapes()["block"]) if x.ndim > 2)
    table = model.width * max(s.padded for s in blueprint.vocab.slices)
    token = 6.0 * (matrices + table) + 6.0 * model.layers * model.width * data.length
    return token * data.rows * data.length / devices


def plan_of(at: Topology, made: Compiled, blueprint: Blueprint) -> tuple[dict[str, Any], list[Sent]]:
    """The flat object of plan.json and the collectives behind it.

    Nothing here predicts time: what hangs on a time model is null.
    """
    limit = made.limit if made.limit is not None else float(chip_of(at.name).memory)
    sent = collectives(made.text, len(at.devices))
    return {
        "fits": not made.refused and made.hbm <= limit,
        "hbm_bytes": made.hbm,
        "hbm_limit_bytes": limit,
        "flops": model_flops(made.config, blueprint, len(at.devices)),
        "collectives": sum(one.count for one in sent),
        "step_seconds": None,
        "mfu": None,
        "mfu_error": None,
        "bound": None,
        "compile_seconds": made.seconds,
    }, sent


def table(at: Topology, made: Compiled, blueprint: Blueprint, plan: dict[str, Any], sent: Sequence[Sent], catalogue: Sequence[int]) -> str:  # fmt: skip
    """What is printed: memory by what holds it, collectives by kind, the verdict."""
    parts = memory_needed(blueprint, made.config, made.mesh.shape, catalogue)
    axes = " x ".join(f"{name}={size}" for name, size in made.mesh.shape.items() if size > 1) or "one device"
    data = made.config.data
    limit = plan["hbm_limit_bytes"]
    lines = [
        f"{at.name}: {len(at.devices)} devices, {axes}; {blueprint.parameters():,} parameters; {data.rows} rows of {data.length} tokens; compiled in {made.seconds:.1f} s",
        f"{'memory a device, GiB':<32}{made.hbm / GIB:>10.2f} of {limit / GIB:.2f}" + (" asked for, refused by the compiler" if made.refused else " by the compiler"),
        f"{'  parameters':<32}{_held(blueprint.shapes(), blueprint.specs(), made.mesh) / GIB:>10.2f}",
        f"{'  optimiser':<32}{_optimizer(made, blueprint) / GIB:>10.2f}",
        *(f"{'  ' + name + ', estimated':<32}{value / GIB:>10.2f}" for name, value in parts.items() if "moments" not in name),
        f"{'FLOPs a device and step':<32}{plan['flops']:>10.3g}",
    ]  # fmt: skip
    for (kind, overlapped), (count, size) in by_kind(list(sent)).items():
        what = kind + (", overlapped" if overlapped else "")
        lines.append(f"{what:<32}{size / GIB:>10.3f} GiB sent a device and step, {count:,} times")
    if not plan["fits"]:
        short = made.hbm - limit
        lines.append(f"does not fit, {short / GIB:.2f} GiB short; {ways_out(parts, made.config)}")
    return "\n".join(lines)


def ways_out(parts: dict[str, float], config: Config) -> str:
    """What would make a configuration fit: the largest part first."""
    largest = max(parts, key=lambda name: parts[name])
    state = largest in ("parameters and moments", "gradients and the new state")
    first = f"raise mesh.fsdp={config.mesh.fsdp} or mesh.tensor={config.mesh.tensor}" if state else WAYS_OUT[largest]
    return f"most of it is {largest}: {first}, or take a larger topology"


def _held(shapes: Any, specs: Any, mesh: jax.sharding.Mesh) -> float:
    """Bytes a device of arrays sharded so."""
    size = lambda x, p: float(np.prod(jax.NamedSharding(mesh, p).shard_shape(x.shape))) * x.dtype.itemsize  # noqa: E731
    return sum(jax.tree.leaves(jax.tree.map(size, shapes, specs)))


def _optimizer(made: Compiled, blueprint: Blueprint) -> float:
    """Bytes a device of the optimiser's state."""
    with jax.set_mesh(made.mesh):
        params = jax.tree.map(
            lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(made.mesh, p)),
            blueprint.shapes(),
            blueprint.specs(),
        )
        state = jax.eval_shape(make_optimizer(made.config.optim, made.config.train.steps).init, params)
    held = lambda x: float(np.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)) * x.dtype.itemsize  # noqa: E731
    return sum(held(x) for x in jax.tree.leaves(state))
