"""Beams against brute force: every score right, every item allowed and there once, the certificate never wrong."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec_jax.decoding.beam import GATE_MOST, distinct, enough, listed, root, show, step
from m6rec_jax.decoding.trie import Trie, allowed_under, build_trie
from tests.decoding.worlds import random_codes

USERS, K, H, J = 3, 4, 8, 16
CODEBOOK, SPELLINGS = 6, 70


@cache
def a_trie(levels: int, most: int = 1) -> tuple[np.ndarray, np.ndarray, Trie]:
    """Codes [N, L] and rows [N] of all spellings, each item with 1 to `most` of them, and their trie."""
    rng = np.random.default_rng((levels, most))
    codes = random_codes(rng, levels, CODEBOOK, SPELLINGS)
    rows = np.arange(SPELLINGS)
    if most > 1:
        items = SPELLINGS * 2 // (most + 1)
        rows = np.concatenate([np.arange(items), [0] * (most - 1), rng.permutation(np.repeat(np.arange(1, items), most - 1))])  # fmt: skip
        rows = rng.permutation(np.append(rows[:SPELLINGS], np.full(max(0, SPELLINGS - len(rows)), 1)))
    return codes, rows, build_trie(codes, rows)


@partial(jax.jit, static_argnames=("levels", "beams", "among_children"))
def pure_search(trie, under, exclude, support, mass, gate, tables, *, levels, beams, among_children=False):
    """The loop of `search` with a table in place of the model: `tables[level][user, node]` are log-probabilities."""
    shown = show(trie, under, exclude, support, mass, gate)
    now = root(shown)
    for level in range(levels):
        bound = now.bound
        logp = jnp.take_along_axis(tables[level], jnp.maximum(now.node, 0)[..., None], axis=1)
        width = enough(trie, K) if level == levels - 1 else max(beams, enough(trie, K))
        now, _ = step(trie, shown, now, logp, level, width, among_children)
    return listed(trie, now, bound, K), bound


def brute_force(codes, spelled, allowed, exclude, support, mass, gate, tables, among_children=False):
    """Score of every spelling for every user `[U, N]`, -inf where it must not be shown, and the model's part.

    `spelled [N]`: the item of each; the first of an item is the canonical one.
    """
    logp = np.zeros((USERS, len(codes)))
    shown = np.tile(allowed, (USERS, 1))
    for u in range(USERS):
        shown[u, exclude[u][exclude[u] >= 0]] = False
    may, trie = shown[:, spelled], build_trie(codes)
    for n, code in enumerate(codes):
        for level, c in enumerate(code):
            given = tables[level][:, trie.ancestor[level, trie.rank[n]]]
            logp[:, n] += given[:, c]
            if among_children:
                alike = (codes[:, :level] == code[:level]).all(1)
                for u in range(USERS):
                    there = np.unique(codes[alike & may[u], level])
                    logp[u, n] -= np.logaddexp.reduce(given[u, there], initial=-np.inf) if may[u, n] else 0
    memory = np.zeros_like(logp)
    canonical = np.unique(spelled, return_index=True)[1]
    for u in range(USERS):
        np.add.at(memory[u], canonical[support[u][support[u] >= 0]], mass[u][support[u] >= 0])
    memory = np.where(may, memory, 0)
    total = memory.sum(1, keepdims=True)
    memory = np.divide(memory, total, out=np.zeros_like(memory), where=total > 0)
    g = np.where(total > 0, np.minimum(gate, GATE_MOST)[:, None], 0)
    with np.errstate(divide="ignore"):
        score = np.logaddexp(np.log1p(-g) + logp, np.log(g) + np.log(memory))
    return np.where(may, score, -np.inf), logp


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("levels", [1, 3])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.03, 0.3, 1.0]), heat=st.sampled_from([0.3, 3.0]),
       beams=st.sampled_from([4, SPELLINGS]), gates=st.sampled_from([0.0, 0.5, 1.0]), among_children=st.booleans())  # fmt: skip
def test_beams_against_brute_force(levels, most, seed, share, heat, beams, gates, among_children):
    codes, spelled, trie = a_trie(levels, most)
    C = trie.items
    rng = np.random.default_rng(seed)
    V = SPELLINGS if levels == 1 else CODEBOOK
    raw = [rng.normal(size=(USERS, sum(trie.size), V)) * heat for _ in range(levels)]
    tables = [(x - np.log(np.exp(x).sum(-1, keepdims=True))).astype(np.float32) for x in raw]
    allowed = rng.random(C) < share
    exclude = rng.permuted(np.tile(rng.integers(-1, C, (USERS, H // 2)), 2), axis=1)  # everything twice
    support = rng.integers(-1, C, (USERS, J))
    mass = (rng.random((USERS, J)) * (rng.random((USERS, 1)) < 0.8)).astype(np.float32)
    gate = np.full(USERS, gates, np.float32)
    each, model = brute_force(codes, spelled, allowed, exclude, support, mass, gate, tables, among_children)
    expected = np.full((USERS, C), -np.inf)
    np.maximum.at(expected, (slice(None), spelled), each)

    lists, bound = jax.device_get(
        pure_search(
            trie, allowed_under(trie, allowed), exclude, support, mass, gate, tables,
            levels=levels, beams=beams if levels > 1 else 1, among_children=among_children,
        )
    )  # fmt: skip
    for u in range(USERS):
        found = lists.rows[u][lists.rows[u] >= 0]
        best = np.sort(expected[u])[::-1][:K]
        assert len(found) == min(K, np.isfinite(expected[u]).sum())  # no beam ends nowhere
        assert len(set(found.tolist())) == len(found)
        assert np.isfinite(expected[u, found]).all()  # allowed and not excluded
        score, logp = lists.scores[u, : len(found)], lists.model_logp[u, : len(found)]
        for row, its_score, its_logp in zip(found, score, logp, strict=True):  # those of one of its spellings
            near = np.abs(each[u] - its_score) <= 1e-4 * max(1, abs(its_score))
            assert (near & (spelled == row) & (np.abs(model[u] - its_logp) <= 1e-4 * max(1, abs(its_logp)))).any()
        assert (np.diff(score) <= 0).all()
        assert lists.exact[u] == (bound[u] == -np.inf or lists.scores[u, -1] >= bound[u] + 1e-6 * max(1, abs(bound[u])))
        if lists.exact[u]:
            np.testing.assert_allclose(score, best[: len(found)], atol=1e-4)
            np.testing.assert_allclose(score, expected[u, found], atol=1e-4)  # the best one of each
        if beams >= SPELLINGS or levels == 1:
            assert bound[u] == -np.inf and lists.exact[u]
            clear = np.abs(np.diff(np.sort(expected[u][np.isfinite(expected[u])]))).min(initial=1) > 1e-4
            if clear:
                assert found.tolist() == np.argsort(-expected[u], kind="stable")[: len(found)].tolist()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-1, 6), min_size=9, max_size=9))
def test_distinct_keeps_the_first_of_each(rows):
    at, there = jax.device_get(distinct(np.array([rows]), 5))
    first = list(dict.fromkeys(r for r in rows if r >= 0))[:5]
    assert [rows[i] for i in at[0][there[0]]] == first
    assert [rows.index(r) for r in first] == at[0][there[0]].tolist() and there[0].tolist() == [i < len(first) for i in range(5)]  # fmt: skip


def test_equal_scores_keep_the_lower_code_first():
    codes, _, trie = a_trie(1)
    rng = np.random.default_rng(0)
    table = np.zeros((USERS, sum(trie.size), len(codes)), np.float32)
    table[:, :, 40:50] = 1.0
    none = np.full((USERS, 1), -1)
    lists, _ = pure_search(
        trie, allowed_under(trie, rng.random(len(codes)) < 2), none, none, np.zeros((USERS, 1), np.float32),
        np.zeros(USERS, np.float32), [table], levels=1, beams=1,
    )  # fmt: skip
    assert np.asarray(lists.rows).tolist() == [[40, 41, 42, 43]] * USERS
