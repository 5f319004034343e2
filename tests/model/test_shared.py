"""Shared layers are a model whose layers are copies; factorised embeddings are tables that are a product."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.config import ModelConfig
from m6rec_jax.decoding.cache import append, prefill
from m6rec_jax.errors import InputError
from m6rec_jax.model.export import llama
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.quantised import kept_as
from m6rec_jax.model.transformer import causal
from m6rec_jax.objectives.loss import cross_entropy
from m6rec_jax.vocab import Vocab
from tests.model.test_export import forward

CONFIG = ModelConfig(layers=3, shared_layers=True, width=16, embed=6, heads=4, kv_heads=2, ffn=32, id_dropout=0)
VOCAB, WIDTH = Vocab(200, (40,)), 5
COUNTS = np.array([9, 7])


def copied(params, layers):
    """The same weights in each of so many layers."""
    return {**params, "block": jax.tree.map(lambda w: jnp.repeat(w, layers, axis=0), params["block"])}


def multiplied(params):
    """Tables and content of the width, the projection multiplied out."""
    E = params["embeddings"]
    tables = {name: t @ E["projection"] for name, t in E["tables"].items()}
    return {**params, "embeddings": {"tables": tables, "content": E["content"] @ E["projection"]}}


PLAIN = {
    "shared": (replace(CONFIG, shared_layers=False), lambda p: copied(p, CONFIG.layers)),
    "factorised": (replace(CONFIG, embed=0), multiplied),
}


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    items = item_table(rng.normal(size=(40, WIDTH)), rng.random(40) < 0.8)
    rows = rng.integers(0, 40, (2, 9)).astype(np.int32)
    blueprint = Blueprint(CONFIG, VOCAB, WIDTH)
    drawn = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), blueprint.shapes())
    return blueprint, drawn, items, rows + VOCAB.levels[0].offset, rows


def seen(blueprint, params, world):
    """Losses, states of whole rows, and logits after a prefix that is read in two parts."""
    _, _, items, tokens, rows = world
    model = blueprint.bind(params)
    hidden = model.hidden(tokens, rows, causal(tokens.shape, COUNTS), items)
    told = (np.roll(tokens, -1, 1), np.ones(tokens.shape, np.float32), np.zeros(tokens.shape, np.int32))
    losses = cross_entropy(model, hidden, *told, 1, items)
    prefix = prefill(model, items, tokens[:, :5], rows[:, :5], np.array([5, 5]), room=4)
    prefix = append(model, items, prefix, tokens[:, 5:], rows[:, 5:], COUNTS - 5)
    logits = [model.logits(state, 1, items)[:, :40] for state in (hidden[[0, 1], COUNTS - 1], prefix.hidden)]
    return losses.loss, hidden[:, :7], *logits


@pytest.mark.parametrize("kind", PLAIN)
def test_it_computes_what_the_plain_model_computes(world, kind):
    blueprint, params = world[:2]
    config, plainly = PLAIN[kind]
    ours = seen(blueprint, params, world)
    theirs = seen(replace(blueprint, config=config), plainly(params), world)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    np.testing.assert_allclose(ours[2], ours[3], atol=1e-4)


def test_a_gradient_of_shared_layers_is_the_sum_over_their_copies(world):
    blueprint, params = world[:2]
    config, plainly = PLAIN["shared"]

    def loss(params, blueprint):
        return seen(blueprint, params, world)[0].sum()

    one = jax.grad(loss)(params, blueprint)
    many = jax.grad(loss)(plainly(params), replace(blueprint, config=config))
    for name, g in one["block"].items():
        assert g.shape[0] == 1
        np.testing.assert_allclose(g[0], many["block"][name].sum(0), atol=1e-4, err_msg=name)


def test_parameters_are_those_of_one_layer_and_narrow_tables(world):
    blueprint = world[0]
    D, E, layer = 16, 6, 16 * 16 * 2 + 2 * 16 * 8 + 3 * 16 * 32 + 2 * 16
    assert blueprint.parameters() == layer + E * (256 + 128) + E * D + WIDTH * E + D
    other = replace(blueprint, config=replace(CONFIG, shared_layers=False))
    assert other.parameters() - blueprint.parameters() == (CONFIG.layers - 1) * layer


def test_fresh_states_and_logits_are_as_large_as_those_of_the_plain_model():
    """Tables and projection are drawn so that their product has the spread of plain tables."""
    vocab = Vocab(5000, (40,))
    for embed in (0, 16):
        blueprint = Blueprint(replace(CONFIG, width=128, embed=embed, content=False), vocab, 1)
        embeddings = blueprint.init(0)["embeddings"]
        table = embeddings["tables"]["text"] @ embeddings["projection"] if embed else embeddings["tables"]["text"]
        assert 0.7 < float(table.std() * 128**0.5) < 0.95  # a normal cut at two deviations has .88


def test_int8_layers_that_are_shared_stay_near(world):
    blueprint, params = world[:2]
    _, full, *_ = seen(blueprint, params, world)
    _, int8, *_ = seen(blueprint, kept_as(params, "int8"), world)
    assert 0 < float(jnp.abs(full - int8).max()) < 0.1


def test_a_llama_gets_the_layers_copied_and_the_tables_multiplied(world):
    blueprint, params, items, tokens, rows = world
    described, tensors = llama(blueprint, params, 64, [items])
    theirs = forward(described, tensors, tokens[0])
    model = blueprint.bind(params)
    hidden = model.hidden(tokens, rows, causal(tokens.shape, np.array([9, 9])), items)
    s = VOCAB.levels[0]
    np.testing.assert_allclose(
        model.logits(hidden[0], 1, items)[:, :40], theirs[:, s.offset : s.offset + 40], atol=1e-3
    )


def test_wider_tables_than_the_model_are_refused():
    with pytest.raises(InputError, match=r"model.embed=128 is more than model.width=64"):
        ModelConfig(embed=128)
