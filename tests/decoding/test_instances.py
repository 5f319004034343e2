"""Answers to instances: what training would call right, whatever else is asked at the same time."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.artifacts.checkpoints import load_params
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.domains import joint_pools, open_domains
from m6rec_jax.data.instances import read_instances
from m6rec_jax.data.instances.layout import Laid
from m6rec_jax.data.packing import pack_row
from m6rec_jax.data.tasks import Piece
from m6rec_jax.decoding import instances as programs
from m6rec_jax.decoding import nearest as search
from m6rec_jax.decoding.instances import InstanceScorer
from m6rec_jax.decoding.nearest import nearest
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import View
from m6rec_jax.objectives.contrast import pairs_of
from m6rec_jax.training.step import slice_losses
from m6rec_jax.vocab import BOS, END_SOURCE, END_TARGET, SOURCE, TARGET
from tests.fixtures import tiny_root  # noqa: F401
from tests.planted import CONFIG, planted, planted_run  # noqa: F401


@pytest.fixture(scope="module")
def scorer(planted_run):  # noqa: F811
    return InstanceScorer.load(planted_run)


@pytest.fixture(scope="module")
def dataset(planted):  # noqa: F811
    return open_dataset(planted)


@pytest.fixture(scope="module")
def trained(planted_run):  # noqa: F811
    record = read_run(planted_run)
    blueprint = Blueprint(record.config.model, record.vocab, record.content_width)
    return blueprint, load_params(planted_run, "best", blueprint.shapes())[1]


def rows_of_training(dataset, task, split="valid"):
    """Every instance of a task as training would read it, one a row: arrays [n, T], and the task's objective."""
    [domain] = open_domains([dataset.path])
    config = replace(CONFIG, mixture=replace(CONFIG.mixture, tasks={task: 1.0}))
    [pool] = joint_pools([domain], config.mixture, split, config.data)
    made = []
    for record in dataset.records(split).take(pool.records):
        example = pool.task.build(record, Piece(pool.stretch, 0, 0.5), pool.facts)
        made.append(pack_row([(pool.objective.arrange(example, np.random.default_rng(0), 0.3), 0)], CONFIG.data.length))
    return {name: np.stack([row[name] for row in made]) for name in made[0]}, pool


@pytest.mark.parametrize("task", ["click", "topic"])
def test_chances_are_what_the_loss_of_training_is_made_of(dataset, scorer, trained, task):
    blueprint, params = trained
    rows, _ = rows_of_training(dataset, task)
    rows["task_ids"] = np.broadcast_to(np.arange(len(rows["tokens"]))[:, None], rows["tokens"].shape)
    instances = read_instances(dataset, task, "valid")
    losses = jax.jit(lambda p, b: slice_losses(blueprint, len(instances), p, b, scorer.items).loss)(params, rows)
    chances = scorer.chances(instances)
    assert chances.shape == (len(instances), len(instances.about["options"]))
    np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        -np.log(chances[np.arange(len(instances)), instances.labels]), losses, rtol=2e-3, atol=2e-5
    )


def test_an_answer_does_not_hang_on_what_else_is_asked(dataset, scorer):
    instances = read_instances(dataset, "click", "test")
    order = np.random.default_rng(0).permutation(len(instances))
    together = scorer.chances(instances)
    np.testing.assert_allclose(scorer.chances(instances.take(order)), together[order], rtol=1e-4)
    np.testing.assert_allclose(scorer.chances(instances.take([3])), together[[3]], rtol=1e-4)
    assert scorer.chances(instances.take([])).shape == (0, 2)


def test_another_checkpoint_compiles_nothing(dataset, scorer, trained):
    instances = read_instances(dataset, "click", "test").take(range(8))
    before = scorer.chances(instances)
    compiled = programs._option_logits._cache_size()
    scorer.params = jax.tree.map(lambda x: x * 0.5, trained[1])
    assert not np.allclose(scorer.chances(instances), before, atol=1e-3)
    scorer.params = trained[1]
    np.testing.assert_array_equal(scorer.chances(instances), before)
    assert programs._option_logits._cache_size() == compiled


def test_likelihood_is_the_mean_of_what_each_token_is_worth_after_those_before_it(scorer, trained):
    blueprint, params = trained
    rng = np.random.default_rng(0)
    none = lambda n: np.full(n, -1, np.int32)  # noqa: E731
    laid = []
    for n, m in ((4, 1), (9, 7), (3, 20)):
        source, target = (rng.integers(400, 600, k).astype(np.int32) for k in (n, m))
        laid.append(Laid(source, none(n), target, none(m), none(0).reshape(0, 2)))
    found, many = scorer.likelihood(laid)
    assert many.tolist() == [1, 7, 20]
    model = blueprint.bind(params)
    for one, value in zip(laid, found, strict=True):
        tokens = np.concatenate([one.source, one.target])[None]
        at = np.arange(tokens.shape[1])[None]
        states = model.hidden(tokens, np.full_like(tokens, -1), View(at, at * 0, at + 1), scorer.items)
        logp = jax.nn.log_softmax(model.logits(states, 0, scorer.items))[0]
        said = [float(logp[i - 1, tokens[0, i]]) for i in range(len(one.source), tokens.shape[1])]
        assert value == pytest.approx(np.mean(said), rel=1e-4)


