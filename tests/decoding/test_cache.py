"""A prefix that grew is the prefix of the longer history."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from m6rec_jax.decoding import cache
from m6rec_jax.decoding.cache import check_causal
from m6rec_jax.vocab import BOS


@partial(jax.jit, static_argnames=("define", "room"))
def _prefill(define, params, *args, room):
    return cache.prefill(nnx.merge(define, params), *args, room=room)


def prefill(model, *args, room=0):
    return _prefill(*nnx.split(model), *args, room=room)


@partial(jax.jit, static_argnames="define")
def _append(define, params, *args):
    return cache.append(nnx.merge(define, params), *args)


def append(model, *args):
    return _append(*nnx.split(model), *args)


def prompts(w, lengths, T):
    """Spelled histories of these lengths in tokens, padded to T."""
    rng = np.random.default_rng(sum(lengths))
    tokens = np.zeros((len(lengths), T), np.int32)
    rows = np.full((len(lengths), T), -1, np.int32)
    for i, n in enumerate(lengths):
        [(t, r)] = w.engine.prompts([rng.integers(w.engine.catalogue, size=T)])
        tokens[i, :n], rows[i, :n] = t[:n], r[:n]
    assert (tokens[:, 0] == BOS).all()
    return tokens, rows, np.array(lengths, np.int32)


def test_appending_equals_recompute(any_world):
    w, items = any_world, any_world.engine.items
    start, end = [1, 10, 4, 20], [9, 10, 12, 25]
    tokens, rows, _ = prompts(w, end, 40)
    grown = np.array(end) - start
    new = np.zeros((4, grown.max()), np.int32)
    new_rows = np.full_like(new, -1)
    for i, (a, b) in enumerate(zip(start, end, strict=True)):
        new[i, : b - a], new_rows[i, : b - a] = tokens[i, a:b], rows[i, a:b]
    short = prefill(w.model, items, tokens[:, :20], rows[:, :20], np.array(start), room=10)
    longer = append(w.model, items, short, new, new_rows, grown)
    whole = prefill(w.model, items, tokens, rows, np.array(end))
    assert longer.lengths.tolist() == end
    np.testing.assert_allclose(longer.hidden, whole.hidden, atol=1e-4)
    for i, n in enumerate(end):
        assert longer.tokens[i, :n].tolist() == tokens[i, :n].tolist()
        assert longer.item_rows[i, :n].tolist() == rows[i, :n].tolist()
        for ours, theirs in zip(longer.kv, whole.kv, strict=True):
            np.testing.assert_allclose(ours[:, i, :, :n], theirs[:, i, :, :n], atol=1e-4)


def test_token_by_token_equals_all_at_once(deep):
    items = deep.engine.items
    tokens, rows, lengths = prompts(deep, [12, 9], 12)
    prefix = prefill(deep.model, items, tokens[:, :1], rows[:, :1], np.ones(2, np.int32), room=11)
    for t in range(1, 12):
        prefix = append(deep.model, items, prefix, tokens[:, [t]], rows[:, [t]], (t < lengths).astype(np.int32))
    whole = prefill(deep.model, items, tokens, rows, lengths)
    np.testing.assert_allclose(prefix.hidden, whole.hidden, atol=1e-4)
    assert prefix.lengths.tolist() == lengths.tolist()


def test_padding_changes_nothing(any_world):
    w, items = any_world, any_world.engine.items
    tokens, rows, lengths = prompts(w, [5, 11], 11)
    wide = np.pad(tokens, ((0, 0), (0, 20)), constant_values=7), np.pad(rows, ((0, 0), (0, 20)), constant_values=3)
    a, b = prefill(w.model, items, tokens, rows, lengths), prefill(w.model, items, *wide, lengths)
    np.testing.assert_allclose(a.hidden, b.hidden, atol=1e-5)


def test_a_prefix_that_sees_later_tokens_says_that_it_cannot_grow(deep):
    tokens, rows, lengths = prompts(deep, [5], 11)
    prefix = prefill(deep.model, deep.engine.items, tokens, rows, lengths)
    check_causal(prefix)
    with pytest.raises(ValueError, match="not causal"):
        check_causal(replace(prefix, causal=False))
