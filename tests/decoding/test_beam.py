"""Beams against brute force: every score right, every item allowed, the certificate never wrong."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec_jax.decoding.beam import GATE_MOST, root, show, step
from m6rec_jax.decoding.trie import Trie, allowed_under, build_trie
from tests.decoding.worlds import random_codes

USERS, K, H, J = 3, 4, 8, 16
CODEBOOK = 6


@cache
def a_trie(levels: int) -> tuple[np.ndarray, Trie]:
    codes = random_codes(np.random.default_rng(levels), levels, CODEBOOK, 70)
    return codes, build_trie(codes)


@partial(jax.jit, static_argnames=("levels", "beams", "among_children"))
def pure_search(trie, under, exclude, support, mass, gate, tables, *, levels, beams, among_children=False):
    """The loop of `search` with a table in place of the model: `tables[level][user, node]` are log-probabilities."""
    shown = show(trie, under, exclude, support, mass, gate)
    now = root(shown)
    for level in range(levels):
        bound = now.bound
        logp = jnp.take_along_axis(tables[level], jnp.maximum(now.node, 0)[..., None], axis=1)
        now, _ = step(trie, shown, now, logp, level, K if level == levels - 1 else beams, among_children)
    rows = jnp.where(now.node >= 0, trie.row[jnp.maximum(now.node - trie.leaf0, 0)], -1)
    return rows, now, bound


def brute_force(codes, trie, allowed, exclude, support, mass, gate, tables, among_children=False):
    """Score of every item for every user `[U, C]`, -inf where it must not be shown."""
    logp = np.zeros((USERS, len(codes)))
    shown = np.tile(allowed, (USERS, 1))
    for u in range(USERS):
        shown[u, exclude[u][exclude[u] >= 0]] = False
    for row, code in enumerate(codes):
        for level, c in enumerate(code):
            given = tables[level][:, trie.ancestor[level, trie.rank[row]]]
            logp[:, row] += given[:, c]
            if among_children:
                alike = (codes[:, :level] == code[:level]).all(1)
                for u in range(USERS):
                    there = np.unique(codes[alike & shown[u], level])
                    logp[u, row] -= np.logaddexp.reduce(given[u, there], initial=-np.inf) if shown[u, row] else 0
    memory = np.zeros_like(logp)
    for u in range(USERS):
        np.add.at(memory[u], support[u][support[u] >= 0], mass[u][support[u] >= 0])
    memory = np.where(shown, memory, 0)
    total = memory.sum(1, keepdims=True)
    memory = np.divide(memory, total, out=np.zeros_like(memory), where=total > 0)
    g = np.where(total > 0, np.minimum(gate, GATE_MOST)[:, None], 0)
    with np.errstate(divide="ignore"):
        score = np.logaddexp(np.log1p(-g) + logp, np.log(g) + np.log(memory))
    return np.where(shown, score, -np.inf), logp


@pytest.mark.parametrize("levels", [1, 3])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.03, 0.3, 1.0]), heat=st.sampled_from([0.3, 3.0]),
       beams=st.sampled_from([4, 70]), gates=st.sampled_from([0.0, 0.5, 1.0]), among_children=st.booleans())  # fmt: skip
def test_beams_against_brute_force(levels, seed, share, heat, beams, gates, among_children):
    codes, trie = a_trie(levels)
    C = len(codes)
    rng = np.random.default_rng(seed)
    V = C if levels == 1 else CODEBOOK
    raw = [rng.normal(size=(USERS, sum(trie.size), V)) * heat for _ in range(levels)]
    tables = [(x - np.log(np.exp(x).sum(-1, keepdims=True))).astype(np.float32) for x in raw]
    allowed = rng.random(C) < share
    exclude = rng.permuted(np.tile(rng.integers(-1, C, (USERS, H // 2)), 2), axis=1)  # everything twice
    support = rng.integers(-1, C, (USERS, J))
    mass = (rng.random((USERS, J)) * (rng.random((USERS, 1)) < 0.8)).astype(np.float32)
    gate = np.full(USERS, gates, np.float32)
    expected, model = brute_force(codes, trie, allowed, exclude, support, mass, gate, tables, among_children)

    rows, now, bound = jax.device_get(
        pure_search(
            trie,
            allowed_under(trie, allowed),
            exclude,
            support,
            mass,
            gate,
            tables,
            levels=levels,
            beams=beams if levels > 1 else 1,
            among_children=among_children,
        )
    )
    for u in range(USERS):
        found = rows[u][rows[u] >= 0]
        best = np.sort(expected[u])[::-1][:K]
        assert len(found) == min(K, np.isfinite(expected[u]).sum())  # no beam ends nowhere
        assert len(set(found.tolist())) == len(found)
        assert np.isfinite(expected[u, found]).all()  # allowed and not excluded
        score, logp = now.score[u, : len(found)], now.logp[u, : len(found)]
        np.testing.assert_allclose(score, expected[u, found], atol=1e-4)
        np.testing.assert_allclose(logp, model[u, found], atol=1e-4)
        assert (np.diff(score) <= 0).all()
        if bound[u] == -np.inf or now.score[u, -1] >= bound[u] + 1e-6 * max(1, abs(bound[u])):
            np.testing.assert_allclose(score, best[: len(found)], atol=1e-4)
        if beams >= C or levels == 1:
            assert bound[u] == -np.inf
            clear = np.abs(np.diff(np.sort(expected[u][np.isfinite(expected[u])]))).min(initial=1) > 1e-4
            if clear:
                assert found.tolist() == np.argsort(-expected[u], kind="stable")[: len(found)].tolist()


def test_equal_scores_keep_the_lower_code_first():
    codes, trie = a_trie(1)
    rng = np.random.default_rng(0)
    table = np.zeros((USERS, sum(trie.size), len(codes)), np.float32)
    table[:, :, 40:50] = 1.0
    none = np.full((USERS, 1), -1)
    rows, *_ = pure_search(
        trie, allowed_under(trie, rng.random(len(codes)) < 2), none, none, np.zeros((USERS, 1), np.float32),
        np.zeros(USERS, np.float32), [table], levels=1, beams=1,
    )  # fmt: skip
    assert np.asarray(rows).tolist() == [[40, 41, 42, 43]] * USERS
