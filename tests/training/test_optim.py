"""Each optimiser lowers a loss; Muon's updates are orthogonal a layer; Adafactor keeps little; schedules end where told."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m6rec_jax.config import ModelConfig, OptimConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.training.optim import MUON_RMS, decays, learning_rate, make_optimizer, matrix_axes, orthogonal
from m6rec_jax.vocab import Vocab

NAMES = ("adamw", "muon", "adafactor", "sgd")
BLUEPRINT = Blueprint(ModelConfig(layers=2, width=32, heads=4, kv_heads=2), Vocab(256, (128,)), 8)


@pytest.fixture(scope="module")
def params():
    return BLUEPRINT.init(0)


@pytest.mark.parametrize("name", NAMES)
def test_each_lowers_a_loss(params, name):
    goal = jax.tree.map(lambda x: x * 0.5, params)
    loss = lambda p: sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (p, goal)), strict=True))  # noqa: E731
    rule = make_optimizer(OptimConfig(name=name, warmup=0, learning_rate=5e-3, clip=1e9), 30)

    @jax.jit
    def step(held, _):
        p, state = held
        updates, state = rule.update(jax.grad(loss)(p), state, p)
        return (optax.apply_updates(p, updates), state), None

    (after, _), _ = jax.lax.scan(step, (params, rule.init(params)), None, length=30)
    assert loss(after) < 0.9 * loss(params)


def test_adamw_is_what_it_was(params):
    grads = jax.tree.map(jnp.sin, params)
    config = OptimConfig(warmup=2)
    before = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, 1e-3, 2, 10, 5e-5), 0.9, 0.98, weight_decay=0.01, mask=decays
        ),
    )
    now = make_optimizer(config, 10)
    a, b = before.init(params), now.init(params)
    for _ in range(3):
        x, a = jax.jit(before.update)(grads, a, params)
        y, b = jax.jit(now.update)(grads, b, params)
    jax.tree.map(np.testing.assert_array_equal, x, y)


def test_muon_makes_each_layers_matrix_orthogonal():
    for name, x in BLUEPRINT.init(1)["block"].items():
        if x.ndim < 3:
            continue
        made = np.asarray(orthogonal({"block": {name: x}})["block"][name])
        inwards, outwards = matrix_axes(name)
        rows, columns = (int(np.prod([x.shape[a] for a in axes])) for axes in (inwards, outwards))
        for layer in made:
            values = np.linalg.svd(layer.reshape(rows, columns), compute_uv=False) / (
                MUON_RMS * max(rows, columns) ** 0.5
            )
            # A square matrix drawn at random has directions of next to no size, which few steps cannot raise.
            assert values.max() < 1.3, name
            assert np.median(values) == pytest.approx(1, abs=0.2), name


def test_adafactor_keeps_little():
    params = Blueprint(ModelConfig(layers=2, width=256, heads=4), Vocab(1024, (1024,)), 128).shapes()
    sizes = {}
    for name in NAMES:
        kept = jax.eval_shape(make_optimizer(OptimConfig(name=name), 200).init, params)
        sizes[name] = sum(x.size for x in jax.tree.leaves(kept)) / sum(x.size for x in jax.tree.leaves(params))
    assert sizes["adafactor"] < 0.1 < 0.9 < sizes["sgd"] < 1.1 < sizes["muon"] < 1.9 < sizes["adamw"] < 2.1


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_schedules_warm_up_and_end_where_told(name):
    rate = learning_rate(OptimConfig(schedule=name, warmup=10, learning_rate=1.0, final=0.1), 100)
    assert float(rate(0)) == 0
    assert float(rate(10)) == pytest.approx(1)
    assert float(rate(100)) == pytest.approx(1 if name == "constant" else 0.1)
    assert float(rate(70)) == pytest.approx({"wsd": 1, "constant": 1, "linear": 0.4}.get(name, 0.325), abs=0.01)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="optim.name=lion: must be one of adamw, muon"):
        OptimConfig(name="lion")
    with pytest.raises(InputError, match="optim.schedule=step: must be one of cosine"):
        OptimConfig(schedule="step")
