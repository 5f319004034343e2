import numpy as np
import pytest
import scipy.sparse as sp

from m6rec_jax.data import neighbours
from m6rec_jax.data.neighbours import find_neighbours


def unit_rows(rng, items, width=8):
    made = rng.standard_normal((items, width)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_neighbours_are_those_of_comparing_every_pair():
    content = unit_rows(np.random.default_rng(0), 60)
    content[7] = 0
    found = find_neighbours(content, k=5, sharpness=3.0)
    cosine = content @ content.T
    np.fill_diagonal(cosine, -1)
    for item in range(60):
        best = np.argsort(-cosine[item], kind="stable")[:5]
        best = best[cosine[item][best] > 0]
        if item == 7:
            best = best[:0]
        assert found.rows[item].tolist() == [*best, *[-1] * (5 - len(best))]
        weights = cosine[item][best] ** 3
        assert found.weights[item, : len(best)] == pytest.approx(weights / max(weights.sum(), 1e-9), rel=1e-4)
        assert not found.weights[item, len(best) :].any()
    assert 7 not in found.rows


@pytest.mark.parametrize("exact_items", [1 << 14, 100])
def test_words_decide_who_is_alike_wherever_they_are_looked_for(exact_items, monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT_ITEMS", exact_items)
    rng = np.random.default_rng(3)
    pair = np.arange(300) // 2  # items 2i and 2i+1 share a rare word, all share a few common ones
    words = np.zeros((300, 160), np.float32)
    words[np.arange(300), pair] = 1
    words[:, 150:] = 0.3 * rng.random((300, 10)) * (rng.random((300, 10)) < 0.3)
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    coarse = np.abs(unit_rows(rng, 300, 4))
    if exact_items == 100:
        coarse = coarse[pair]  # the cells are those of content, so a pair has to lie together
    found = find_neighbours(coarse, sp.csr_array(words), k=3)
    assert (found.rows[:, 0] == np.arange(300) ^ 1).mean() > 0.95
    if exact_items > 300:
        dense = find_neighbours(words, k=3)
        assert (found.rows == dense.rows).all() and found.weights == pytest.approx(dense.weights, abs=1e-5)


def test_searching_by_cells_finds_nearly_all(monkeypatch):
    rng = np.random.default_rng(1)
    centres = unit_rows(rng, 30)
    content = centres[rng.integers(0, 30, 900)] + 0.3 * unit_rows(rng, 900)
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    exact = find_neighbours(content, k=10)
    monkeypatch.setattr(neighbours, "EXACT_ITEMS", 100)
    quick = find_neighbours(content, k=10)
    same = [len(set(a) & set(b)) / 10 for a, b in zip(exact.rows, quick.rows, strict=True)]
    assert np.mean(same) > 0.9
    assert (quick.rows != np.arange(900)[:, None]).all()
    assert quick.weights.sum(1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("items", [0, 1, 2])
def test_small_catalogues_have_few_neighbours(items):
    found = find_neighbours(unit_rows(np.random.default_rng(2), items), k=4)
    assert found.rows.shape == (items, 4) and ((found.rows >= 0).sum(1) <= max(items - 1, 0)).all()
