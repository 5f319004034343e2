"""Where every array of a run would lie, as text: told from shapes alone, for meshes of any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from m6rec_jax.config import Config
from m6rec_jax.data.packing import ROW_ARRAYS
from m6rec_jax.model.items import ITEM_AXES
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.sharding import AXES, spec
from m6rec_jax.training.optim import make_optimizer
from m6rec_jax.training.sharding import BATCH_AXES, check_fit
from m6rec_jax.training.state import init_state


def dump_shardings(blueprint: Blueprint, config: Config, sizes: Mapping[str, int], catalogue: int) -> list[str]:
    """A line `path  dtype[shape]  PartitionSpec` for each array of a train state, a batch and the item features.

    `sizes`: devices along each mesh axis; `catalogue`: rows of the item features, padded. The state is traced as
    training makes it, on an abstract mesh: nothing is allocated. Raises InputError as `check_fit`.
    """
    kinds = (jax.sharding.AxisType.Explicit,) * len(AXES)
    mesh = jax.sharding.AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=kinds)
    check_fit(mesh, config)
    optimizer = make_optimizer(config.optim, config.train.steps)
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(lambda: init_state(blueprint, optimizer, 0, config.optim.average > 0, config.prune))
    lines = [_line("state", path, x, _spec(x)) for path, x in jax.tree_util.tree_leaves_with_path(state)]
    data, slices = config.data, config.train.accumulate
    shape = (slices, data.rows // slices, data.length)
    for name, kind in ROW_ARRAYS.items():
        lines.append(_line("batch", name, jax.ShapeDtypeStruct(shape, kind), spec(*BATCH_AXES)))
    facts = {"content": ((catalogue, blueprint.content_width), np.float32), "seen": ((catalogue,), np.bool_)}
    for name, axes in ITEM_AXES._asdict().items():
        lines.append(_line("items", name, jax.ShapeDtypeStruct(*facts[name]), spec(*axes)))
    return lines


def _spec(x: jax.ShapeDtypeStruct) -> jax.sharding.PartitionSpec:
    """Where a traced array lies; counters are made outside of any program and lie on every device."""
    return x.sharding.spec if x.ndim else jax.sharding.PartitionSpec()


def _line(part: str, path: Any, x: Any, where: jax.sharding.PartitionSpec) -> str:
    name = path if isinstance(path, str) else jax.tree_util.keystr(path, simple=True, separator="/")
    axes = ", ".join("-" if axis is None else "+".join((axis,) if isinstance(axis, str) else axis) for axis in where)
    return f"{part}/{name}  {np.dtype(x.dtype).name}[{', '.join(map(str, x.shape))}]  ({axes})"
