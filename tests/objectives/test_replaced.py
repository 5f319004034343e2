"""Replaced tokens: what the generator writes and where, what the model is asked, and whose gradient goes where."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec_jax.config import ModelConfig, ReplacedConfig
from m6rec_jax.data.examples import Example, text_example
from m6rec_jax.data.packing import pack_row
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import Transformer, View
from m6rec_jax.objectives import generator, objectives
from m6rec_jax.objectives.detection import BINS, SPAN, Detection
from m6rec_jax.objectives.generator import Replacing, draw, generator_of, numbers, rewritten
from m6rec_jax.training.beside import Beside
from m6rec_jax.training.step import slice_losses
from m6rec_jax.vocab import BOS, MASK, SPECIALS, Vocab, gap_token

ATOMIC, SPELLED = Vocab(len(SPECIALS) + 20, (30,)), Vocab(len(SPECIALS) + 20, (8, 8, 8))
CONFIG = ModelConfig(layers=1, width=16, heads=2, dropout=0, embed_dropout=0, id_dropout=0)
SEEN = np.arange(30) % 5 > 0
ITEMS = jax.tree.map(jnp.asarray, item_table(np.random.default_rng(0).normal(size=(30, 4)), SEEN))
GAP = gap_token(90_000)
LENGTH, TASKS = 48, 3
KNOWN = objectives()


def history(vocab, rng, n):
    """`n` items that somebody has used, a pause before each, whose first may not be asked about."""
    codes = rng.choice(np.flatnonzero(SEEN), n)[:, None] if len(vocab.codebooks) == 1 else rng.integers(8, size=(n, 3))
    spelled, levels = vocab.spell(codes), codes.shape[1]
    rows = np.full((n, levels + 1), -1)
    rows[:, -1] = codes[:, 0] if levels == 1 else rng.integers(30, size=n)
    tokens = np.concatenate([np.full((n, 1), GAP), spelled], axis=1)
    predict = np.repeat([[0.0] + [1.0] * levels], n, axis=0)
    predict[0] = 0
    none = np.full(1, -1, np.int32)
    events = np.repeat(np.arange(n), levels + 1)
    flat = lambda x, kind: x.reshape(-1).astype(kind)  # noqa: E731
    return Example(np.array([BOS], np.int32), none, flat(tokens, np.int32), flat(rows, np.int32), flat(predict, np.float32), events)  # fmt: skip


def text(rng, n):
    return text_example(np.zeros(0, np.int32), rng.integers(len(SPECIALS), len(SPECIALS) + 20, n).astype(np.int32))


def batch_of(vocab, seed=0, rows=4, changed=None):
    """Rows of a history to be found out (task 0), one read left to right (1), and a text to be found out (2).

    `changed`: of which of the three another one stands there, as long and hidden at the same places.
    """
    made = []
    for row in range(rows):
        sequences = []
        for task in range(TASKS):
            rng = np.random.default_rng([seed, row, task, task == changed])
            example = text(rng, 9) if task == 2 else history(vocab, rng, 5 if task else 4)
            name = "causal" if task == 1 else "replaced"
            sequences.append((KNOWN[name].arrange(example, np.random.default_rng([row, task]), 0.4), task))
        made.append(pack_row(sequences, 2 * LENGTH))
    return {name: jnp.asarray(np.stack([row[name] for row in made])) for name in made[0]}


def replacing(vocab, **settings):
    config = ReplacedConfig(width=12, **settings)
    return Replacing(generator_of(Blueprint(replace(CONFIG, heads=1), vocab, 4), config), config, (0, 2), (1,), 0.5)


def beside_of(how, seed=1):
    gain = jax.random.normal(jax.random.key(seed), (16,))
    return Beside({"generator": how.generator.init(seed), "head": {"gain": gain, "bias": jnp.array(0.3)}}, {}, jnp.array(-0.9))  # fmt: skip


@partial(jax.jit, static_argnums=0)
def wrote(how, params, batch, key):
    return rewritten(how, params["generator"], batch, ITEMS, key)


@partial(jax.jit, static_argnums=(0, 1))
def losses_of(how, vocab, params, beside, batch, key):
    return slice_losses(Blueprint(CONFIG, vocab, 4), TASKS, params, batch, ITEMS, key, replacing=how, beside=beside)


@settings(max_examples=40)
@given(st.integers(0, 999), st.floats(0.05, 0.9), st.integers(2, 8), st.sampled_from([ATOMIC, SPELLED]))
def test_a_layout_says_what_stood_everywhere_and_masks_whole_items_that_are_asked_about(seed, rate, n, vocab):
    example = history(vocab, np.random.default_rng(seed), n)
    made = KNOWN["replaced"].arrange(example, np.random.default_rng(seed), rate)
    whole = np.concatenate([example.source, example.target])
    hidden = made.tokens == MASK
    np.testing.assert_array_equal(made.targets, whole)
    np.testing.assert_array_equal(made.tokens[~hidden], whole[~hidden])
    np.testing.assert_array_equal(made.weights[1:], example.predict)
    assert (made.weights[hidden] > 0).all() and (made.item_rows[hidden] == -1).all() and (made.order == 0).all()
    events = example.units[hidden[1:]]
    assert len(np.unique(events)) == min(n - 1, max(1, round((n - 1) * rate)))
    assert len(events) == len(np.unique(events)) * len(vocab.codebooks)


@pytest.mark.parametrize("vocab", [ATOMIC, SPELLED], ids=["one level", "three levels"])
def test_what_is_written_stays_in_its_slice_and_nothing_else_is_touched(vocab):
    how, batch = replacing(vocab), batch_of(vocab)
    given = {name: np.asarray(x) for name, x in batch.items()}
    asked = np.isin(given["task_ids"], how.tasks) & (given["segment_ids"] > 0)
    hidden = asked & (given["tokens"] == MASK)
    for seed in range(5):
        made, written = wrote(how, beside_of(how, seed).params, batch, jax.random.key(seed))
        made = {name: np.asarray(x) for name, x in made.items()}
        np.testing.assert_array_equal(written.hidden, hidden)
        now = made["tokens"]
        np.testing.assert_array_equal(now[~hidden], given["tokens"][~hidden])
        np.testing.assert_array_equal(vocab.slice_index(now[hidden]), vocab.slice_index(given["targets"][hidden]))
        for s in vocab.slices:
            here = now[hidden & (now >= s.offset) & (now < s.end)] - s.offset
            assert (here < s.size).all()
            assert s.name != "text" or (here >= len(SPECIALS)).all()
            assert not s.atomic or SEEN[here].all()
        item = asked & (now >= ATOMIC.levels[0].offset) & (vocab is ATOMIC)
        rows = np.where(item, now - vocab.levels[0].offset, np.where(asked, -1, given["item_rows"]))
        np.testing.assert_array_equal(made["item_rows"], rows)
        for name in set(batch) - {"tokens", "item_rows"}:
            np.testing.assert_array_equal(made[name], given[name])


def test_tokens_are_drawn_as_often_as_the_generator_thinks_them_likely(monkeypatch):
    monkeypatch.setattr(generator, "CHUNK", 512)
    model: Transformer = replacing(ATOMIC).generator.bind(beside_of(replacing(ATOMIC), 3).params["generator"])
    shape = (64, 128)
    state = 2.0 * jax.random.normal(jax.random.key(5), (12,))
    for number, s in enumerate(ATOMIC.slices):
        original = jnp.full(shape, s.offset + 7)
        made = jax.jit(draw, static_argnums=0)(
            Static(model), jnp.broadcast_to(state, (*shape, 12)), original, jnp.ones(shape, bool), numbers(shape), ITEMS,
            jax.random.key(1),
        )  # fmt: skip
        allowed = np.arange(s.padded) < s.size
        allowed &= np.pad(SEEN, (0, s.padded - 30)) if s.atomic else np.arange(s.padded) >= len(SPECIALS)
        logits = np.where(allowed, np.asarray(model.logits(state, number, ITEMS)), -np.inf)
        wanted = np.asarray(jax.nn.softmax(logits))
        found = np.bincount(np.asarray(made).reshape(-1) - s.offset, minlength=s.padded) / made.size
        assert np.abs(found - wanted).max() < 0.02 and np.abs(found - wanted).sum() < 0.08
        assert wanted.max() > 0.1  # not so even that any way to draw would do


class Static:
    """A model as an argument that jit takes for itself."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)


