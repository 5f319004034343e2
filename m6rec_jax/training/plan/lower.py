"""A training step as shapes alone, compiled for the devices of a topology."""

from __future__ import annotations

import dataclasses
import re
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m6rec_jax.config import Config, ModelConfig
from m6rec_jax.data.packing import ROW_ARRAYS
from m6rec_jax.model.items import ITEM_AXES, ItemTable
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.sharding import spec
from m6rec_jax.topologies import Topology, compiled
from m6rec_jax.training.optim import make_optimizer
from m6rec_jax.training.plan.others import Others, others_of, shapes_of
from m6rec_jax.training.prune import fresh
from m6rec_jax.training.sharding import BATCH_AXES, check_fit, mesh_of, row_shards
from m6rec_jax.training.state import TrainState
from m6rec_jax.training.step import make_train_step
from m6rec_jax.vocab import PAD_MULTIPLE, Vocab

LENGTH, TOKENS = 256, 1024  # of a row, and a device, where a configuration leaves them to be fitted


class Compiled(NamedTuple):
    """A step compiled for a mesh. `hbm`: bytes it takes on each device; `text` is empty where the compiler refused it."""

    config: Config
    mesh: jax.sharding.Mesh
    others: Others
    text: str
    hbm: float
    limit: float | None
    refused: bool
    seconds: float


def blueprint_of(config: Config, items: int, pieces: int, content: int) -> Blueprint:
    """The model over a catalogue of one code level and a text vocabulary of these sizes."""
    return Blueprint(config.model, Vocab(pieces, (items,)), content)


def settled(config: Config, devices: list[jax.Device]) -> Config:
    """The configuration with what it leaves to the data (0) set: rows of 256 tokens, 1,024 tokens a device."""
    length = config.data.length or LENGTH
    shards = row_shards(mesh_of(config.mesh, devices))
    rows = config.data.rows or shards * max(1, TOKENS // length) * config.train.accumulate
    return dataclasses.replace(config, data=dataclasses.replace(config.data, length=length, rows=rows))


def lower(
    at: Topology, config: Config, blueprint: Blueprint, items: int, teacher: ModelConfig | None = None
) -> Compiled:
    """Compile the training step of a configuration for a topology, with all that runs beside its model; no array is made.

    Raises InputError when the mesh does not divide the devices, or rows, heads or widths the mesh.
    """
    mesh = mesh_of(config.mesh, at.devices)
    check_fit(mesh, config)
    others = others_of(config, blueprint, mesh, teacher)
    optimizer = make_optimizer(config.optim, config.train.steps)
    with jax.set_mesh(mesh):
        placed = lambda shape, dtype, p: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, p))  # noqa: E731
        params = jax.tree.map(lambda x, p: placed(x.shape, x.dtype, p), blueprint.shapes(), blueprint.specs())
        zero = jax.ShapeDtypeStruct((), jnp.int32)
        average = params if config.optim.average > 0 else None
        masks = jax.eval_shape(partial(fresh, config.prune), params)
        beside, taught = shapes_of(others, config.model.width, optimizer, placed)
        state = TrainState(
            params, jax.eval_shape(optimizer.init, params), zero, zero, average, masks=masks, beside=beside
        )
        slices = config.train.accumulate
        sizes = (slices, config.data.rows // slices, config.data.length)
        batch = {name: placed(sizes, dtype, spec(*BATCH_AXES)) for name, dtype in ROW_ARRAYS.items()}
        padded = -(-items // PAD_MULTIPLE) * PAD_MULTIPLE
        shapes = ItemTable((padded, blueprint.content_width), (padded,))  # type: ignore[arg-type]
        table = ItemTable(*(placed(s, d, spec(*axes)) for s, d, axes in zip(shapes, (jnp.float32, jnp.bool_), ITEM_AXES, strict=True)))  # fmt: skip
        step: Any = make_train_step(
            blueprint, optimizer, len(config.mixture.tasks), config.train.seed, config.optim.label_smoothing,
            config.optim.negatives, config.optim.average, config.train.explode, prune=config.prune, lesson=others.lesson, replacing=others.replacing,
        )  # fmt: skip
        donating = jax.jit(step.__wrapped__, donate_argnums=0)  # as on a device; the host that compiles donates nothing
        start = time.perf_counter()
        try:
            program = compiled(at, donating, state, batch, table, *(() if taught is None else (taught,)))
        except Exception as error:
            asked = _refused(str(error))
            if asked is None:
                raise
            return Compiled(config, mesh, others, "", *asked, True, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    m: Any = program.memory_analysis()
    # The sum counts temporaries that never live together; the peak, where a compiler tells it, holds arguments and results.
    taken = (
        getattr(m, "peak_memory_in_bytes", 0)
        or m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    )
    return Compiled(config, mesh, others, program.as_text() or "", float(taken), at.memory, False, seconds)


_OUT = re.compile(r"(?:[Uu]sed |\()([\d.]+)([KMGT]?)\)? (?:of |exceeds available HBM \()([\d.]+)([KMGT]?)(?: hbm|\))")


def _refused(said: str) -> tuple[float, float] | None:
    """Bytes asked for and bytes there are, from the TPU compiler's refusal; None when it is another error."""
    told = _OUT.search(said)
    if told is None:
        return None
    size = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return float(told[1]) * size[told[2]], float(told[3]) * size[told[4]]
