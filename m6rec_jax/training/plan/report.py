"""`plan.json` and what is printed beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from m6rec_jax.config import Config
from m6rec_jax.model.load import Blueprint
from m6rec_jax.topologies import Topology
from m6rec_jax.training.optim import make_optimizer
from m6rec_jax.training.plan import calibrate
from m6rec_jax.training.plan.clock import RECOMPUTED, Spent, Work, compute, sent_as_compiled, spent
from m6rec_jax.training.plan.hardware import TPU7X_DEVICES, Place, place_of
from m6rec_jax.training.plan.hlo import Sent, by_kind, collectives
from m6rec_jax.training.plan.lower import Compiled
from m6rec_jax.training.plan.others import replaced_share, unsaid
from m6rec_jax.training.room import WAYS_OUT, memory_needed

GIB = 2.0**30


def place(at: Topology) -> Place:
    """The chip behind one of a topology's devices, and the layout."""
    there = place_of(at.name)
    if ":tpu7x:" not in at.name:
        return there
    chip, n = there.chip, TPU7X_DEVICES
    halves = {name: getattr(chip, name) / n for name in ("peak", "memory", "bandwidth", "vector", "special")}
    return there._replace(chip=chip._replace(**halves))


def work_of(config: Config, blueprint: Blueprint, mesh: Mapping[str, int]) -> Work:
    """A configuration's step in numbers, on a mesh of these sizes. The largest output table stands for all."""
    model, data = config.model, config.data
    experts, shared, chosen = model.experts, model.shared_experts, model.experts_per_token
    capacity = model.capacity_factor if experts and model.routing == "capacity" else 1.0
    return Work(
        layers=model.layers, sets=model.layer_sets, embed=model.embed, width=model.width, heads=model.heads, kv_heads=model.n_kv, head=model.head_dim,
        ffn=model.expert_width if experts else model.ffn_width,
        vocab=max(s.padded for s in blueprint.vocab.slices), length=data.length, tokens=data.rows * data.length,
        chips=math.prod(mesh.values()), fsdp=mesh["fsdp"], tensor=mesh["tensor"], data=mesh["data"],
        slices=config.train.accumulate, experts=experts + shared if experts else 1,
        active=chosen + shared if experts else 1, expert=mesh.get("expert", 1) if experts else 1,
        places=(chosen * capacity + shared) / (chosen + shared), recomputed=RECOMPUTED[model.remat],
        weight_bytes=jax.numpy.dtype(model.dtype).itemsize, gradient_bytes=jax.numpy.dtype(model.dtype).itemsize,
    )  # fmt: skip


def works_of(
    config: Config, blueprint: Blueprint, mesh: Mapping[str, int], generator: Blueprint | None = None,
    teacher: Blueprint | None = None,
) -> list[Work]:  # fmt: skip
    """The model's work and that of what runs beside it. The generator learns, and where it writes it also asks its table once
    more to draw; a teacher is only asked, and for no table."""
    model = work_of(config, blueprint, mesh)
    beside = lambda of: work_of(dataclasses.replace(config, model=of.config), of, mesh)  # noqa: E731
    works = [model]
    if generator is not None:
        works.append(dataclasses.replace(beside(generator), compared=replaced_share(config) * 4 / 3))
    if teacher is not None:
        works.append(dataclasses.replace(beside(teacher), compared=0.0, learns=False, recomputed=frozenset()))
    return works


def flops_of(works: Sequence[Work]) -> float:
    return sum(work.flops() for work in works)


def plan_of(at: Topology, made: Compiled, blueprint: Blueprint) -> tuple[dict[str, Any], list[Sent]]:
    """The flat object of plan.json and the collectives behind it."""
    there = place(at)
    limit = made.limit if made.limit is not None else float(there.chip.memory)
    sent = collectives(made.text, len(at.devices))
    works = works_of(made.config, blueprint, made.mesh.shape, made.others.generator, made.others.teacher)
    hidden, exposed = sent_as_compiled(sent, there)
    took = spent(works, there) if made.refused else compute(works, there.chip)._replace(hidden=hidden, exposed=exposed)
    return {
        "fits": not made.refused and made.hbm <= limit,
        "hbm_bytes": made.hbm,
        "hbm_limit_bytes": limit,
        "flops": flops_of(works),
        "collectives": sum(one.count for one in sent),
        "step_seconds": took.step,
        "mfu": flops_of(works) / (took.step * there.chip.peak),
        "mfu_error": calibrate.error(),
        "bound": took.bound,
        "compile_seconds": made.seconds,
    }, sent


def scaling(at: Topology, made: Compiled, blueprint: Blueprint) -> str:
    """Predicted weak scaling: the same rows a chip, more chips as data replicas, by ring formulas."""
    there = place(at)
    works = works_of(made.config, blueprint, made.mesh.shape, made.others.generator, made.others.teacher)
    work = works[0]
    base = work.tokens // work.chips
    lines, first = [], None
    for chips in SCALE:
        inner = work.fsdp * work.tensor * work.expert
        if chips % inner:
            continue
        grown = [dataclasses.replace(one, chips=chips, tokens=base * chips, data=chips // inner) for one in works]
        took: Spent = spent(grown, there._replace(layout=_layout(there, chips)))
        first = first or took.step
        lines.append(
            f"  {chips:>5} chips: {took.step:8.3f} s a step, {first / took.step:6.1%} of the smallest's speed a chip"
        )
    if not lines:
        return f"weak scaling: a replica takes {work.fsdp * work.tensor * work.expert} chips, none of {SCALE} is a multiple"
    return "\n".join([f"predicted weak scaling, error {calibrate.error():.0%}:", *lines])


SCALE = (16, 64, 256, 1024, 4096)


def _layout(there: Place, chips: int) -> tuple[int, ...]:
    """A layout of so many chips: machines of as many GPUs, or the torus as near to a cube as powers of 2 allow."""
    if there.gpu:
        return max(1, chips // there.layout[-1]), there.layout[-1]
    sizes = [1] * len(there.layout)
    while math.prod(sizes) < chips:
        sizes[sizes.index(min(sizes))] *= 2
    return tuple(sizes)


def table(at: Topology, made: Compiled, blueprint: Blueprint, plan: dict[str, Any], sent: Sequence[Sent], catalogue: Sequence[int]) -> str:  # fmt: skip
    """What is printed: memory by what holds it, collectives by kind, the verdict."""
    parts = memory_needed(
        blueprint, made.config, made.mesh.shape, catalogue, generator=made.others.generator, teacher=made.others.teacher
    )
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
    if missing := unsaid(made.config, made.others):
        lines.append(missing)
    for (kind, overlapped), (count, size) in by_kind(list(sent)).items():
        what = kind + (", overlapped" if overlapped else "")
        lines.append(f"{what:<32}{size / GIB:>10.3f} GiB sent a device and step, {count:,} times")
    lines.append(
        f"a step takes {plan['step_seconds']:.3f} s, MFU {plan['mfu']:.1%} (median error of the time model "
        f"{plan['mfu_error']:.1%}), bound by {plan['bound']}"
    )
    lines.append(scaling(at, made, blueprint))
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
