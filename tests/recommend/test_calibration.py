import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec_jax.recommend.calibration import calibrated, divergence

TOPICS, ITEMS = 3, 12


@st.composite
def worlds(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    users, n = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    items = rng.dirichlet(np.full(TOPICS, 0.3), ITEMS) * (rng.random(ITEMS) < 0.9)[:, None]
    likes = rng.dirichlet(np.full(TOPICS, 0.5), users) * (rng.random(users) < 0.8)[:, None]
    rows = np.stack([rng.permutation(ITEMS)[:n] for _ in range(users)]).astype(np.int32)
    scores = -np.sort(rng.integers(0, 5, (users, n)).astype(np.float32), axis=1)
    short = rng.integers(0, n + 1, users)
    gone = np.arange(n) >= short[:, None]
    return np.where(gone, -1, rows), np.where(gone, -np.inf, scores).astype(np.float32), items, likes


@given(worlds(), st.integers(1, 9))
def test_lambda_zero_keeps_the_order(world, k):
    rows, scores, items, likes = world
    assert np.array_equal(calibrated(rows, scores, items, likes, 0.0, k), rows[:, :k])


@given(worlds(), st.integers(1, 9))
def test_lambda_one_is_never_further_from_the_user(world, k):
    rows, scores, items, likes = world
    new = calibrated(rows, scores, items, likes, 1.0, k)
    assert (divergence(new, items, likes) <= divergence(rows[:, :k], items, likes) + 1e-9).all()


@given(worlds(), st.floats(0, 1), st.integers(1, 9))
def test_nothing_is_invented_lost_or_said_twice(world, lam, k):
    rows, scores, items, likes = world
    new = calibrated(rows, scores, items, likes, lam, k)
    for before, after in zip(rows, new, strict=True):
        listed = after[after >= 0].tolist()
        assert len(listed) == len(set(listed)) == min(k, (before >= 0).sum()) and set(listed) <= set(before.tolist())
        assert (after[len(listed) :] == -1).all()
    unknown = likes.sum(1) == 0
    assert np.array_equal(new[unknown], rows[unknown, :k])


def test_a_mixed_taste_gets_a_mixed_list():
    items = np.repeat(np.eye(2), 6, axis=0)
    rows, scores = np.arange(12)[None], np.log(np.linspace(1, 0.5, 12))[None]
    likes = np.array([[0.5, 0.5]])
    assert divergence(rows[:, :4], items, likes) > 1
    new = calibrated(rows, scores, items, likes, 0.7, 4)
    assert sorted(new[0] // 6) == [0, 0, 1, 1] and divergence(new, items, likes) == pytest.approx(0, abs=1e-9)
    assert new[0, 0] == 0 and set(new[0].tolist()) == {0, 1, 6, 7}  # the best of each
    with pytest.raises(ValueError, match="lam=2"):
        calibrated(rows, scores, items, likes, 2)


@given(worlds())
def test_users_do_not_touch_each_other(world):
    rows, scores, items, likes = world
    whole = calibrated(rows, scores, items, likes, 0.5)
    for u in range(len(rows)):
        one = slice(u, u + 1)
        assert np.array_equal(calibrated(rows[one], scores[one], items, likes[one], 0.5), whole[one])


def test_where_greed_ends_worse_the_list_stays():
    """The first pick of greed, nearly balanced, leaves nothing to balance it; the list as it was is perfect."""
    items = np.array([[1.0, 0.0], [0.0, 1.0], [0.55, 0.45]])
    rows, scores, likes = np.array([[0, 1, 2]]), np.log([[0.5, 0.4, 0.3]]), np.array([[0.5, 0.5]])
    assert divergence(np.array([[2, 1]]), items, likes) > divergence(np.array([[0, 1]]), items, likes) + 0.01
    assert calibrated(rows, scores, items, likes, 1.0, 2).tolist() == [[0, 1]]
