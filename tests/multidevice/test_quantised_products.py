"""Products in eight bits over devices: they and their gradients are those of one device, rounded by the same scales."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from m6rec_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from m6rec_jax.data.packing import pack_row
from m6rec_jax.errors import InputError
from m6rec_jax.model import sharding
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.quantised_products import quantised_product
from m6rec_jax.training.sharding import check_fit, make_mesh, place_batch, place_items
from m6rec_jax.training.step import slice_losses
from tests.objectives.test_replaced import ATOMIC, ITEMS, KNOWN, LENGTH, history

pytest.importorskip("qwix")
CONFIG = ModelConfig(
    layers=1, width=32, heads=4, kv_heads=2, ffn=48, quantise="int8", dropout=0, embed_dropout=0, id_dropout=0
)
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=2, fsdp=4),
    "tensor": MeshConfig(data=4, tensor=2),
}
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def batch():
    """Rows of two histories each, read left to right."""
    made = []
    for row in range(8):
        rng = np.random.default_rng(row)
        read = [KNOWN["causal"].arrange(history(ATOMIC, rng, 6), rng, 0.4) for _ in range(2)]
        made.append(pack_row([(one, 0) for one in read], LENGTH))
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def measured(mesh):
    """The mean loss of a batch and its gradients."""
    blueprint = Blueprint(CONFIG, ATOMIC, 4)

    def run(params, batch, items):
        made = slice_losses(blueprint, 1, params, {name: x[0] for name, x in batch.items()}, items, jax.random.key(3))
        return made.loss.sum() / made.weight.sum()

    items = place_items(mesh, jax.tree.map(np.asarray, ITEMS))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(run))(blueprint.init(0), place_batch(mesh, batch(), 1), items)
        return jax.device_get(found)


PRODUCTS = {  # letters, shapes, and the axes that their letters lie along
    "to heads": ("btd,dkgh->btkgh", (8, 4, 32), (32, 2, 2, 8), {"k": "kv"}),
    "from heads": ("btkgh,kghd->btd", (8, 4, 2, 2, 8), (2, 2, 8, 32), {"k": "kv"}),
}


@pytest.mark.parametrize("subscripts, of_x, of_w, along", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_a_product_and_its_gradients_equal_those_of_one_device(kind, mesh, subscripts, of_x, of_w, along):
    """The scale is that of a whole row, though its numbers lie on several devices; where they are not summed, it lies
    where the row does. Sums of int8 are exact."""
    rng, (ins, out) = np.random.default_rng(0), subscripts.split("->")
    letters = dict(zip(("x", "w", "g"), (*ins.split(","), out), strict=True))
    sizes = dict(zip("".join(ins.split(",")), (*of_x, *of_w), strict=True))
    arrays = [rng.normal(size=[sizes[a] for a in of]).astype(np.float32) for of in letters.values()]
    arrays[0][3] *= 100  # the scales of rows differ

    def both(place):
        def made(x, w, g):
            y, back = jax.vjp(lambda x, w: quantised_product(subscripts, kind, place, x, w), x, w)
            return y, *back(g)

        return jax.jit(made)

    wanted = both(None)(*arrays)
    with jax.set_mesh(make_mesh(mesh)):
        axes = {"b": "batch"} | along
        where = [sharding.out(*(axes.get(a) for a in of)) for of in letters.values()]
        placed = [
            jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), spec))
            for x, spec in zip(arrays, where, strict=True)
        ]
        got = both(where[2])(*placed)
        assert [one.sharding.spec for one in got] == [where[2], *where[:2]]
    for one, like in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, like, rtol=1e-5, atol=1e-5 * np.abs(like).max())


def test_a_model_is_trained_alike_as_far_as_rounding_lets_it():
    """Of a whole model not within 1e-5: sums in another order differ by 1e-7, which moves a number here and there over the edge
    to the next of its 256, and what comes after it by so much."""
    loss, gradients = measured(make_mesh(MESH))
    alone, others = measured(make_mesh(MeshConfig(), devices=1))
    assert abs(loss - alone) < 5e-3 * alone
    assert optax.tree.norm(jax.tree.map(np.subtract, gradients, others)) < 0.1 * optax.tree.norm(others)


def test_a_pipeline_is_refused_and_other_axes_are_not():
    config = Config(model=replace(CONFIG, layers=2), data=DataConfig(length=64, rows=8))
    mesh = make_mesh(MeshConfig(data=4, stage=2))
    with pytest.raises(InputError, match=r"^mesh.stage=2 and model.quantise=int8: products in a pipeline are not rounded; change one of them$"):  # fmt: skip
        check_fit(mesh, config)
    check_fit(mesh, replace(config, model=replace(config.model, quantise="none")))
    check_fit(make_mesh(MeshConfig(data=4, tensor=2)), config)
