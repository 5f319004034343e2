"""Experts over devices: the same training as on one, whichever axes the mesh has."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from m6rec_jax.config import MeshConfig, ModelConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.training.run import train
from m6rec_jax.training.sharding import check_fit, make_mesh
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401
from tests.multidevice.test_meshes import CONFIG, World

SIZES = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, experts=4, expert_ffn=32, balance=0.1, router_z=0.01)
ROUTINGS = {
    "dropless": SIZES,
    "capacity": replace(SIZES, routing="capacity", capacity_factor=0.7, shared_experts=1),
}
MESHES = {
    "expert=2": (MeshConfig(1, 1, 1, expert=2), 2),
    "expert=4": (MeshConfig(1, 1, 1, expert=4), 4),
    "fsdp=2 expert=2 tensor=2": (MeshConfig(1, 2, 2, expert=2), 8),
}


@pytest.fixture(scope="module", params=ROUTINGS.values(), ids=ROUTINGS)
def world(request, tiny_dataset):  # noqa: F811
    world = World(tiny_dataset)
    world.blueprint = Blueprint(request.param, world.blueprint.vocab, world.blueprint.content_width)
    return world


@pytest.fixture(scope="module")
def alone(world):
    return world.losses(make_mesh(MeshConfig(1, 1, 1), devices=1))


@pytest.mark.parametrize(("mesh", "devices"), MESHES.values(), ids=MESHES)
def test_training_equals_that_of_one_device(world, alone, mesh, devices):
    losses, state = world.losses(make_mesh(mesh, devices=devices))
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    assert np.ptp(losses) > 0.01
    held = state.params["block"]["expert_down"].sharding.spec
    assert held == jax.P(None, "expert", "tensor", "fsdp")