def test_vectors_are_those_of_training(dataset, scorer, trained):
    """The contrastive loss of all rows together, from the vectors alone."""
    blueprint, params = trained
    rows, pool = rows_of_training(dataset, "retrieval")
    pairs = pairs_of([pool], CONFIG.data.length, 0.3)
    made = jax.jit(lambda p, b: slice_losses(blueprint, 1, p, b, scorer.items, pairs=pairs))(params, rows)
    instances = read_instances(dataset, "retrieval", "valid")
    laid = instances.laid_out(scorer.length)
    queries, items = scorer.queries(laid), scorer.item_vectors(laid)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, rtol=1e-4)
    ids = instances.fields["item_id"].to_numpy()
    train = read_instances(dataset, "retrieval", "train").fields["item_id"].to_list()
    drawn = np.log([max(train.count(i), 1) for i in ids])
    scores = queries @ items.T / 0.07 - drawn
    wrong = (ids[:, None] != ids) | np.eye(len(ids), dtype=bool)
    loss = jax.nn.logsumexp(jnp.where(wrong, scores, -jnp.inf), axis=1) - np.diag(scores)
    assert made.weight[0] == len(ids)
    assert made.loss[0] == pytest.approx(float(loss.sum()), rel=2e-5)


def test_a_vector_is_the_mean_over_what_is_said_whatever_else_is_asked(scorer, trained):
    """Of padded batches, one by one without padding."""
    blueprint, params = trained
    rng = np.random.default_rng(0)
    laid = []
    for n, m in ((4, 1), (19, 7), (0, 20), (3, 0)):
        source = np.array([BOS, SOURCE, *rng.integers(400, 600, n), END_SOURCE], np.int32)
        target = np.array([BOS, TARGET, *rng.integers(400, 600, m), END_TARGET], np.int32)
        none = [np.full(len(x), -1, np.int32) for x in (source, target)]
        laid.append(Laid(source, none[0], target, none[1], np.zeros((0, 2), np.int32)))
    queries, items = scorer.queries(laid), scorer.item_vectors(laid)
    model = blueprint.bind(params)
    for i, one in enumerate(laid):
        for side, tokens, found in (("query", one.source, queries[i]), ("item", one.target, items[i])):
            at = np.arange(len(tokens))[None]
            ends = np.full_like(at, len(tokens)) if side == "query" else at + 1
            told = tokens[None], np.full_like(at, -1)
            states = model.meant(model.hidden(*told, View(at, at * 0, ends), scorer.items), *told, scorer.items)[0]
            said = np.asarray(states)[tokens >= 400] if len(tokens) > 3 else np.asarray(states)
            wanted = said.mean(0) @ np.asarray(params["vectors"][side])
            np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted), atol=1e-5)


def test_what_was_not_learnt_is_refused_in_one_line(dataset, scorer):
    instances = read_instances(dataset, "click", "test")
    other = replace(instances, about=instances.about | {"options": ["yes", "no"]})
    with pytest.raises(InputError, match="task click: the run has learnt click, topic, retrieval and not this one"):
        scorer.chances(other)
    with pytest.raises(InputError, match="task retrieval: no options, of which click, topic"):
        scorer.option_chances("retrieval", [])
    plain = InstanceScorer.__new__(InstanceScorer)
    plain.blueprint = replace(scorer.blueprint, config=replace(scorer.blueprint.config, vectors=0))
    with pytest.raises(InputError, match="model.vectors=0"):
        plain.queries([])


@pytest.mark.parametrize("by", ["device", "faiss"])
def test_the_nearest_items_are_the_largest_products_in_order(monkeypatch, by):
    if by == "faiss":
        pytest.importorskip("faiss")
    monkeypatch.setattr(search, "BLOCK", 64)  # several blocks, the last one not full
    monkeypatch.setattr(search, "QUERIES", 16)
    rng = np.random.default_rng(0)
    queries, items = rng.normal(size=(37, 8)).astype(np.float32), rng.normal(size=(150, 8)).astype(np.float32)
    items[140] = items[3]  # equal products: the lower row first
    exclude = [rng.choice(150, n % 5, replace=False) for n in range(37)]
    products = (queries @ items.T).astype(np.float64)
    for excluded in (None, exclude):
        rows, scores = nearest(queries, items, 12, excluded, by)
        for u in range(37):
            left = [i for i in np.lexsort((np.arange(150), -products[u])) if excluded is None or i not in excluded[u]]
            assert rows[u].tolist() == left[:12] or np.allclose(products[u][rows[u]], products[u][left[:12]], rtol=1e-5)
            assert excluded is None or not set(rows[u]) & set(excluded[u].tolist())
            np.testing.assert_allclose(scores[u], products[u][left[:12]], rtol=1e-4, atol=1e-5)
    rows, scores = nearest(queries[:2], items[:3], 5, by=by)
    assert (rows[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()
    same, _ = nearest(np.ones((1, 8), np.float32), np.ones((70, 8), np.float32), 5, by="device")
    assert same.tolist() == [[0, 1, 2, 3, 4]]
    behind, scores = nearest(np.ones((1, 8), np.float32), -np.ones((70, 8), np.float32), 3)
    assert behind.tolist() == [[0, 1, 2]] and (scores == -8).all()  # spare rows would have 0
