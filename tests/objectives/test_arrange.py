"""What each objective asks of an example: properties that hold for every draw."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec_jax.data.examples import Example, text_example
from m6rec_jax.objectives import objectives
from m6rec_jax.vocab import EOS, FILL, MASK, N_SPANS, SPAN_0

KNOWN = objectives()
TEXT = st.lists(st.integers(300, 900), min_size=2, max_size=200).map(lambda x: np.array(x, np.int32))
RATE = st.floats(0.05, 0.9)


@given(TEXT, RATE, st.integers(0, 99), st.sampled_from(sorted(KNOWN)))
def test_planned_length_is_the_length(text, rate, seed, name):
    source = np.zeros(0, np.int32) if name == "infill" else np.array([2], np.int32)
    objective = KNOWN[name]
    made = objective.arrange(text_example(source, text), np.random.default_rng(seed), rate)
    sizes = np.array([len(source)]), np.array([len(text)])
    assert len(made.tokens) == objective.length(*sizes, rate)[0]
    assert (made.weights > 0).sum() == objective.predicted(*sizes, rate)[0]
    assert (np.diff(made.order) >= 0).all()
    assert {len(x) for x in (made.targets, made.order, made.weights, made.item_rows)} == {len(made.tokens)}


@given(TEXT, RATE, st.integers(0, 99))
def test_infill_puts_the_text_together_again(text, rate, seed):
    made = KNOWN["infill"].arrange(text_example(np.zeros(0, np.int32), text), np.random.default_rng(seed), rate)
    marker = int(np.flatnonzero(made.tokens == FILL)[0])
    source, target = made.tokens[:marker], made.targets[marker:]
    assert target[-1] == EOS
    spans, current = {}, None
    for token in target[:-1]:
        if SPAN_0 <= token < SPAN_0 + N_SPANS:
            current = spans.setdefault(int(token), [])
        else:
            current.append(int(token))
    restored = [t for token in source for t in (spans[int(token)] if int(token) in spans else [int(token)])]
    assert restored == text.tolist()
    assert (made.weights[:marker] == 0).all()
    assert (made.weights[marker:] == 1).all()


@given(TEXT, RATE, st.integers(0, 99))
def test_masked_hides_what_it_asks_and_asks_what_it_hides(text, rate, seed):
    made = KNOWN["masked"].arrange(text_example(np.array([2], np.int32), text), np.random.default_rng(seed), rate)
    hidden = made.tokens == MASK
    assert (hidden == (made.weights > 0)).all()
    assert (made.targets[1:][hidden[1:]] == text[hidden[1:]]).all()
    assert (made.tokens[1:][~hidden[1:]] == text[~hidden[1:]]).all()
    assert (made.order == 0).all()


def events(kinds_of_token):
    """A history where 'c' is context, 'i' a code that completes item 7, and 'g' one that is not to be predicted."""
    n = len(kinds_of_token)
    is_item = np.array([k == "i" for k in kinds_of_token])
    tokens = np.arange(1000, 1000 + n, dtype=np.int32)
    rows = np.where([k in "ig" for k in kinds_of_token], 7, -1).astype(np.int32)
    none = np.array([-1], np.int32)
    return Example(np.array([2], np.int32), none, tokens, rows, is_item.astype(np.float32), np.arange(n))


@pytest.mark.parametrize(
    "history, asks",
    [
        ("iii", {0: 1000, 1: 1001, 2: 1002}),
        # Before a pause (c): the event before it and the pause both ask for the item after it.
        ("ici", {0: 1000, 1: 1002, 2: 1002}),
        # A long query: the event before it and its last token ask, its inside does not.
        ("iccci", {0: 1000, 1: 1004, 4: 1004}),
        # Context with nothing after it asks nothing.
        ("iic", {0: 1000, 1: 1001}),
        # Items that are given (g), as before a held-out target: only what stands right before the target asks for it.
        ("gggi", {3: 1003}),
        ("ggci", {3: 1003}),
    ],
)
def test_next_item_steps_over_context(history, asks):
    made = KNOWN["causal"].arrange(events(history), np.random.default_rng(0), 0.3)
    found = {i: int(t) for i, (t, w) in enumerate(zip(made.targets, made.weights, strict=True)) if w > 0}
    assert found == asks


@given(st.integers(0, 99))
def test_masking_takes_an_item_with_its_whole_spelling_and_its_features(seed):
    units = np.repeat(np.arange(6), 3)
    rows = np.tile([-1, -1, 4], 6).astype(np.int32)
    tokens = np.arange(1000, 1018, dtype=np.int32)
    empty = np.zeros(0, np.int32)
    example = Example(empty, empty, tokens, rows, np.ones(18, np.float32), units)
    made = KNOWN["masked"].arrange(example, np.random.default_rng(seed), 0.3)
    hidden = (made.tokens == MASK).reshape(6, 3)
    assert (hidden.all(1) == hidden.any(1)).all()
    assert hidden.any()
    assert (made.item_rows[made.tokens == MASK] == -1).all()
