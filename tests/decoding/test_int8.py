"""An engine with int8 weights answers as one in full with the same rounded weights, and swaps checkpoints like any."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m6rec_jax.decoding import programs
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.errors import InputError
from m6rec_jax.model import quantised
from m6rec_jax.model.quantised import dense, parameter_bytes
from tests.decoding.worlds import CATALOGUE, World, random_model, text_engine, world

pytest.importorskip("qwix")
K, BEAMS = 7, 6


def int8_engine(w: World, **more) -> Engine:
    content, seen = (np.asarray(x)[:CATALOGUE] for x in (w.engine.items.content, w.engine.items.seen))
    return Engine(w.model, w.engine.codes, content, seen, length=48, weights="int8", **more)


def multiplied_out(params: nnx.State) -> nnx.State:
    """The full weights that int8 ones stand for."""
    is_int8 = lambda x: hasattr(x, "qvalue") and not isinstance(x, nnx.Variable)  # noqa: E731
    return jax.tree.map(dense, params, is_leaf=is_int8)


@pytest.fixture(scope="module", params=[1, 3], ids=["L1", "L3"])
def pair(request) -> tuple[World, Engine]:
    w = world(request.param)
    return w, int8_engine(w)


@pytest.fixture
def rounded(pair) -> Iterator[Engine]:
    """The world's own engine, with the weights that the int8 ones stand for."""
    w, int8 = pair
    before = w.engine.params
    w.engine.params = multiplied_out(int8.params)
    yield w.engine
    w.engine.params = before


def test_the_device_holds_int8(pair):
    w, int8 = pair
    kinds = [x.dtype for x in jax.tree.leaves(int8.params) if x.size > 100]
    assert kinds.count(jnp.int8) == len([x for x in jax.tree.leaves(w.engine.params) if x.ndim > 1 and x.size > 100])
    assert parameter_bytes(int8.params) < 0.5 * parameter_bytes(w.engine.params)  # of width 16, a scale for 16 numbers
    assert w.engine.weights == "full" and all(x.dtype == jnp.float32 for x in jax.tree.leaves(w.engine.params))


def test_answers_are_those_of_the_rounded_weights(pair, rounded):
    w, int8 = pair
    options = {"k": K, "beams": BEAMS, "allowed": np.arange(CATALOGUE) % 4 != 0, "exclude": w.histories}
    a, b = int8.recommend(w.histories, **options), rounded.recommend(w.histories, **options)
    assert np.array_equal(a.rows, b.rows) and np.array_equal(a.exact, b.exact)
    np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4, atol=1e-4)
    rows = np.arange(CATALOGUE)
    np.testing.assert_allclose(int8.item_vectors(rows), rounded.item_vectors(rows), rtol=1e-5, atol=1e-5)


def test_known_users_are_read_on_as_strangers_are_read():
    w = world(1)
    int8, histories = int8_engine(w), w.histories[2:3]
    int8.recommend([histories[0][:-1]], users=["ann"], k=K, beams=BEAMS)
    warm = int8.recommend(histories, users=["ann"], k=K, beams=BEAMS)
    cold = int8.recommend(w.histories, k=K, beams=BEAMS).of(2)
    assert np.array_equal(warm.rows, cold.rows)
    np.testing.assert_allclose(warm.scores, cold.scores, rtol=1e-4, atol=1e-4)


def test_another_checkpoint_in_full_is_kept_as_int8_and_compiles_nothing(pair):
    w, int8 = pair
    before, swapped = int8.recommend(w.histories, k=K, beams=BEAMS), int8.params
    sizes = lambda: [p._cache_size() for p in (programs.read, programs.find, quantised._int8)]  # noqa: E731
    made = sizes()
    int8.params = nnx.state(random_model(np.random.default_rng(11), w.model.vocab))
    after = int8.recommend(w.histories, k=K, beams=BEAMS)
    assert sizes() == made
    assert (before.scores != after.scores).any()
    assert [x.dtype for x in jax.tree.leaves(int8.params)] == [x.dtype for x in jax.tree.leaves(swapped)]
    int8.params = swapped  # int8 already
    again = int8.recommend(w.histories, k=K, beams=BEAMS)
    assert np.array_equal(again.scores, before.scores) and sizes()[:2] == made[:2]


def test_texts_are_those_of_the_rounded_weights():
    full = text_engine(2)
    int8 = Engine(
        nnx.merge(full._define, full.params), full.codes, np.asarray(full.items.content)[:CATALOGUE],
        np.ones(CATALOGUE, bool), length=48, tokenizer=full.texts.desk.tokenizer, slots=2, weights="int8",
    )  # fmt: skip
    full.params = multiplied_out(int8.params)
    asked = {"most": 6, "temperature": 0.0}
    assert [t.tokens for t in int8.write(["red shoes", "小米"], **asked)] == [
        t.tokens for t in full.write(["red shoes", "小米"], **asked)
    ]


def test_an_engine_refuses_what_it_does_not_know():
    w = world(3)
    with pytest.raises(InputError, match="weights=fp4: unknown; one of full, int8"):
        Engine(w.model, w.engine.codes, np.zeros((CATALOGUE, 5)), np.ones(CATALOGUE, bool), weights="fp4")