def slow(logit, replaced, asked):
    """The loss a position at a time, and how many pairs of a token that stood there and one that did not are told apart."""
    loss = right = pairs = wins = 0.0
    places = np.clip((logit + SPAN) / (2 * SPAN) * BINS, 0, BINS - 1).astype(int)
    for at in np.argwhere(asked > 0):
        b, t = at
        p = 1 / (1 + np.exp(-np.float64(logit[b, t])))
        loss -= asked[b, t] * np.log(p if replaced[b, t] else 1 - p)
        right += (logit[b, t] > 0) == replaced[b, t]
    for i in places[(asked > 0) & replaced]:
        for j in places[(asked > 0) & ~replaced]:
            pairs, wins = pairs + 1, wins + (1.0 if i > j else 0.5 if i == j else 0.0)
    return loss, right / (asked > 0).sum(), wins / pairs


@pytest.mark.parametrize("vocab", [ATOMIC, SPELLED], ids=["one level", "three levels"])
def test_labels_loss_and_figures_are_those_of_a_slow_reference(vocab):
    how, batch = replacing(vocab, reward=0.5), batch_of(vocab, rows=12)
    beside, blueprint = beside_of(how), Blueprint(CONFIG, vocab, 4)
    params, key = blueprint.init(0), jax.random.key(4)
    found = losses_of(how, vocab, params, beside, batch, key)
    made, written = wrote(how, beside.params, batch, jax.random.fold_in(key, 2))
    asked = np.where(np.isin(batch["task_ids"], how.tasks), batch["loss_weights"], 0)
    replaced = np.asarray(made["tokens"] != batch["targets"]) & (asked > 0)  # the same token again is no replaced one
    assert 0 < replaced.sum() < np.asarray(written.hidden).sum()
    view = View(made["positions"], made["k_start"], made["k_end"])
    hidden = blueprint.bind(params).hidden(made["tokens"], made["item_rows"], view, ITEMS)
    logit = np.asarray(hidden @ beside.params["head"]["gain"] + 0.3)
    loss, accuracy, auc = slow(logit, replaced, asked)
    means = found.detection.means()
    np.testing.assert_allclose(found.detection.loss, loss, rtol=1e-4)
    np.testing.assert_allclose(found.loss[0] + found.loss[2], loss, rtol=1e-4)
    np.testing.assert_array_equal(found.weight, [(np.asarray(batch["loss_weights"])[np.asarray(batch["task_ids"]) == t]).sum() for t in range(3)])  # fmt: skip
    np.testing.assert_allclose(means["detection/accuracy"], accuracy, rtol=1e-6)
    np.testing.assert_allclose(means["detection/auc"], auc, rtol=1e-6)
    np.testing.assert_allclose(means["detection/replaced"], replaced.sum() / (asked > 0).sum(), rtol=1e-6)
    np.testing.assert_allclose(means["detection/original"], -np.log1p(np.exp(logit[replaced])).mean(), rtol=1e-4)


