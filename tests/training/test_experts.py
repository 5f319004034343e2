"""A run of a model with experts: what is logged, what is judged, and that it recommends like any other."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.config import CheckpointConfig, Config, DataConfig, MixtureConfig, ModelConfig, OptimConfig, TrainConfig
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.sharding import AXES
from m6rec_jax.objectives.loss import TaskLoss
from m6rec_jax.recommend.recommender import Recommender
from m6rec_jax.training.metrics import read_rows
from m6rec_jax.training.optim import make_optimizer
from m6rec_jax.training.room import memory_needed
from m6rec_jax.training.run import train
from m6rec_jax.training.state import init_state
from m6rec_jax.training.step import make_train_step, slice_losses
from m6rec_jax.vocab import Vocab
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401

CONFIG = Config(
    model=ModelConfig(layers=1, width=16, heads=2, experts=4, balance=0.5, routing="capacity", capacity_factor=0.5),
    optim=OptimConfig(learning_rate=0.02, warmup=1),
    data=DataConfig(length=64, rows=4, block=512),
    mixture=MixtureConfig({"next-item": 1.0}),
    checkpoint=CheckpointConfig(every=2),
    train=TrainConfig(steps=3, log_every=1, eval_every=0, accumulate=2),
)


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory):  # noqa: F811
    return train(CONFIG, [tiny_dataset], tmp_path_factory.mktemp("experts") / "run")


def test_balance_and_dropped_tokens_are_logged(run):
    rows = [row for row in read_rows(run) if "loss" in row]
    assert len(rows) == 3
    assert all(1 <= row["balance"] < 4 and 0 < row["dropped"] < 1 and row["router_z"] > 0 for row in rows)


@pytest.mark.parametrize("weights", ["full", "int8"])
def test_it_recommends(run, tiny_dataset, weights):  # noqa: F811
    if weights == "int8":
        pytest.importorskip("qwix")
    data = open_dataset(tiny_dataset)
    found = Recommender.load(run, dataset=data, weights=weights).recommend(["item-3", "item-5"], k=5)
    assert len({item.item_id for item in found}) == 5


def test_a_run_lends_nothing_to_one_with_other_experts(run, tiny_dataset, tmp_path):  # noqa: F811
    other = replace(CONFIG, model=replace(CONFIG.model, experts=8))
    with pytest.raises(InputError, match="its model.experts is 4, this configuration's 8"):
        train(other, [tiny_dataset], tmp_path / "run", init_from=run)


def arrays(rng, slices, rows, length):
    """A batch of causal rows, each with padding behind."""
    shape = (slices, rows, length)
    real = np.arange(length) < rng.integers(length // 2, length, (slices, rows, 1))
    position = np.broadcast_to(np.arange(length), shape) * real
    whole = {"tokens": rng.integers(9, 200, shape), "targets": rng.integers(9, 200, shape), "positions": position,
             "segment_ids": real, "k_start": 0 * position, "k_end": (position + 1) * real, "task_ids": 0 * position,
             "item_rows": np.full(shape, -1)}  # fmt: skip
    return {name: x.astype(np.int32) for name, x in whole.items()} | {"loss_weights": real.astype(np.float32)}


def test_the_penalty_is_the_mean_over_all_slices_and_moves_the_router():
    """The gradient a step follows is that of the losses' mean plus the penalties' mean, written out."""
    still = {"dropout": 0.0, "embed_dropout": 0.0, "id_dropout": 0.0}
    model = ModelConfig(layers=2, width=16, heads=2, experts=4, balance=0.3, router_z=0.2, content=False, **still)
    blueprint, rng = Blueprint(model, Vocab(200, (40,)), 1), np.random.default_rng(0)
    batch, items = jax.tree.map(jnp.asarray, arrays(rng, 2, 2, 16)), ()
    optimizer = make_optimizer(OptimConfig(), 10)
    state = init_state(blueprint, optimizer, 0)

    def slow(params):
        parts = [slice_losses(blueprint, 1, params, {n: x[i] for n, x in batch.items()}, items) for i in range(2)]
        total = jax.tree.map(lambda *x: sum(x), *parts)
        judged = 0.3 * total.routing.balance + 0.2 * total.routing.router_z
        return total.loss.sum() / total.weight.sum() + judged / total.routing.tokens, total

    (_, total), gradient = jax.jit(jax.value_and_grad(slow, has_aux=True))(state.params)
    _, told = make_train_step(blueprint, optimizer, 1, 0)(state, batch, items)
    norm = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(told.grad_norm, norm, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), told.losses, total)
    assert isinstance(told.losses, TaskLoss) and told.losses.routing.tokens == 2 * batch["segment_ids"].sum()


def test_memory_told_counts_experts_over_their_axis():
    mesh = dict.fromkeys(AXES, 1)

    def parts(expert=1, **model):
        config = replace(
            CONFIG, data=replace(CONFIG.data, rows=64), model=ModelConfig(layers=2, width=64, experts=8, **model)
        )
        return memory_needed(Blueprint(config.model, Vocab(200, (40,)), 5), config, mesh | {"expert": expert}, [40])

    one, eight = parts(), parts(8)
    assert one["parameters and moments"] > 4 * eight["parameters and moments"]
    assert parts(routing="capacity")["activations"] > one["activations"]
    assert parts(8, routing="capacity")["activations"] < eight["activations"]
