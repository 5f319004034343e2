"""Options: normalised over those of their own task, asked for at the end of a candidate that is read left to right."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec_jax.artifacts.run import option_spans
from m6rec_jax.config import ModelConfig
from m6rec_jax.data.examples import text_example
from m6rec_jax.data.packing import pack_row
from m6rec_jax.model.export import llama
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.objectives import objectives
from m6rec_jax.objectives.loss import cross_entropy
from m6rec_jax.vocab import BOS, END_SOURCE, END_TARGET, SOURCE, TARGET, Vocab

VOCAB = Vocab(170, (30,), options=(2, 5, 3))
BLUEPRINT = Blueprint(
    ModelConfig(layers=2, width=16, heads=2, dropout=0.0, embed_dropout=0.0, id_dropout=0.0), VOCAB, 5
)
ITEMS = jax.tree.map(jnp.asarray, item_table(np.random.default_rng(0).normal(size=(30, 5)), np.ones(30, bool)))
ROWS = {0: slice(0, 2), 1: slice(2, 7), 2: slice(7, 10)}


def asked(seed=0):
    """Hidden states [4, 12], an option of a random task each, as token ids, and the tasks."""
    rng = np.random.default_rng(seed)
    tasks = rng.integers(0, 3, (4, 12)).astype(np.int32)
    labels = (rng.random((4, 12)) * np.array(VOCAB.options)[tasks]).astype(int)
    targets = np.vectorize(VOCAB.option)(tasks, labels).astype(np.int32)
    return jnp.asarray(rng.normal(size=(4, 12, 16)), jnp.float32), targets, tasks, labels


def loss_of(params, hidden, targets, tasks, **options):
    model, targets, tasks = BLUEPRINT.bind(params), jnp.asarray(targets), jnp.asarray(tasks)
    return cross_entropy(model, hidden, targets, jnp.ones(targets.shape), tasks, 3, ITEMS, **options).loss


@pytest.mark.parametrize("chunk", [7, 1024])
def test_the_loss_is_a_softmax_over_the_rows_of_the_task(chunk):
    params = BLUEPRINT.init(0)
    hidden, targets, tasks, labels = asked()

    def slow(params):
        table, made = params["embeddings"]["tables"]["options"], []
        for task, rows in ROWS.items():
            logp = jax.nn.log_softmax(hidden @ table[rows].T)
            of_label = jnp.take_along_axis(logp, np.minimum(labels, rows.stop - rows.start - 1)[..., None], -1)[..., 0]
            made.append(-jnp.sum(jnp.where(tasks == task, of_label, 0)))
        return jnp.stack(made)

    fast = lambda p: loss_of(p, hidden, targets, tasks, chunk=chunk)  # noqa: E731
    both = jax.jit(lambda p: [jax.vjp(f, p)[0:1] + jax.vjp(f, p)[1](jnp.ones(3)) for f in (fast, slow)])
    (loss, gradient), (wanted, of_wanted) = both(params)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, of_wanted)


def test_no_gradient_reaches_the_options_of_other_tasks_and_nothing_is_smoothed_or_sampled():
    params = BLUEPRINT.init(0)
    hidden, targets, tasks, _ = asked()
    targets = np.where(tasks == 1, targets, VOCAB.option(1, 0)).astype(np.int32)
    of = lambda p: loss_of(p, hidden, targets, tasks * 0, key=jax.random.key(1), smoothing=0.3, negatives=1)  # noqa: E731
    table = jax.jit(jax.grad(lambda p: of(p).sum()))(params)["embeddings"]["tables"]["options"]
    touched = np.flatnonzero(np.abs(np.asarray(table)).sum(1))
    assert touched.tolist() == list(range(2, 7))
    plain = jax.jit(lambda p: loss_of(p, hidden, targets, tasks * 0))
    np.testing.assert_allclose(jax.jit(of)(params), plain(params), rtol=1e-6)


def test_without_options_a_model_is_what_it_was():
    plain, with_options = replace(BLUEPRINT, vocab=Vocab(170, (30,))), BLUEPRINT
    assert set(plain.shapes()["embeddings"]["tables"]) == {"text", "level1"}
    assert "vectors" not in plain.shapes()
    params = with_options.init(0)
    served = with_options.domain_params(params, 0)
    assert (
        jax.tree.structure(served)
        == jax.tree.structure(plain.shapes())
        == jax.tree.structure(with_options.domain(0).shapes())
    )
    again = with_options.with_domain(params, 0, served)
    assert jax.tree.structure(again) == jax.tree.structure(params)


def test_a_domain_has_the_options_of_its_own_tasks():
    vocab = Vocab(170, (30,), options=(2, 3)).joined(Vocab(170, (8, 8), options=(4,)))
    joint = Blueprint(replace(BLUEPRINT.config, content=False), vocab, 5, (4,))
    params = jax.device_get(joint.init(0))
    spans = option_spans([[{"options": "ab"}, {"options": []}, {"options": "abc"}], [{"options": "abcd"}]])
    assert spans == [slice(0, 2), slice(2, 3)]
    table = params["embeddings"]["tables"]["options"]
    for number, rows in enumerate((slice(0, 5), slice(5, 9))):
        own, blueprint = joint.domain_params(params, number, spans[number]), joint.domain(number, spans[number])
        jax.tree.map(lambda x, like: like.shape == x.shape or pytest.fail(), own, blueprint.shapes())
        np.testing.assert_array_equal(own["embeddings"]["tables"]["options"][: rows.stop - rows.start], table[rows])
        assert blueprint.vocab.options == vocab.options[spans[number]]
        back = joint.with_domain(params, number, joint.domain_params(params, number))
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_llama_keeps_the_options_as_its_last_rows():
    params = jax.device_get(BLUEPRINT.init(0))
    described, tensors = llama(BLUEPRINT, params, 64, [ITEMS])
    rows = tensors["model.embed_tokens.weight"]
    assert described["vocab_size"] == VOCAB.size == len(rows)
    np.testing.assert_array_equal(rows[VOCAB.option(0, 0) :], params["embeddings"]["tables"]["options"])


def prompt(source, candidate):
    return np.array([BOS, SOURCE, *source, END_SOURCE, TARGET, *candidate, END_TARGET], np.int32)


TEXT = st.lists(st.integers(140, 169), min_size=1, max_size=9)


@given(TEXT, TEXT)
def test_the_source_sees_itself_and_the_candidate_all_before_it(source, candidate):
    tokens = prompt(source, candidate)
    made = objectives()["scoring"].arrange(
        text_example(tokens, np.array([999], np.int32)), np.random.default_rng(0), 0.3
    )
    opens = len(source) + 3
    assert made.tokens.tolist() == tokens.tolist()
    assert made.order.tolist() == [0] * opens + list(range(1, len(candidate) + 3))
    assert np.flatnonzero(made.weights).tolist() == [len(tokens) - 1]
    assert made.targets[-1] == 999


def test_a_gradient_from_the_candidate_reaches_no_later_token_and_one_from_the_source_reaches_all_of_it():
    tokens = prompt([140, 150, 160], [141, 151, 161])
    sequence = objectives()["scoring"].arrange(
        text_example(tokens, np.array([999], np.int32)), np.random.default_rng(0), 0.3
    )
    row = {name: x[None] for name, x in pack_row([(sequence, 0)], 16).items()}
    from m6rec_jax.model.transformer import View

    view = View(row["positions"], row["k_start"], row["k_end"])
    params = BLUEPRINT.init(0)

    def state(at, table):
        changed = {
            **params,
            "embeddings": {**params["embeddings"], "tables": {**params["embeddings"]["tables"], "text": table}},
        }
        return BLUEPRINT.bind(changed).hidden(row["tokens"], row["item_rows"], view, ITEMS)[0, at].sum()

    text = params["embeddings"]["tables"]["text"]
    gradients = jax.jit(jax.jacrev(lambda x: jnp.stack([state(at, x) for at in (1, 8)])))(text)
    reached = [{t for t in tokens if np.abs(gradient[t]).sum() > 0} for gradient in np.asarray(gradients)]
    assert reached[0] == {BOS, SOURCE, 140, 150, 160, END_SOURCE}
    assert reached[1] == {BOS, SOURCE, 140, 150, 160, END_SOURCE, TARGET, 141, 151}
