"""The sampler draws what its settings say."""

from __future__ import annotations

import jax
import numpy as np

from m6rec_jax.decoding.sampling import Sampling, draw, penalise

draw = jax.jit(draw)


def setting(n: int, temperature=1.0, top_k=0, top_p=1.0, seeds=None) -> Sampling:
    fill = lambda x, kind: np.full(n, x, kind)  # noqa: E731
    seeds = np.arange(n, dtype=np.uint32) if seeds is None else np.asarray(seeds, np.uint32)
    return Sampling(fill(temperature, np.float32), fill(top_k, np.int32), fill(top_p, np.float32), seeds, fill(9, np.int32), fill(1, np.float32), fill(False, bool))  # fmt: skip


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


def test_a_penalty_lowers_what_is_held_whatever_its_sign():
    logits, held = np.array([[2.0, -2.0, 2.0, -2.0]]), np.array([[True, True, False, False]])
    np.testing.assert_allclose(penalise(logits, held, np.array([4.0])), [[0.5, -8.0, 2.0, -2.0]])
    assert (penalise(logits, held, np.array([1.0])) == logits).all()
