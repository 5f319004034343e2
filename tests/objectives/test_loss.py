"""Chunked cross-entropy against the plain one, and what it leaves out."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.config import ModelConfig
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.objectives.loss import cross_entropy
from m6rec_jax.vocab import Vocab

CODEBOOKS = {"atomic": (30,), "levels": (8, 8, 8)}


def world(codebooks, content=True):
    rng = np.random.default_rng(1)
    vocab = Vocab(170, codebooks)
    blueprint = Blueprint(ModelConfig(layers=1, width=16, heads=2, content=content, id_dropout=0.5), vocab, 5)
    items = item_table(rng.normal(size=(30, 5)), rng.random(30) < 0.7)
    slices = rng.integers(0, len(vocab.slices), (4, 12))
    offsets, sizes = (np.array([getattr(s, name) for s in vocab.slices]) for name in ("offset", "size"))
    targets = (offsets[slices] + rng.integers(0, sizes[slices])).astype(np.int32)
    weights = (rng.random((4, 12)) < 0.7).astype(np.float32) * rng.choice([0.3, 1.0], (4, 12)).astype(np.float32)
    tasks = rng.integers(0, 3, (4, 12)).astype(np.int32)
    hidden = jnp.asarray(rng.normal(size=(4, 12, 16)), jnp.float32)
    return blueprint, blueprint.init(0), items, hidden, targets, weights, tasks


def slow(blueprint, params, items, hidden, targets, weights, tasks, smoothing=0.0):
    """A loss sum a task with every table in full."""
    model, total = blueprint.bind(params), 0.0
    for i, s in enumerate(blueprint.vocab.slices):
        scores, local = model.logits(hidden, i, items), targets - s.offset
        here = (local >= 0) & (local < s.padded)
        local = jnp.where(here, local, 0)
        if i == 1 and len(blueprint.vocab.levels) == 1 and blueprint.config.content:
            is_target = jnp.arange(s.padded) == local[..., None]
            scores = jnp.where(items.seen | is_target, scores, -jnp.inf)
        logs = jax.nn.log_softmax(scores)
        nll = -jnp.take_along_axis(logs, local[..., None], -1)[..., 0]
        if smoothing:
            allowed = logs > -1e20
            mean = jnp.sum(jnp.where(allowed, logs, 0), -1) / jnp.sum(allowed, -1)
            nll = (1 - smoothing) * nll - smoothing * mean
        total = total + jnp.where(here, nll, 0) * weights
    return jnp.stack([jnp.sum(jnp.where(tasks == t, total, 0)) for t in range(3)])


@pytest.mark.parametrize("codebooks", CODEBOOKS.values(), ids=CODEBOOKS)
@pytest.mark.parametrize(("chunk", "smoothing"), [(5, 0.0), (1024, 0.0), (8, 0.3)])
def test_equals_the_plain_loss_with_its_gradient(codebooks, chunk, smoothing):
    blueprint, params, items, hidden, targets, weights, tasks = world(codebooks)
    blueprint = replace(blueprint, config=replace(blueprint.config, id_dropout=0.0))
    key = jax.random.key(0) if smoothing else None

    def fast(params, hidden):
        out = cross_entropy(
            blueprint.bind(params), hidden, targets, weights, tasks, 3, items, key, smoothing, chunk=chunk
        )
        return out.loss.sum(), out

    wanted_loss = lambda p, h: slow(blueprint, p, items, h, targets, weights, tasks, smoothing)  # noqa: E731
    reference = lambda p, h: wanted_loss(p, h).sum()  # noqa: E731
    (_, out), gradients = jax.value_and_grad(fast, (0, 1), has_aux=True)(params, hidden)
    np.testing.assert_allclose(out.loss, wanted_loss(params, hidden), rtol=1e-5)
    np.testing.assert_allclose(out.weight, [weights[tasks == t].sum() for t in range(3)], rtol=1e-6)
    wanted = jax.grad(reference, (0, 1))(params, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients, wanted)


def test_a_table_without_spare_rows_in_bfloat16():
    """Gradients of states and rows near those in float32; of the logits the backward pass keeps one number a position."""
    blueprint = Blueprint(ModelConfig(layers=1, width=16, heads=2, content=False), Vocab(256, (8,)), 1)
    params, items = blueprint.init(0), item_table(np.zeros((8, 1)), np.ones(8, bool))
    hidden, target = jax.random.normal(jax.random.key(1), (2, 32, 16)), jnp.arange(64).reshape(2, 32) % 50 + 100

    def loss(hidden, params):
        model, ones = blueprint.bind(params), jnp.ones(target.shape)
        return cross_entropy(model, hidden, target, ones, target * 0, 1, items, chunk=16).loss[0]

    assert blueprint.vocab.text.size == blueprint.vocab.text.padded
    of = lambda dtype: jax.grad(loss, (0, 1))(hidden.astype(dtype), params)  # noqa: E731
    (near, near_params), (exact, exact_params) = of(jnp.bfloat16), of(jnp.float32)
    text = lambda params: params["embeddings"]["tables"]["text"]  # noqa: E731
    for got, wanted in ((near, exact), (text(near_params), text(exact_params))):
        assert jnp.linalg.norm(got.astype(jnp.float32) - wanted) < 0.02 * jnp.linalg.norm(wanted)
    _, back = jax.vjp(lambda h: loss(h, params), hidden.astype(jnp.bfloat16))
    assert max(x.size for x in jax.tree.leaves(back)) < 64 * 256


def test_a_sample_of_wrong_answers_stands_for_all_of_them():
    """Mean over many draws: near the loss over the whole slice, and so its gradient; without a key nothing is drawn."""
    blueprint, params, items, hidden, *_ = world(CODEBOOKS["atomic"])
    level = blueprint.vocab.levels[0]
    blueprint = replace(blueprint, config=replace(blueprint.config, id_dropout=0.0))
    items, hidden = jax.tree.map(jnp.asarray, items), 0.3 * hidden  # even odds suit a flat distribution
    target = level.offset + np.random.default_rng(2).choice(np.flatnonzero(items.seen[:30]), (4, 12))
    target, ones = jnp.asarray(target, jnp.int32), jnp.ones((4, 12))

    def loss(params, key, negatives):
        model = blueprint.bind(params)
        return cross_entropy(model, hidden, target, ones, target * 0, 1, items, key, negatives=negatives).loss[0] / 48

    whole, gradient = jax.value_and_grad(loss)(params, None, 12)
    assert whole == loss(params, None, 0)
    keys = jax.random.split(jax.random.key(3), 400)
    sampled, gradients = jax.lax.map(lambda key: jax.value_and_grad(loss)(params, key, 12), keys)
    assert jnp.std(sampled) > 0
    np.testing.assert_allclose(sampled.mean(), whole, rtol=0.03)
    of = lambda g: g["embeddings"]["tables"]["level1"][:30]  # noqa: E731
    near = jax.tree.map(lambda g: g.mean(0), gradients)
    assert jnp.linalg.norm(of(near) - of(gradient)) < 0.15 * jnp.linalg.norm(of(gradient))


def test_unseen_items_are_no_negatives_unless_they_are_the_target():
    blueprint, params, items, hidden, *_ = world(CODEBOOKS["atomic"])
    unseen = np.flatnonzero(~items.seen[:30])
    level = blueprint.vocab.levels[0]
    target = np.full((4, 12), level.offset + unseen[0], np.int32)

    def loss(content):
        ones = np.ones((4, 12), np.float32)
        table = items._replace(content=content)
        return cross_entropy(blueprint.bind(params), hidden, target, ones, target * 0, 1, table).loss.sum()

    gradient = np.asarray(jax.grad(loss)(jnp.asarray(items.content)))
    assert (gradient[unseen[1:]] == 0).all()
    assert (gradient[unseen[0]] != 0).any()


def test_never_holds_all_logits():
    """No array of the compiled program has as many elements as tokens x vocabulary."""
    vocab = Vocab(3000, (4000,))
    blueprint = Blueprint(ModelConfig(layers=1, width=16, heads=2), vocab, 4)
    items = item_table(np.zeros((4000, 4)), np.ones(4000, bool))
    shape = (16, 512)

    def loss(params, hidden, targets, weights):
        return cross_entropy(
            blueprint.bind(params), hidden, targets, weights, targets * 0, 1, items, chunk=256
        ).loss.sum()

    args = (blueprint.shapes(), jax.ShapeDtypeStruct((*shape, 16), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32),
            jax.ShapeDtypeStruct(shape, jnp.float32))  # fmt: skip
    memory = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile().memory_analysis()
    all_logits = 16 * 512 * 4096 * 4
    assert memory.temp_size_in_bytes < all_logits / 2
