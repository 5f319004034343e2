"""Transition counts equal a slow count, however events are chunked."""

from collections import defaultdict

import numpy as np
import pytest

from m6rec_jax.data import transitions as module
from m6rec_jax.data.transitions import Transitions, count_transitions, load_transitions
from m6rec_jax.errors import InputError

CATALOGUE = 30


def random_events(seed: int, users: int = 40):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 25, users)
    owner = np.repeat(np.arange(users), lengths)
    return owner, rng.integers(0, CATALOGUE, len(owner)), np.sort(rng.integers(0, 10**6, len(owner)))


def slow_counts(owner, items, weights, window, backward, times=None, half_life=0.0):
    forward, back = defaultdict(float), defaultdict(float)
    for i in range(len(items)):
        for gap in range(1, window + 1):
            j = i + gap
            if j < len(items) and owner[i] == owner[j]:
                age = 0.5 ** ((max(times) - times[j]) / half_life) if half_life else 1.0
                forward[items[i], items[j]] += weights[j] * age / gap
                back[items[j], items[i]] += weights[i] * age * backward / gap
    return forward, back


def dense(counts) -> np.ndarray:
    made = np.zeros((CATALOGUE, CATALOGUE))
    for (a, b), weight in counts.items():
        made[a, b] = weight
    return made


@pytest.mark.parametrize("half_life", [0.0, 2e5])
@pytest.mark.parametrize("chunk", [7, 10**9])
@pytest.mark.parametrize("window", [1, 10])
def test_equals_a_slow_count(monkeypatch, half_life, chunk, window):
    monkeypatch.setattr(module, "CHUNK_EVENTS", chunk)
    owner, items, times = random_events(window)
    weights = np.random.default_rng(1).choice([0.0, 0.3, 1.0], len(items))
    made = count_transitions(owner, items, times, weights, catalogue=CATALOGUE, window=window, half_life=half_life)
    forward, back = slow_counts(owner, items, weights, window, 0.5, times, half_life)
    np.testing.assert_allclose(made.forward.to_scipy().toarray(), dense(forward), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(made.backward.to_scipy().toarray(), dense(back), rtol=1e-5, atol=1e-7)
    assert (made.degree == np.bincount(items, minlength=CATALOGUE)).all()


def test_rows_are_sorted_and_survive_the_disk(tmp_path):
    owner, items, _ = random_events(3)
    made = count_transitions(owner, items, catalogue=CATALOGUE)
    made.save(tmp_path / "transitions.npz")
    back = load_transitions(tmp_path / "transitions.npz")
    assert isinstance(back, Transitions) and back.window == 10 and back.catalogue == CATALOGUE
    for row in range(CATALOGUE):
        columns, weights = back.forward.row(row)
        assert (np.diff(columns) > 0).all() and (weights > 0).all()
        assert np.array_equal(weights, made.forward.row(row)[1])


def test_beyond_the_limit_the_lightest_pairs_are_forgotten(monkeypatch):
    owner, items, _ = random_events(5)
    whole = count_transitions(owner, items, catalogue=CATALOGUE).forward.to_scipy()
    monkeypatch.setattr(module, "ENTRIES", 200)
    kept = count_transitions(owner, items, catalogue=CATALOGUE).forward.to_scipy()
    assert 0 < kept.nnz <= 200 < whole.nnz
    assert (kept != kept.minimum(whole)).nnz == 0  # what is kept is exact
    assert kept.data.min() > np.sort(whole.data)[-201] - 1e-6


def test_nothing_to_count():
    none = np.zeros(0, np.int64)
    made = count_transitions(none, none, catalogue=3)
    assert made.forward.to_scipy().nnz == 0 and made.degree.tolist() == [0, 0, 0]
    alone = count_transitions(np.array([0, 1]), np.array([2, 2]), catalogue=3)
    assert alone.backward.to_scipy().nnz == 0 and alone.degree.tolist() == [0, 0, 2]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "transitions.npz").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match=r"transitions\.npz.*prepare"):
        load_transitions(tmp_path / "transitions.npz")
