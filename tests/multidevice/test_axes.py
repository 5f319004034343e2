"""Rows, positions and layers dealt over devices: the same training as one device, and less memory on each."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from m6rec_jax.config import MeshConfig
from m6rec_jax.data.packing import ROW_ARRAYS
from m6rec_jax.errors import InputError
from m6rec_jax.training.sharding import check_fit, make_mesh, place_batch, place_items
from m6rec_jax.training.state import init_state
from m6rec_jax.training.step import make_train_step
from tests.domains import films  # noqa: F401
from tests.fixtures import tiny_dataset, tiny_levels, tiny_root  # noqa: F401
from tests.multidevice.test_meshes import CONFIG, World

ONE = MeshConfig(1)
AXES = {
    "sequence": (MeshConfig(data=2, sequence=4), 0, 1),
    "sequence, fsdp, tensor": (MeshConfig(data=1, fsdp=2, tensor=2, sequence=2), 0, 1),
    "stage": (MeshConfig(data=4, stage=2), 0, 1),
    "stage of four parts, fsdp, tensor, slices": (MeshConfig(data=1, fsdp=2, tensor=2, stage=2), 2, 2),
    "stage, sequence, tensor": (MeshConfig(data=1, tensor=2, sequence=2, stage=2), 4, 1),
}


@pytest.fixture(scope="module")
def world(tiny_dataset, films):  # noqa: F811
    return World(tiny_dataset, films)


def followed(world, mesh, microbatches=0, slices=1, negatives=0):
    """Loss and norm of the gradient (to which AdamW is blind) of 20 steps, dropout on."""
    blueprint = replace(world.blueprint, config=replace(world.blueprint.config, microbatches=microbatches))
    step = make_train_step(blueprint, world.optimizer, len(world.pools), 0, 0.1, negatives)
    items, found = place_items(mesh, world.items), []
    with jax.set_mesh(mesh):
        state = init_state(blueprint, world.optimizer, 0)
        for batch in world.batches:
            state, measured = step(state, place_batch(mesh, batch, slices), items)
            found.append((float(measured.losses.loss.sum() / measured.losses.weight.sum()), float(measured.grad_norm)))
    return np.array(found), state


@pytest.fixture(scope="module")
def alone(world):
    known = {}

    def of(slices):
        if slices not in known:
            known[slices] = followed(world, make_mesh(ONE, devices=1), slices=slices)[0]
        return known[slices]

    return of


@pytest.mark.parametrize(("mesh", "microbatches", "slices"), AXES.values(), ids=AXES)
def test_losses_and_gradients_equal_those_of_one_device(world, alone, mesh, microbatches, slices):
    together, state = followed(world, make_mesh(mesh), microbatches, slices)
    np.testing.assert_allclose(together[:, 0], alone(slices)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(together[:, 1], alone(slices)[:, 1], rtol=1e-4)
    assert np.ptp(together[:, 0]) > 0.01
    of_layers = {leaf.sharding.spec[0] for leaf in jax.tree.leaves(state.params["block"])}
    assert of_layers == {"stage"}


def test_memory_of_a_step_falls_with_the_devices_that_share_a_row(world):
    """Activations alone: parameters here are small beside a row of 1,024 tokens."""
    blueprint = world.blueprint
    step = make_train_step(blueprint, world.optimizer, len(world.pools), 0)
    batch = {name: np.zeros((1, 1024), kind) for name, kind in ROW_ARRAYS.items()}

    def temporary(over):
        mesh = make_mesh(MeshConfig(data=1, sequence=over), devices=over)
        with jax.set_mesh(mesh):
            state = jax.eval_shape(lambda: init_state(blueprint, world.optimizer, 0))
            placed = place_batch(mesh, batch, 1), place_items(mesh, world.items)
            return step.lower(state, *placed).compile().memory_analysis().temp_size_in_bytes

    one, two, four = (temporary(over) for over in (1, 2, 4))
    assert two < 0.6 * one and four < 0.6 * two


@pytest.mark.parametrize(
    ("mesh", "changes", "line"),
    [
        (MeshConfig(data=1, sequence=8), {"data": {"length": 60}}, "mesh.sequence=8 does not divide the 60 positions of a row"),
        (MeshConfig(data=1, stage=8), {}, "mesh.stage=8 does not divide the 2 layers"),
        (MeshConfig(data=4, stage=2), {"data": {"rows": 4}}, "times 2 microbatches .* make it a multiple of 8"),
        (MeshConfig(data=4, stage=2), {"model": {"microbatches": 3}}, "times 3 microbatches .* make it a multiple of 12"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_divide_is_refused(mesh, changes, line):
    config = replace(CONFIG, **{part: replace(getattr(CONFIG, part), **new) for part, new in changes.items()})
    with pytest.raises(InputError, match=line) as error:
        check_fit(make_mesh(mesh), config)
    assert "\n" not in str(error.value)
