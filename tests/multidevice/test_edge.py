"""Shared layers, factorised tables, a teacher and masks on a mesh: the same training as on one device."""

from dataclasses import replace

import jax
import numpy as np

from m6rec_jax.config import DistillConfig, MeshConfig, PruneConfig
from m6rec_jax.training.distill import Lesson
from m6rec_jax.training.prune import pruned
from m6rec_jax.training.sharding import make_mesh, place_batch, place_items
from m6rec_jax.training.state import init_state
from m6rec_jax.training.step import make_train_step
from tests.domains import films  # noqa: F401
from tests.fixtures import tiny_dataset, tiny_levels, tiny_root  # noqa: F401
from tests.multidevice.test_meshes import World

PRUNE = PruneConfig(sparsity=0.8, begin=0, end=4, every=2, tables=True)
STEPS = 6


def followed(world, mesh):
    """Losses of the tasks and of the relations, step by step, and the state after them."""
    blueprint = world.blueprint
    small = replace(blueprint, config=replace(blueprint.config, shared_layers=True, embed=16))
    lesson = Lesson(blueprint, DistillConfig())
    step = make_train_step(small, world.optimizer, len(world.pools), 0, prune=PRUNE, lesson=lesson)
    items, found = place_items(mesh, world.items), []
    with jax.set_mesh(mesh):
        teacher = blueprint.init(5)
        state = init_state(small, world.optimizer, 0, prune=PRUNE)
        where = {name: x.sharding.spec for name, x in pruned(PRUNE, state.params).items()}
        assert {name: x.sharding.spec for name, x in state.masks.kept.items()} == where
        for batch in world.batches[:STEPS]:
            state, measured = step(state, place_batch(mesh, batch, 2), items, teacher)
            found.append(
                (float(measured.losses.loss.sum()), float(measured.losses.relation), float(measured.grad_norm))
            )
        assert {name: x.sharding.spec for name, x in state.masks.kept.items()} == where
    return np.array(found), state


def test_training_equals_that_of_one_device(tiny_dataset, films):  # noqa: F811
    world = World(tiny_dataset, films)
    alone, _ = followed(world, make_mesh(MeshConfig(1), devices=1))
    for axes in (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=2, tensor=2, sequence=2)):
        together, state = followed(world, make_mesh(axes))
        np.testing.assert_allclose(together, alone, rtol=1e-3)
        for name, x in pruned(PRUNE, state.params).items():
            assert (np.asarray(x) == 0).sum() == round(0.8 * x.size), name
