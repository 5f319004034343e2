"""Replaced tokens over devices: the same are written, and losses and gradients are those of one device."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from m6rec_jax.config import MeshConfig, ReplacedConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.objectives.generator import Replacing, generator_of
from m6rec_jax.training.beside import Beside, _check_fit
from m6rec_jax.training.sharding import make_mesh, place_batch, place_items
from m6rec_jax.training.step import slice_losses
from tests.objectives.test_replaced import ATOMIC, CONFIG, ITEMS, TASKS, batch_of, rewritten

BLUEPRINT = Blueprint(replace(CONFIG, width=32), ATOMIC, 4)
SETTINGS = ReplacedConfig(reward=0.5, augment=0.5, width=16)
HOW = Replacing(generator_of(BLUEPRINT, SETTINGS), SETTINGS, (0, 2), (1,), 0.5)
MESHES = {
    "data, tensor": MeshConfig(data=4, tensor=2),
    "fsdp, sequence": MeshConfig(data=2, fsdp=2, sequence=2),
}


def measured(mesh):
    """What was written, all sums of detection, and gradients of the model, of the generator and of the head."""
    batch = {name: np.asarray(x) for name, x in batch_of(ATOMIC, rows=8).items()}

    def run(learnt, batch, items):
        params, others = learnt
        part, key = {name: x[0] for name, x in batch.items()}, jax.random.key(3)
        written = rewritten(HOW, others["generator"], part, items, jax.random.fold_in(key, 2))[1].tokens
        beside = Beside(others, {}, jax.numpy.array(-0.9))
        made = slice_losses(BLUEPRINT, TASKS, params, part, items, key, replacing=HOW, beside=beside)
        return made.loss.sum() + made.detection.generator, (written, made.loss, made.detection)

    items = place_items(mesh, jax.tree.map(np.asarray, ITEMS))
    with jax.set_mesh(mesh):
        head = {"gain": jax.random.normal(jax.random.key(0), (32,)), "bias": jax.numpy.array(0.3)}
        learnt = BLUEPRINT.init(0), {"generator": HOW.generator.init(1), "head": head}
        found = jax.jit(jax.grad(run, has_aux=True))(learnt, place_batch(mesh, batch, 1), items)
        return jax.device_get(found)


@pytest.fixture(scope="module")
def alone():
    return measured(make_mesh(MeshConfig(), devices=1))


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_what_is_written_and_learnt_equals_that_of_one_device(alone, mesh):
    gradients, (written, loss, detection) = measured(make_mesh(mesh))
    np.testing.assert_array_equal(written, alone[1][0])
    np.testing.assert_allclose(loss, alone[1][1], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), detection, alone[1][2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), gradients, alone[0])


def test_a_generator_that_does_not_fit_the_mesh_is_refused():
    small = replace(SETTINGS, width=12)
    with pytest.raises(InputError, match=r"mesh.fsdp=8 does not divide the 12 numbers of the generator's width; change replaced.width, now 12"):  # fmt: skip
        _check_fit(generator_of(BLUEPRINT, small), make_mesh(MeshConfig(data=1, fsdp=8)))
    with pytest.raises(InputError, match="mesh.stage=2 and a task of replaced-token detection"):
        _check_fit(HOW.generator, make_mesh(MeshConfig(data=4, stage=2)))
