"""The sampler draws what its settings say, and the same for the same request."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.decoding.sampling import Sampling, draw, penalise
from m6rec_jax.model.transformer import causal
from m6rec_jax.vocab import BOS, EOS, SPECIALS
from tests.decoding.worlds import PIECES, world

PROMPTS = [[BOS], [BOS, 160, 161], [BOS, 170, 171, 172, 173, 174], [BOS, 155]]
MOST = 16
draw = jax.jit(draw)


def setting(n: int, temperature=1.0, top_k=0, top_p=1.0, seeds=None) -> Sampling:
    fill = lambda x, kind: np.full(n, x, kind)  # noqa: E731
    seeds = np.arange(n, dtype=np.uint32) if seeds is None else np.asarray(seeds, np.uint32)
    return Sampling(fill(temperature, np.float32), fill(top_k, np.int32), fill(top_p, np.float32), seeds, fill(9, np.int32), fill(1, np.float32))  # fmt: skip


def frequencies(logits: np.ndarray, **settings) -> np.ndarray:
    n = 20_000
    drawn = draw(np.tile(logits.astype(np.float32), (n, 1)), setting(n, **settings), np.zeros(n, np.int32))
    return np.bincount(np.asarray(drawn), minlength=len(logits)) / n


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def test_draws_follow_the_distribution():
    logits = np.array([0.3, -1.0, 2.0, 1.0, -30.0, 0.0])
    p = softmax(logits)
    np.testing.assert_allclose(frequencies(logits), p, atol=0.015)
    np.testing.assert_allclose(frequencies(logits, temperature=2.0), softmax(logits / 2), atol=0.015)
    best_two = np.where(p >= np.sort(p)[-2], p, 0)
    np.testing.assert_allclose(frequencies(logits, top_k=2), best_two / best_two.sum(), atol=0.015)
    best_three = np.where(p >= np.sort(p)[-3], p, 0)  # two make .77, three .88
    np.testing.assert_allclose(frequencies(logits, top_p=0.8), best_three / best_three.sum(), atol=0.015)
    for greedy in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}):
        assert frequencies(logits, **greedy)[2] == 1


def test_same_request_same_answer_in_any_company():
    engine = world(1).engine
    seeds = [5, 6, 7, 8]
    together = engine.write(PROMPTS, most=MOST, seeds=seeds)
    assert together == engine.write(PROMPTS, most=MOST, seeds=seeds)
    assert together == engine.write(PROMPTS[::-1], most=MOST, seeds=seeds[::-1])[::-1]
    for prompt, seed, text in zip(PROMPTS, seeds, together, strict=True):
        assert engine.write([prompt], most=MOST, seeds=seed) == [text]
    assert engine.write(PROMPTS, most=MOST, seeds=[1, 2, 3, 4]) != together
    assert len({tuple(text) for text in engine.write([PROMPTS[1]] * 4, most=MOST, seeds=[5, 5, 5, 5])}) == 1


def test_text_is_what_full_forwards_would_have_drawn():
    w = world(1)
    vocab = w.model.vocab.text
    may = (np.arange(vocab.padded) == EOS) | (np.arange(vocab.padded) >= len(SPECIALS))

    @jax.jit
    def forward(tokens, length):
        hidden = w.model.hidden(tokens, jnp.full_like(tokens, -1), causal(tokens.shape, length), w.engine.items)
        return jnp.where(may, w.model.logits(hidden[jnp.arange(1), length - 1], 0, w.engine.items), -jnp.inf)

    for temperature, prompt, seed in ((0.0, PROMPTS[1], 0), (1.0, PROMPTS[2], 3), (1.5, PROMPTS[0], 4)):
        [text] = w.engine.write([prompt], most=MOST, temperature=temperature, seeds=seed)
        tokens = list(prompt)
        for place in range(MOST):
            padded = np.zeros((1, 24), np.int32)
            padded[0, : len(tokens)] = tokens
            logits = forward(padded, np.array([len(tokens)]))
            token = int(draw(logits, setting(1, temperature, seeds=[seed]), np.array([place], np.int32))[0])
            if token == EOS:
                break
            tokens.append(token)
        assert text == tokens[len(prompt) :]


def test_texts_hold_no_reserved_id_and_end_where_they_should():
    engine = world(1).engine
    many = {"temperature": 3.0, "seeds": list(range(60))}
    texts = engine.write([[BOS]] * 60, most=MOST, **many)
    assert all(len(SPECIALS) <= token < PIECES for text in texts for token in text)
    lengths = {len(text) for text in texts}
    assert max(lengths) == MOST and min(lengths) < MOST  # some ran to the limit, some met </s>
    assert engine.write([[BOS]] * 60, most=3, **many) == [text[:3] for text in texts]


def test_a_penalty_lowers_what_is_held_whatever_its_sign():
    logits, held = np.array([[2.0, -2.0, 2.0, -2.0]]), np.array([[True, True, False, False]])
    np.testing.assert_allclose(penalise(logits, held, np.array([4.0])), [[0.5, -8.0, 2.0, -2.0]])
    assert (penalise(logits, held, np.array([1.0])) == logits).all()


def test_a_heavy_penalty_writes_nothing_twice_while_there_is_anything_else():
    engine, prompts = world(1).engine, [PROMPTS[1], PROMPTS[2]]
    free = engine.write(prompts, most=MOST, temperature=0.0)
    assert any(len(set(text)) < len(text) for text in free)  # greedy text repeats itself
    mixed = engine.write(prompts, most=MOST, temperature=0.0, repetition=[1e6, 1.0])
    assert mixed[1] == free[1]  # a setting of one request is no other's
    assert len({*mixed[0], *prompts[0]}) == len(mixed[0]) + len(prompts[0])  # the prompt counts too


def test_bad_settings_are_named():
    engine = world(1).engine
    with pytest.raises(ValueError, match="empty prompt"):
        engine.write([[BOS], []])
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"most": 0}, {"repetition": 0}):
        with pytest.raises(ValueError, match="temperature"):
            engine.write([[BOS]], **wrong)
