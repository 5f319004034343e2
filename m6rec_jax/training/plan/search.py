"""Meshes, remat policies and batches for a model on a topology, ranked by the time model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, get_args

import jax

from m6rec_jax.config import Config, ModelConfig
from m6rec_jax.config.model import Remat
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.sharding import AXES
from m6rec_jax.topologies import Topology
from m6rec_jax.training.plan.clock import spent
from m6rec_jax.training.plan.hardware import CHIPS
from m6rec_jax.training.plan.others import others_of
from m6rec_jax.training.plan.report import flops_of, place, works_of
from m6rec_jax.training.room import memory_needed
from m6rec_jax.training.sharding import check_fit

ROWS = (1, 2, 4, 8, 16, 32, 64)  # of a device
ROOM = 0.9  # of the memory there is: the estimate is rough, the compiler decides
LIMITS = {"mesh": ("data", "fsdp", "tensor"), "model": ("remat",), "data": ("rows",), "train": ("accumulate",)}


class Candidate(NamedTuple):
    """A way to train, with its predicted MFU and seconds a step and the estimated bytes a device."""

    config: Config
    mfu: float
    seconds: float
    memory: float
    bound: str

    @property
    def overrides(self) -> str:
        """As they are given on the command line."""
        return " ".join(f"--{section}.{name}={getattr(getattr(self.config, section), name)}" for section, names in LIMITS.items() for name in names)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Counted(Blueprint):
    """A blueprint whose parameters are counted already: a mesh and a policy change nothing about them."""

    count: int = 0

    def parameters(self) -> int:
        return self.count


def _counted(blueprint: Blueprint) -> _Counted:
    sized = (blueprint.config, blueprint.vocab, blueprint.content_width, blueprint.more_widths)
    return _Counted(
        *sized, count=_count(dataclasses.replace(blueprint, config=dataclasses.replace(blueprint.config, remat="none")))
    )


@cache  # whatever the policy
def _count(blueprint: Blueprint) -> int:
    return blueprint.parameters()


def candidates(
    at: Topology, config: Config, blueprint: Blueprint, catalogue: Sequence[int], teacher: ModelConfig | None = None
) -> list[Candidate]:
    """Every way that divides and, by estimate, fits, best first. Raises InputError when none fits.

    Replicas, fsdp and tensor are varied; other axes of the mesh stay as they are. Batches are of one slice.
    """
    devices, there = len(at.devices), place(at)
    plain, blueprint = blueprint, _counted(blueprint)
    found, tried = [], 0
    alone = jax.sharding.AbstractMesh((1,) * len(AXES), AXES)
    others_of(config, plain, alone, teacher)  # what no mesh mends is said as it is
    others = math.prod(getattr(config.mesh, axis) for axis in AXES if axis not in LIMITS["mesh"])
    for tensor in _powers(devices // others):
        for fsdp in _powers(devices // others // tensor):
            data = devices // others // tensor // fsdp
            if data * fsdp * tensor * others != devices:
                continue
            mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor)
            sizes = {axis: getattr(mesh, axis) for axis in AXES}
            for remat in get_args(Remat):
                for rows in ROWS:
                    made = dataclasses.replace(
                        config,
                        mesh=mesh,
                        model=dataclasses.replace(config.model, remat=remat),
                        data=dataclasses.replace(config.data, rows=rows * data * fsdp),
                        train=dataclasses.replace(config.train, accumulate=1),
                    )
                    at_hand = jax.sharding.AbstractMesh(tuple(sizes.values()), AXES)
                    try:
                        check_fit(at_hand, made)  # type: ignore[arg-type]
                        beside = others_of(made, plain, at_hand, teacher)
                    except InputError:
                        continue
                    tried += 1
                    generator, of_teacher = (of and _counted(of) for of in (beside.generator, beside.teacher))
                    memory = sum(memory_needed(blueprint, made, sizes, catalogue, True, generator, of_teacher).values())
                    if memory > ROOM * there.chip.memory:
                        continue
                    works = works_of(made, blueprint, sizes, generator, of_teacher)
                    took = spent(works, there)
                    mfu = flops_of(works) / (took.step * there.chip.peak)
                    found.append(Candidate(made, mfu, took.step, memory, took.bound))
    if not found:
        raise InputError(
            f"{at.name}: of {tried} meshes, policies and batches none fits by estimate; take a larger topology, a "
            f"smaller model, or chips with more memory ({', '.join(CHIPS)})"
        )
    return sorted(found, key=lambda one: (-one.mfu, one.memory))


def told(found: Sequence[Candidate], most: int = 8) -> str:
    """The best as a table."""
    lines = [f"{'MFU':>6}{'s a step':>10}{'GiB':>7}  {'bound':<12}overrides"]
    for one in found[:most]:
        lines.append(f"{one.mfu:>6.1%}{one.seconds:>10.3f}{one.memory / 2**30:>7.1f}  {one.bound:<12}{one.overrides}")
    return "\n".join(lines)


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]
