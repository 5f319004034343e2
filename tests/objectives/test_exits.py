"""Losses of every layer: their weights, which targets they are of, and that only training has them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.config import ModelConfig
from m6rec_jax.data.packing import pack_row
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import View
from m6rec_jax.objectives.loss import cross_entropy
from m6rec_jax.training.step import slice_losses
from m6rec_jax.vocab import SPECIALS, Vocab
from tests.framed import WORDS, instance, sequence, words

CONFIG = ModelConfig(layers=3, width=16, heads=2, ffn=32, exits=True, dropout=0, embed_dropout=0, id_dropout=0)
VOCAB = Vocab(len(SPECIALS) + WORDS, (40,), options=(2, 3))
ITEMS = jax.tree.map(jnp.asarray, item_table(np.zeros((40, 4)), np.ones(40, bool)))


@pytest.fixture(scope="module")
def world():
    """A row of two instances with options and one text that is read left to right, and parameters."""
    rng = np.random.default_rng(0)
    options = [sequence(instance(rng, 2), VOCAB.option(task, 1)) for task in (0, 1)]
    tokens = np.array(words(rng, 9), np.int32)
    text = replace(sequence(tokens, order=np.arange(9, dtype=np.int32)), targets=np.roll(tokens, -1))
    row = pack_row([(options[0], 0), (text, 1), (options[1], 2)], 96)
    batch = {name: jnp.asarray(value)[None] for name, value in row.items()}
    return Blueprint(CONFIG, VOCAB, 4).init(0), batch


def layer_losses(params, batch):
    """Loss sums a task `[N, 3]` of each layer, from the states that `routed` gives."""
    model = Blueprint(CONFIG, VOCAB, 4).bind(params)
    view = View(batch["positions"], batch["k_start"], batch["k_end"])
    states, _ = model.routed(batch["tokens"], batch["item_rows"], view, ITEMS, every=True)
    of = batch["targets"], batch["loss_weights"], batch["task_ids"]
    return jnp.stack([cross_entropy(model, state, *of, 3, ITEMS).loss for state in states])


def trained_on(params, batch, config=CONFIG):
    losses = slice_losses(Blueprint(config, VOCAB, 4), 3, params, batch, ITEMS, jax.random.key(0))
    return jnp.sum(losses.loss) + (0 if losses.exits is None else losses.exits)


def test_layer_k_of_n_weighs_2k_over_n_times_n_plus_one_for_options_alone(world):
    params, batch = world

    def expected(params):
        found = layer_losses(params, batch)
        share = jnp.array([2 * k / (3 * 4) for k in (1, 2, 3)])
        return share @ (found[:, 0] + found[:, 2]) + found[-1, 1]

    value, gradient = jax.jit(jax.value_and_grad(trained_on))(params, batch)
    slow, slow_gradient = jax.jit(jax.value_and_grad(expected))(params)
    np.testing.assert_allclose(value, slow, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, slow_gradient)


def test_what_is_reported_and_validated_is_the_last_layer(world):
    params, batch = world
    found = layer_losses(params, batch)
    assert np.ptp(found[:, 0]) > 1e-3
    training = slice_losses(Blueprint(CONFIG, VOCAB, 4), 3, params, batch, ITEMS, jax.random.key(0))
    validation = slice_losses(Blueprint(CONFIG, VOCAB, 4), 3, params, batch, ITEMS)
    for losses in (training, validation):
        np.testing.assert_allclose(losses.loss, found[-1], rtol=1e-5)
    assert validation.exits is None
    plain = trained_on(params, batch, replace(CONFIG, exits=False))
    np.testing.assert_allclose(plain, found[-1].sum(), rtol=1e-5)


def test_a_model_without_options_has_nothing_to_leave_early_with(world):
    _, batch = world
    blueprint = Blueprint(CONFIG, Vocab(VOCAB.pieces, (40,)), 4)
    with pytest.raises(InputError, match="no dataset has a task with options"):
        slice_losses(blueprint, 1, blueprint.init(0), batch, ITEMS, jax.random.key(0))
