"""Retrieval: two segments that do not see each other, and a contrastive loss equal to a slow one."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.config import ModelConfig
from m6rec_jax.data.examples import Example, Shift, text_example
from m6rec_jax.data.packing import pack_row
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.objectives import objectives
from m6rec_jax.objectives.contrast import TEMPERATURE, Pairs, contrastive, pairs_of
from m6rec_jax.objectives.retrieval import OWN
from m6rec_jax.training.step import slice_losses
from m6rec_jax.vocab import BOS, CONTROL_SYMBOLS, END_SOURCE, END_TARGET, SOURCE, SPECIALS, TARGET, UNK, Vocab

QUIET = {"dropout": 0.0, "embed_dropout": 0.0, "id_dropout": 0.0}
BLUEPRINT = Blueprint(ModelConfig(layers=1, width=16, heads=2, vectors=8, **QUIET), Vocab(170, (30,)), 5)
ITEMS = jax.tree.map(jnp.asarray, item_table(np.random.default_rng(0).normal(size=(30, 5)), np.ones(30, bool)))
PAIRS = Pairs((1, 2), 4)
CONTROLS = {BOS, *(SPECIALS[name] for name in CONTROL_SYMBOLS)}


def pair(query, said, item=-1, times=1, own=()):
    source = np.array([BOS, SOURCE, *query, END_SOURCE], np.int32)
    target = np.array([BOS, TARGET, *said, END_TARGET], np.int32)
    return replace(text_example(source, target), item=item, times=times, own=own)


def arranged(example: Example):
    return objectives()["retrieval"].arrange(example, np.random.default_rng(0), 0.3)


def world(seed=0, rows=3):
    """Packed rows of pairs of two retrieval tasks (1, 2) and of texts (0), and the pairs of each row in order."""
    rng, packed, pairs = np.random.default_rng(seed), [], []
    text = lambda n: rng.integers(140, 170, n)  # noqa: E731
    for _ in range(rows):
        sequences, mine = [], []
        for _ in range(3):
            own = tuple(rng.integers(0, 6, 4).tolist())
            words = rng.integers(140, rng.choice([150, 170]), 6)  # ids below 150 are control symbols
            example = pair(words, [UNK, *text(3), 256 + 7], int(rng.integers(0, 6)), int(rng.integers(1, 50)), own)
            task = int(rng.integers(1, 3))
            mine.append((example, task))
            sequences.append((arranged(example), task))
        words = objectives()["causal"].arrange(text_example(np.array([BOS]), text(5)), rng, 0.3)
        sequences.insert(int(rng.integers(0, 4)), (words, 0))
        packed.append(pack_row(sequences, 64))
        pairs.append(mine)
    return {name: jnp.stack([row[name] for row in packed]) for name in packed[0]}, pairs


def mean(states, tokens):
    """Of the states of a segment those of tokens that say something, or of all where none does."""
    said = [state for state, token in zip(states, tokens.tolist(), strict=True) if token not in CONTROLS]
    return sum(said or list(states)) / len(said or states)


def slow(params, hidden, batch, pairs):
    """A loss sum a task, pair by pair."""
    found = []
    for row, mine in enumerate(pairs):
        tokens, segments, tasks = (np.asarray(batch[name])[row] for name in ("tokens", "segment_ids", "task_ids"))
        numbers = sorted(set(segments[tasks > 0].tolist()) - {0})
        states = [mean(hidden[row][segments == i], tokens[segments == i]) for i in numbers]
        for (example, task), query, item in zip(mine, states[::2], states[1::2], strict=True):
            vectors = [x @ params["vectors"][name] for name, x in (("query", query), ("item", item))]
            found.append((*(x / jnp.linalg.norm(x) for x in vectors), example, task))
    loss = [0.0, 0.0, 0.0]
    for i, (query, said, mine, task) in enumerate(found):
        score = lambda item, other, query=query: query @ item / TEMPERATURE - np.log(other.times)  # noqa: E731
        wrong = [
            score(item, other)
            for j, (_, item, other, its) in enumerate(found)
            if i != j and task == its and other.item != mine.item and other.item not in mine.own
        ]
        right = score(said, mine)
        loss[task] += jax.nn.logsumexp(jnp.stack([right, *wrong])) - right
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in loss])


def fast(params, hidden, batch, pairs=PAIRS):
    of = [batch[name] for name in ("tokens", "targets", "loss_weights", "task_ids", "segment_ids")]
    return contrastive(BLUEPRINT.bind(params), hidden, *of, 3, pairs)


@pytest.fixture(scope="module")
def states():
    params, rng = BLUEPRINT.init(0), np.random.default_rng(6)  # projections are alike at first, and told apart here
    params["vectors"]["item"] = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
    return params, jnp.asarray(np.random.default_rng(5).normal(size=(3, 64, 16)), jnp.float32)


def test_equals_a_loss_taken_pair_by_pair_with_its_gradient(states):
    params, hidden = states
    batch, pairs = world()
    of = jax.jit(
        lambda p, h: jax.value_and_grad(lambda *a: ((made := fast(*a, batch)).loss.sum(), made), (0, 1), has_aux=True)(
            p, h
        )
    )
    (_, made), gradients = of(params, hidden)
    wanted, of_wanted = jax.jit(
        lambda p, h: (slow(p, h, batch, pairs), jax.grad(lambda *a: slow(*a, batch, pairs).sum(), (0, 1))(p, h))
    )(params, hidden)
    np.testing.assert_allclose(made.loss, wanted, rtol=1e-5)
    assert wanted[1] > 0 and wanted[2] > 0
    assert made.weight.tolist() == [0, *(sum(task == t for mine in pairs for _, task in mine) for t in (1, 2))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradients, of_wanted)


def test_projections_are_alike_at_first_and_two():
    query, item = (BLUEPRINT.init(3)["vectors"][name] for name in ("query", "item"))
    np.testing.assert_array_equal(query, item)
    assert query.unsafe_buffer_pointer() != item.unsafe_buffer_pointer()  # a step may take both for its own
    assert np.std(query) > 0.1


def test_a_vector_is_made_of_what_a_segment_says_wherever_it_lies(states):
    """Control symbols count where nothing else is said; neighbours, places in the row and padding never do."""
    params, _ = states
    rng = np.random.default_rng(1)
    kept = [pair([150, 151], [160], 0), pair([], [161, 162], 1), pair([153], [], 2)]
    own = {token: rng.normal(size=16) for token in range(300)}  # a state of each token's own

    def loss(order, length, change=()):
        row = pack_row([(arranged(kept[i]), 1) for i in order], length)
        hidden = np.array([({**own, **dict(change)})[token] for token in row["tokens"].tolist()], np.float32)
        return float(fast(params, jnp.asarray(hidden)[None], {n: jnp.asarray(x[None]) for n, x in row.items()}).loss[1])

    plain = loss((0, 1, 2), 32)
    assert loss((2, 0, 1), 64, {0: own[9]}) == pytest.approx(plain, rel=1e-5)
    for token in (151, 162, BOS, END_SOURCE, TARGET):
        assert loss((0, 1, 2), 32, {token: own[200]}) != pytest.approx(plain, rel=1e-3)
    kept[1], kept[2] = pair([152], [161, 162], 1), pair([153], [163], 2)
    plain = loss((0, 1, 2), 32)
    for token in (BOS, SOURCE, END_SOURCE, TARGET, END_TARGET):
        assert loss((0, 1, 2), 32, {token: own[200]}) == pytest.approx(plain, rel=1e-6)


def test_vectors_are_of_what_went_in_of_last_states_a_part_and_tokens_count_as_salience_says():
    params, rng = BLUEPRINT.init(0), np.random.default_rng(2)
    tokens, rows = jnp.asarray(rng.integers(150, 160, (2, 9))), jnp.full((2, 9), -1)
    hidden = jnp.asarray(rng.normal(size=(2, 9, 16)), jnp.float32)

    def meant(depth, salience):
        own = params | {"vectors": params["vectors"] | {"depth": jnp.full(1, depth), "salience": salience}}
        return BLUEPRINT.bind(own).meant(hidden, tokens, rows, ITEMS)

    nothing, along = jnp.zeros(16), jnp.asarray(rng.normal(size=16), jnp.float32) / 2
    inner = np.asarray(params["embeddings"]["tables"]["text"])[tokens]
    inner = inner / np.sqrt((inner**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(meant(0.0, nothing), inner, atol=1e-3)
    np.testing.assert_allclose(meant(0.3, nothing), inner + 0.3 * hidden, atol=1e-3)
    counts = np.exp(4 * np.tanh(inner @ along / 4))
    np.testing.assert_allclose(meant(0.3, along), (inner + 0.3 * hidden) * counts[..., None], rtol=2e-2, atol=1e-3)
    assert counts.max() > 2 * counts.min()
    fresh = BLUEPRINT.bind(params).meant(hidden, tokens, rows, ITEMS)
    np.testing.assert_allclose(fresh, inner + 0.2 * hidden, atol=1e-3)


def test_training_makes_vectors_of_what_serving_makes_them_of():
    """Depth and salience get gradients of the loss of retrieval."""
    batch, _ = world()
    of = lambda p: slice_losses(BLUEPRINT, 3, p, batch, ITEMS, pairs=PAIRS).loss[1]  # noqa: E731
    gradients = jax.jit(jax.grad(of))(BLUEPRINT.init(1))["vectors"]
    assert all(np.abs(gradients[name]).min() > 0 for name in ("depth", "salience"))


def alone(states, *changes):
    """The loss of the first of three pairs in one row, of which each has other changes."""
    params, hidden = states
    kept = [pair([150, 151, 152, 153], [160 + i], i, **change) for i, change in enumerate(changes)]
    row = pack_row([(arranged(example), 1) for example in kept], 64)
    return float(fast(params, hidden[:1], {name: jnp.asarray(x[None]) for name, x in row.items()}).loss[1])


def test_what_is_the_users_own_or_the_same_item_is_no_wrong_answer_and_what_is_frequent_counts_less(states):
    plain = alone(states, {}, {}, {})
    own = alone(states, {"own": (1, 2)}, {"own": (0, 2)}, {"own": (0, 1)})
    assert plain > 0.1 and own == pytest.approx(0, abs=1e-6)  # nobody has a wrong answer left
    params, hidden = states
    same = pack_row([(arranged(pair([150], [160], 7)), 1) for _ in range(3)], 64)
    assert fast(params, hidden[:1], {n: jnp.asarray(x[None]) for n, x in same.items()}).loss[1] == pytest.approx(
        0, abs=1e-6
    )
    nameless = pack_row([(arranged(pair([150], [160])), 1) for _ in range(3)], 64)
    assert fast(params, hidden[:1], {n: jnp.asarray(x[None]) for n, x in nameless.items()}).loss[1] > 0.1
    assert alone(states, {"times": 1000}, {}, {}) != pytest.approx(plain)
    assert alone(states, {"times": 9}, {"times": 9}, {"times": 9}) == pytest.approx(plain, rel=1e-5)


def test_a_pair_lies_in_two_segments_that_do_not_see_each_other():
    text = objectives()["causal"].arrange(
        text_example(np.array([BOS]), np.array([140, 141])), np.random.default_rng(0), 0.3
    )
    made = arranged(pair([150, 151], [160, 161], 3, 20, (5, 4)))
    row = pack_row([(text, 0), (made, 1), (text, 0)], 24)
    assert row["segment_ids"].tolist() == [1] * 2 + [2] * 5 + [3] * 5 + [4] * 2 + [0] * 10
    assert row["positions"][:14].tolist() == [0, 1, *range(5), *range(5), 0, 1]
    assert row["k_start"][:14].tolist() == [0] * 2 + [2] * 5 + [7] * 5 + [12] * 2
    assert row["k_end"][:14].tolist() == [1, 2] + [7] * 5 + [8, 9, 10, 11, 12] + [13, 14]
    assert made.targets.tolist() == [0, 0, 5, 6, 20, 0, 0, 0, 0, 4]
    assert Shift(100, 50, 30, 200, 60).moved(made).targets.tolist() == made.targets.tolist()
    assert np.flatnonzero(made.weights).tolist() == [4]


def test_more_items_of_ones_own_than_there_is_room_for_are_forgotten_from_the_last():
    made = arranged(pair(range(140, 160), [160], 1, 1, tuple(range(100))))
    assert made.targets[:22][::-1].tolist() == list(range(1, 23))
    made = arranged(pair([140] * 99, [160], 1, 1, tuple(range(100))))
    assert (made.targets[:101] > 0).sum() == OWN


def test_a_batch_of_texts_and_pairs_has_the_losses_of_both():
    """Pairs are no tokens to the cross-entropy, texts no pairs to the contrast."""
    batch, pairs = world(1)
    params = BLUEPRINT.init(0)
    together = jax.jit(lambda p: slice_losses(BLUEPRINT, 3, p, batch, ITEMS, pairs=PAIRS))(params)
    texts = {**batch, "loss_weights": jnp.where(batch["task_ids"] == 0, batch["loss_weights"], 0)}
    of_texts = jax.jit(lambda p: slice_losses(BLUEPRINT, 3, p, texts, ITEMS))(params)
    assert together.loss[0] == pytest.approx(float(of_texts.loss[0]), rel=1e-6)
    assert together.weight.tolist() == [3 * 5, *(sum(t == task for mine in pairs for _, t in mine) for task in (1, 2))]


def test_a_row_has_room_for_as_many_pairs_as_the_shortest_allow():
    sizes = lambda tokens, draws, facts: (tokens - 4, tokens * 0 + 4)  # noqa: E731
    pool = lambda name, tokens: SimpleNamespace(  # noqa: E731
        objective=objectives()[name], task=SimpleNamespace(sizes=sizes), records=tokens, tokens=tokens, facts=None
    )
    pools = [
        pool("causal", np.array([3])),
        pool("retrieval", np.array([40, 21, 64])),
        pool("retrieval", np.zeros(0, int)),
    ]
    assert pairs_of(pools, 64, 0.3) == Pairs((1, 2), 3)
    assert pairs_of(pools[:1], 64, 0.3) is None
