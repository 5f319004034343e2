"""Products of layers in eight bits: near those in full, in eight bits indeed, and only while training."""

from __future__ import annotations

import importlib.util
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.config import ModelConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.quantised_products import check_quantise, quantised_product
from m6rec_jax.model.transformer import causal
from m6rec_jax.vocab import Vocab

pytest.importorskip("qwix")
# How far a product may be from the one in full, of its norm: half a step of eight bits on both sides, and some.
NEAR = {"int8": 0.02, "fp8": 0.06}
TYPES = {"int8": "i8[", "fp8": "f8_e4m3fn["}


def far(got, wanted):
    return float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))


@pytest.mark.parametrize("subscripts", ["btd,df->btf", "btkgh,kghd->btd"])
@pytest.mark.parametrize("kind", NEAR)
def test_near_the_product_in_full_with_its_gradients(kind, subscripts):
    shapes = {"btd,df->btf": ((2, 7, 32), (32, 24)), "btkgh,kghd->btd": ((2, 7, 2, 2, 8), (2, 2, 8, 24))}[subscripts]
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    x = x.at[0, 0].multiply(1000.0)  # a row of its own scale costs the others nothing
    full, back = jax.vjp(lambda x, w: jnp.einsum(subscripts, x, w), x, w)
    got, own_back = jax.vjp(lambda x, w: quantised_product(subscripts, kind, None, x, w), x, w)
    g = jnp.cos(jnp.arange(full.size, dtype=jnp.float32)).reshape(full.shape)
    for row in ((0, 0), (1, 3)):
        assert 0 < far(got[row], full[row]) < NEAR[kind]
    (dx, dw), (own_dx, own_dw) = back(g), own_back(g)
    assert 0 < far(own_dx, dx) < 2 * NEAR[kind]
    np.testing.assert_allclose(own_dw, dw, rtol=1e-5, atol=1e-4)  # that of the weight is not rounded
    text = str(jax.make_jaxpr(lambda x, w: quantised_product(subscripts, kind, None, x, w))(x, w))
    assert text.count(TYPES[kind]) >= 2


@cache
def trained(quantise):
    """Losses of some steps of descent on one batch, and states without a key, as what is served is made."""
    config = ModelConfig(layers=1, width=32, heads=2, content=False, quantise=quantise).__dict__
    config = ModelConfig(**config | dict.fromkeys(("dropout", "embed_dropout", "id_dropout"), 0.0))
    blueprint, items = Blueprint(config, Vocab(132, (8,)), 1), item_table(np.zeros((8, 1)), np.ones(8, bool))
    tokens, view = jax.random.randint(jax.random.key(0), (4, 16), 100, 132), causal((4, 16), jnp.full(4, 16))

    def loss(params, key):
        model = blueprint.bind(params)
        hidden = model.hidden(tokens, tokens * 0 - 1, view, items, key)
        logs = jax.nn.log_softmax(model.logits(hidden, 0, items))
        return -jnp.mean(jnp.take_along_axis(logs[:, :-1], tokens[:, 1:, None], -1)), hidden

    step, params, found = jax.jit(jax.value_and_grad(loss, has_aux=True)), blueprint.init(0), []
    served = loss(params, None)[1]
    for _ in range(20):
        (value, _), gradients = step(params, jax.random.key(0))
        found.append(float(value))
        params = jax.tree.map(lambda p, g: p - 0.2 * g, params, gradients)
    return np.array(found), served


@pytest.mark.parametrize("kind", NEAR)
def test_training_is_rounded_and_learns_alike_and_serving_is_not_rounded(kind):
    (full, served), (rounded, served_too) = trained("none"), trained(kind)
    assert rounded[-1] < 0.1 * rounded[0]
    assert (rounded != full).all()
    np.testing.assert_allclose(rounded[:5], full[:5], rtol=0.01)  # later on, paths of steps as large as these part
    np.testing.assert_array_equal(served, served_too)


def test_what_it_cannot_do_is_refused(monkeypatch):
    with pytest.raises(InputError, match="model.quantise=int4: must be one of none, int8, fp8"):
        ModelConfig(quantise="int4")
    with pytest.raises(InputError, match="model.quantise=int8 and model.experts=4"):
        ModelConfig(quantise="int8", experts=4)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_quantise("none")
    with pytest.raises(
        InputError, match=r"model.quantise=fp8 needs the package qwix: pip install 'm6rec-jax\[quant\]'"
    ):
        check_quantise("fp8")
