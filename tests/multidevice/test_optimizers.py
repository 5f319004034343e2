"""Every optimiser takes the same steps on one device and on 2 x 2 x 2."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m6rec_jax.config import MeshConfig, ModelConfig, OptimConfig
from m6rec_jax.model.load import Blueprint
from m6rec_jax.training.optim import make_optimizer
from m6rec_jax.training.sharding import make_mesh
from m6rec_jax.training.state import init_state
from m6rec_jax.vocab import Vocab

BLUEPRINT = Blueprint(ModelConfig(layers=2, width=32, heads=4, kv_heads=2), Vocab(256, (128,)), 8)


@pytest.mark.parametrize("name", ["muon", "adafactor", "sgd"])  # adamw: test_meshes
def test_steps_equal_those_of_one_device(name):
    rule, found = make_optimizer(OptimConfig(name=name, warmup=0, learning_rate=1e-2), 10), []

    @jax.jit
    def step(params, state):
        updates, new = rule.update(jax.tree.map(lambda x: jnp.sin(50 * x), params), state, params)
        keep = lambda a, b: jnp.where(True, a, b)  # noqa: E731  as a step does, which wants both in one place
        return jax.tree.map(keep, optax.apply_updates(params, updates), params), jax.tree.map(keep, new, state)

    for config, devices in ((MeshConfig(1, 1, 1), 1), (MeshConfig(2, 2, 2), 8)):
        with jax.set_mesh(make_mesh(config, devices=devices)):
            begun = init_state(BLUEPRINT, rule, 0)
            params, _ = step(*step(begun.params, begun.optimizer))
        places = lambda tree: [x.sharding.spec for x in jax.tree.leaves(tree)]  # noqa: E731
        assert places(params) == places(begun.params)
        found.append(jax.tree.map(np.asarray, params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *found)
    moved = jax.tree.map(lambda a, b: np.abs(a - np.asarray(b)).max(), found[0], begun.params)
    assert max(jax.tree.leaves(moved)) > 1e-4