def test_no_gradient_goes_from_detection_to_the_generator_or_from_the_generator_to_the_model():
    how, batch = replacing(ATOMIC, reward=0.5), batch_of(ATOMIC)
    params, beside = Blueprint(CONFIG, ATOMIC, 4).init(0), beside_of(how)

    @jax.jit
    def gradients(params, others):
        def of(name, params, others):
            made = losses_of(how, ATOMIC, params, beside._replace(params=others), batch, jax.random.key(0))
            return getattr(made.detection, name)

        return [jax.grad(partial(of, name), argnums=(0, 1))(params, others) for name in ("loss", "generator")]

    (model, others), (model_too, others_too) = gradients(params, beside.params)
    size = lambda tree: sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tree))  # noqa: E731
    assert size(others["generator"]) == size(model_too) == size(others_too["head"]) == 0
    assert min(size(model["block"]), size(others["head"]), size(others_too["generator"]["block"])) > 0


def test_a_segment_learns_and_is_written_without_sight_of_its_neighbours():
    how, key = replacing(ATOMIC), jax.random.key(2)
    batch, beside = batch_of(ATOMIC), beside_of(replacing(ATOMIC))
    _, before = wrote(how, beside.params, batch, key)
    for changed in (0, 1):
        other = batch_of(ATOMIC, changed=changed)
        assert (other["tokens"] != batch["tokens"]).any() and (other["segment_ids"] == batch["segment_ids"]).all()
        _, after = wrote(how, beside.params, other, key)
        rest = np.asarray((batch["task_ids"] != changed) & (batch["segment_ids"] > 0))
        np.testing.assert_array_equal(np.asarray(after.tokens)[rest], np.asarray(before.tokens)[rest])
        np.testing.assert_allclose(np.asarray(after.states)[rest], np.asarray(before.states)[rest], atol=1e-5)


