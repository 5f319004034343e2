"""Late interaction and per-layer losses on a mesh: the same training as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from m6rec_jax.data.packing import pack_row
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.training.optim import make_optimizer
from m6rec_jax.training.sharding import check_fit, make_mesh, place_batch, place_items
from m6rec_jax.training.state import init_state
from m6rec_jax.training.step import make_train_step
from m6rec_jax.vocab import SPECIALS, Vocab
from tests.framed import WORDS, instance, sequence

VOCAB = Vocab(len(SPECIALS) + WORDS, (40,), options=(2, 3))
KINDS = {"late": {"late": 2}, "exits": {"exits": True}}
MESHES = {
    "rows, fsdp, tensor": MeshConfig(2, 2, 2),
    "sequence": MeshConfig(data=2, sequence=4),
    "stage": MeshConfig(data=2, tensor=2, stage=2),
}


def batch():
    rng, rows = np.random.default_rng(0), []
    for _ in range(8):
        found = [sequence(instance(rng, int(n), 4), VOCAB.option(1, int(rng.integers(3)))) for n in (1, 2, 3)]
        rows.append(pack_row([(one, 0) for one in found], 128))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def followed(kind, mesh):
    """Loss and norm of the gradient of some steps, and the part embeddings behind them."""
    config = ModelConfig(layers=4, width=16, heads=2, ffn=32, **KINDS[kind])
    blueprint, optimizer = Blueprint(config, VOCAB, 4), make_optimizer(OptimConfig(learning_rate=0.01, warmup=0), 9)
    step, found = make_train_step(blueprint, optimizer, 1, 0), []
    items = place_items(mesh, item_table(np.zeros((40, 4)), np.ones(40, bool)))
    with jax.set_mesh(mesh):
        state = init_state(blueprint, optimizer, 0)
        for _ in range(3):
            state, measured = step(state, place_batch(mesh, batch(), 1), items)
            found.append((float(measured.losses.loss.sum()), float(measured.grad_norm)))
    return np.array(found), state.params.get("part")


@pytest.fixture(scope="module")
def alone():
    return {kind: followed(kind, make_mesh(MeshConfig(1), devices=1)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_losses_and_gradients_equal_those_of_one_device(alone, kind, mesh):
    if kind == "exits" and mesh.stage > 1:
        config = Config(model=ModelConfig(layers=4, exits=True), data=DataConfig(rows=8))
        with pytest.raises(InputError, match=r"mesh.stage=2 and model.exits=true"):
            check_fit(make_mesh(mesh), config)
        return
    together, parts = followed(kind, make_mesh(mesh))
    np.testing.assert_allclose(together, alone[kind][0], rtol=1e-4)
    assert np.ptp(together[:, 0]) > 1
    if kind == "late":
        np.testing.assert_allclose(jnp.asarray(parts), alone[kind][1], atol=1e-3)
        assert np.abs(np.asarray(parts)).max() > 1e-3
