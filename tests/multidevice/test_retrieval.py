"""Pairs and options dealt over devices: negatives of all rows, losses and gradients of one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.config import MeshConfig, ModelConfig
from m6rec_jax.data.examples import text_example
from m6rec_jax.data.packing import pack_row
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.objectives import objectives
from m6rec_jax.objectives.contrast import Pairs
from m6rec_jax.training.sharding import make_mesh, place_batch, place_items
from m6rec_jax.training.step import slice_losses
from m6rec_jax.vocab import Vocab
from tests.objectives.test_retrieval import arranged, pair
from tests.objectives.test_scoring import prompt

VOCAB = Vocab(170, (30,), options=(2, 5))
BLUEPRINT = Blueprint(ModelConfig(layers=1, width=16, heads=2, vectors=8), VOCAB, 5)
MESHES = {
    "data, tensor": MeshConfig(data=4, tensor=2),
    "fsdp, sequence": MeshConfig(data=2, fsdp=2, sequence=2),
}


def rows():
    rng, made = np.random.default_rng(0), []
    text = lambda n: rng.integers(140, 170, n)  # noqa: E731
    for _ in range(8):
        pairs = [pair(text(4), text(3), int(rng.integers(6)), int(rng.integers(1, 9)), (0, 1)) for _ in range(2)]
        option = np.array([VOCAB.option(int(rng.integers(2)), int(rng.integers(2)))], np.int32)
        scored = objectives()["scoring"].arrange(text_example(prompt(text(3), text(2)), option), rng, 0.3)
        made.append(pack_row([(arranged(pairs[0]), 1), (scored, 0), (arranged(pairs[1]), 1)], 64))
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def losses(mesh):
    def one(params, batch, items):
        part = {name: x[0] for name, x in batch.items()}
        run = partial(slice_losses, BLUEPRINT, 2, pairs=Pairs((1,), 4))
        return jax.value_and_grad(lambda p: ((made := run(p, part, items)).loss.sum(), made), has_aux=True)(params)

    items = place_items(mesh, item_table(np.ones((30, 5)), np.ones(30, bool)))
    with jax.set_mesh(mesh):
        (_, made), gradients = jax.jit(one)(BLUEPRINT.init(0), place_batch(mesh, rows(), 1), items)
        return jax.device_get((made.loss, made.weight, gradients))


@pytest.fixture(scope="module")
def alone():
    return losses(make_mesh(MeshConfig(), devices=1))


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_losses_and_gradients_equal_those_of_one_device(alone, mesh):
    loss, weight, gradients = losses(make_mesh(mesh))
    np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
    assert weight.tolist() == alone[1].tolist() == [8, 16]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), gradients, alone[2])
    of_vectors = jnp.stack([jnp.abs(x).sum() for x in jax.tree.leaves(gradients["vectors"])])
    assert (of_vectors > 0).all() and np.abs(gradients["embeddings"]["tables"]["options"][7:]).sum() == 0
