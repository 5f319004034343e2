"""Attention writes its own gradient: it must be that of the plain formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.model.attention import attend

B, T, K, G, h = 2, 12, 2, 3, 4


def drawn(*shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def plain(q, k, v, k_start, k_end):
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) / h**0.5
    s = jnp.arange(k.shape[1])
    seen = (s >= k_start[..., None]) & (s < k_end[..., None])
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v)


@pytest.mark.parametrize("name", ["causal", "packed, with padding"])
def test_value_and_gradients_are_those_of_softmax(name):
    q, k, v, cotangent = drawn((B, T, K, G, h), (B, T, K, h), (B, T, K, h), (B, T, K, G, h))
    at = np.broadcast_to(np.arange(T), (B, T))
    start, end = np.zeros_like(at), at + 1
    if name != "causal":  # two bidirectional examples of 5, then padding, which sees nothing
        start, end = at // 5 * 5, at // 5 * 5 + 5
        start, end = np.where(at < 10, start, 0), np.where(at < 10, end, 0)
        cotangent = cotangent * (at < 10)[..., None, None, None]
    results = []
    for function in (plain, attend):
        value, back = jax.vjp(lambda *x, function=function: function(*x, start, end), q, k, v)
        results.append((value, *back(cotangent)))
    for expected, got in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_backward_keeps_no_scores():
    """No array of all queries by all keys lives from the forward pass to the backward one."""
    q, k, v = drawn((B, T, K, G, h), (B, T, K, h), (B, T, K, h))
    at = jnp.broadcast_to(jnp.arange(T), (B, T))
    _, back = jax.vjp(lambda *x: attend(*x, at * 0, at + 1), q, k, v)
    assert max(x.size for x in jax.tree.leaves(back)) < B * K * G * T * T
