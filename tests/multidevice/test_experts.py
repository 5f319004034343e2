"""Experts over devices: the same training as on one, whichever axes the mesh has."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from m6rec_jax.config import MeshConfig, ModelConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.training.sharding import check_fit, make_mesh, place_batch, place_items
from m6rec_jax.training.state import init_state
from m6rec_jax.training.step import make_train_step
from m6rec_jax.vocab import Vocab
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401
from tests.multidevice.test_meshes import CONFIG, World

SIZES = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, experts=4, expert_ffn=32, balance=0.1, router_z=0.01)
MESHES = {
    "expert=2": (MeshConfig(1, 1, 1, expert=2), 2),
    "expert=4": (MeshConfig(1, 1, 1, expert=4), 4),
    "fsdp=2 expert=2 tensor=2": (MeshConfig(1, 2, 2, expert=2), 8),
}
ONE = MeshConfig(1, 1, 1)


def world_of(path, sizes):
    world = World(path)
    world.blueprint = Blueprint(sizes, world.blueprint.vocab, world.blueprint.content_width)
    return world


@pytest.fixture(scope="module")
def dropless(tiny_dataset):  # noqa: F811
    world = world_of(tiny_dataset, SIZES)
    return world, world.losses(make_mesh(ONE, devices=1))[0]


@pytest.mark.parametrize(("mesh", "devices"), MESHES.values(), ids=MESHES)
def test_training_equals_that_of_one_device(dropless, mesh, devices):
    world, alone = dropless
    losses, state = world.losses(make_mesh(mesh, devices=devices))
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    assert np.ptp(losses) > 0.01  # there is something to agree on
    assert state.params["block"]["expert_down"].sharding.spec == jax.P(None, "expert", "tensor", "fsdp")


def test_what_capacity_drops_is_the_same_on_every_mesh(tiny_dataset):  # noqa: F811
    """One step of gradients; rows are dealt with alone, so places do not depend on who holds them."""
    sizes = replace(SIZES, routing="capacity", capacity_factor=0.7, shared_experts=1)
    world, found = world_of(tiny_dataset, sizes), []
    for mesh in (make_mesh(ONE, devices=1), make_mesh(MESHES["fsdp=2 expert=2 tensor=2"][0])):
        step = make_train_step(world.blueprint, world.optimizer, len(world.pools), 0)
        with jax.set_mesh(mesh):
            state = init_state(world.blueprint, world.optimizer, 0)
            _, told = step(state, place_batch(mesh, world.batches[0], 1), place_items(mesh, world.items))
        found.append(jax.device_get((told.losses, told.grad_norm)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)
    routing = found[0][0].routing
    assert routing.dropped > 0 and routing.tokens == 2 * (world.batches[0]["segment_ids"] > 0).sum()


@pytest.mark.parametrize(
    ("mesh", "sizes", "says"),
    [
        (MeshConfig(1, 1, 1, expert=8), SIZES, "mesh.expert=8 does not divide the 4 experts"),
        (MeshConfig(1, 1, 2, expert=4), replace(SIZES, expert_ffn=33), "mesh.tensor=2 does not divide the 33 columns of an expert"),
        (MeshConfig(1, 1, 2, expert=4), replace(SIZES, experts=0), "mesh.expert=4 and model.experts=0: a dense model"),
        (MeshConfig(1, 2, 1, expert=4), SIZES, "data.rows=12 does not divide over 8 row shards .mesh data x fsdp x expert."),
    ],
)  # fmt: skip
def test_experts_that_do_not_divide_are_refused_before_compiling(mesh, sizes, says):
    rows = 12 if "rows" in says else 8
    with pytest.raises(InputError, match=says):
        check_fit(make_mesh(mesh), replace(CONFIG, model=sizes, data=replace(CONFIG.data, rows=rows)))


def test_fresh_weights_are_drawn_in_shards():
    """No device holds a whole weight on the way: those of a hundred billion parameters would not fit."""
    blueprint = Blueprint(SIZES, Vocab(200, (40,)), 6)
    with jax.set_mesh(make_mesh(MESHES["fsdp=2 expert=2 tensor=2"][0])):
        program = jax.jit(lambda: blueprint.init(0)).lower().compile().as_text()
    assert "f32[2,2,16,16]" in program and "f32[2,4,32,32]" not in program