def test_the_reward_is_the_policy_gradient_of_being_taken_for_real():
    """REINFORCE by hand: the sum over replaced positions of (log p(original) - baseline) x the gradient of -log p(written)."""
    how, batch, key = replacing(ATOMIC, reward=0.7), batch_of(ATOMIC), jax.random.key(4)
    plain = replace(how, config=replace(how.config, reward=0.0))
    params, beside = Blueprint(CONFIG, ATOMIC, 4).init(0), beside_of(how)

    @partial(jax.jit, static_argnums=0)
    def gradient(how, of):
        run = lambda of: losses_of(how, ATOMIC, params, beside._replace(params={**beside.params, "generator": of}), batch, key)  # noqa: E731  # fmt: skip
        return jax.grad(lambda of: run(of).detection.generator)(of)

    of = beside.params["generator"]
    made, written = wrote(how, beside.params, batch, jax.random.fold_in(key, 2))
    asked = jnp.isin(batch["task_ids"], jnp.array(how.tasks)) & (batch["loss_weights"] > 0)
    replaced = asked & (made["tokens"] != batch["targets"])
    view = View(made["positions"], made["k_start"], made["k_end"])
    hidden = Blueprint(CONFIG, ATOMIC, 4).bind(params).hidden(made["tokens"], made["item_rows"], view, ITEMS)
    gained = jax.nn.log_sigmoid(-(hidden @ beside.params["head"]["gain"] + 0.3)) - beside.baseline
    assert (gained[replaced] > 0).any() and (gained[replaced] < 0).any()

    @jax.jit
    def by_hand(of):
        model = how.generator.bind(of)
        read = jnp.where(written.hidden, MASK, batch["tokens"]), jnp.where(written.hidden, -1, batch["item_rows"])
        states, total = model.hidden(*read, view, ITEMS), 0.0
        for number, s in enumerate(ATOMIC.slices):
            logits = model.logits(states, number, ITEMS)
            logits = jnp.where(jnp.pad(SEEN, (0, s.padded - 30)), logits, -1e30) if s.atomic else logits
            inside = replaced & (written.tokens >= s.offset) & (written.tokens < s.end)
            taken = jnp.clip(written.tokens - s.offset, 0, s.padded - 1)[..., None]
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), taken, axis=-1)[..., 0]
            total += jnp.sum(jnp.where(inside, gained * nll, 0))
        return total

    more = jax.tree.map(lambda a, b: (a - b) / 0.7, gradient(how, of), gradient(plain, of))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), more, jax.grad(by_hand)(of))


def test_rewritten_histories_keep_their_targets_and_tell_nothing_of_what_comes():
    how, key, batch = replacing(ATOMIC, augment=1.0), jax.random.key(6), batch_of(ATOMIC)
    beside = beside_of(how)
    made, written = wrote(how, beside.params, batch, key)
    causal = np.asarray(batch["task_ids"] == 1)
    item = causal & np.asarray(batch["tokens"] >= ATOMIC.text.end)
    changed = causal & np.asarray(written.hidden)
    assert 0.2 < changed.sum() / item.sum() < 0.8 and not (changed & ~item).any()
    np.testing.assert_array_equal(np.asarray(made["item_rows"])[changed], np.asarray(made["tokens"])[changed] - ATOMIC.text.end)  # fmt: skip
    np.testing.assert_array_equal(made["targets"], batch["targets"])
    for at in np.flatnonzero(causal[0])[2::2]:  # what comes at `at` and later is another history
        later = causal & (np.arange(2 * LENGTH) >= at)
        other = {**batch, "tokens": jnp.where(later & item, ATOMIC.text.end + 1, batch["tokens"])}
        again = wrote(how, beside.params, other, key)[0]["tokens"]
        np.testing.assert_array_equal(np.asarray(again)[~later], np.asarray(made["tokens"])[~later])
    some = replace(how, config=replace(how.config, augment=0.5), rate=1.0)
    hit = np.asarray(wrote(some, beside.params, batch, key)[1].hidden) & causal
    taken = hit.any(axis=1)  # whole histories are taken or left
    np.testing.assert_array_equal(hit, item & taken[:, None])
    assert 0 < taken.sum() < len(taken)
    none = wrote(replacing(ATOMIC), beside.params, batch, key)[1]
    assert not (np.asarray(none.hidden) & causal).any()


def test_area_under_the_curve_counts_equals_half():
    zeros = dict.fromkeys(Detection._fields, 0.0)
    logits = np.zeros((2, BINS))
    logits[:, 3] = 2, 4
    assert Detection(**zeros | {"logits": logits}).means()["detection/auc"] == 0.5
    logits[1, 3], logits[1, 9] = 0, 4
    assert Detection(**zeros | {"logits": logits}).means()["detection/auc"] == 1.0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ReplacedConfig(weight=0), "replaced.weight=0: must be above 0"),
        (lambda: ReplacedConfig(reward=-1.0), "replaced.reward=-1.0: must be at least 0"),
        (lambda: ReplacedConfig(augment=1.5), "replaced.augment=1.5: must lie between 0 and 1"),
        (lambda: generator_of(Blueprint(CONFIG, ATOMIC, 4), ReplacedConfig(width=6)), "replaced.width=6: the generator has model.heads=2"),
        (lambda: generator_of(Blueprint(replace(CONFIG, heads=8), ATOMIC, 4), ReplacedConfig()), "half of model.width: 8.*multiple of 16"),
    ],
)  # fmt: skip
def test_settings_that_make_no_generator_are_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()
