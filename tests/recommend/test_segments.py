import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.recommend.baselines import Popularity
from m6rec_jax.recommend.segments import SHRINK, Segments, freshness, open_segments

USERS, ITEMS = 7, 9
ABOUT = [["a"], ["a", "b"], ["b"], [], ["c"], ["a", "c"], ["c"]]


@st.composite
def events(draw):
    n = draw(st.integers(1, 60))
    users = np.sort(draw(st.lists(st.integers(0, USERS - 1), min_size=n, max_size=n)))
    items = np.array(draw(st.lists(st.integers(0, ITEMS - 1), min_size=n, max_size=n)))
    weights = np.array(draw(st.lists(st.floats(0.01, 1), min_size=n, max_size=n)))
    return users, items, weights


def slow(values, users, items, weights):
    """The formula of the docstring, item by item."""
    n = np.bincount(items, weights, minlength=ITEMS)
    p = (n + 1) / (n + 1).sum()
    kept = [v for v in dict.fromkeys(values) if v in "abc"]
    if not kept:
        return p
    total = np.zeros(ITEMS)
    for value in kept:
        mine = np.array([value in ABOUT[u] for u in users])
        n_a = np.bincount(items[mine], weights[mine], minlength=ITEMS)
        total += (n_a + SHRINK * p) / (n_a.sum() + SHRINK)
    return total / len(kept)


@given(events(), st.lists(st.sampled_from("abcx"), max_size=3), st.integers(1, 12), st.lists(st.integers(0, ITEMS - 1)),
       st.lists(st.booleans(), min_size=ITEMS, max_size=ITEMS), st.lists(st.booleans(), min_size=ITEMS, max_size=ITEMS))  # fmt: skip
def test_segments_rank_by_the_formula(found, values, k, history, listed, allowed):
    users, items, weights = found
    listed, allowed = np.array(listed), np.array(allowed)
    popularity = Popularity(np.bincount(items, weights, minlength=ITEMS), listed)
    segments = Segments.of(ABOUT, users, items, weights, popularity)
    rows, logp = segments.fill(np.full((1, k), -1, np.int32), [np.array(history, int)], [values], allowed=allowed)
    p = slow(values, users, items, weights)
    free = np.flatnonzero(listed & allowed & ~np.isin(np.arange(ITEMS), history))
    shown = rows[0][rows[0] >= 0]
    assert len(shown) == min(k, len(free)) == len(set(shown.tolist())) and set(shown) <= set(free)
    assert p[shown] == pytest.approx(np.sort(p[free])[::-1][: len(shown)])
    assert np.exp(logp[0, : len(shown)]) == pytest.approx(p[shown])


@given(events(), st.integers(1, 12))
def test_a_value_nobody_has_is_backed_off_to_all(found, k):
    users, items, weights = found
    popularity = Popularity(np.bincount(items, weights, minlength=ITEMS))
    segments, empty = Segments.of(ABOUT, users, items, weights, popularity), np.full((1, k), -1, np.int32)
    nothing = [np.zeros(0, int)]
    assert np.array_equal(segments.fill(empty, nothing, [["x"]])[0], popularity.fill(empty, nothing))


def test_a_segment_with_a_taste_of_its_own_differs_and_keeps_what_stands():
    users, items = np.repeat(np.arange(4), 500), np.repeat([5, 5, 8, 8], 500)
    segments = Segments.of([["a"], ["a"], ["b"], ["b"]], users, items, np.ones(2000), Popularity(np.bincount(items)))
    rows, _ = segments.fill(np.array([[-1, -1], [-1, -1], [2, -1]]), [np.zeros(0, int)] * 3, [["a"], ["b"], ["b"]])
    assert rows[:2, 0].tolist() == [5, 8] and rows[2].tolist() == [2, 8]


def test_freshness_halves_at_the_median_age_and_never_rises_with_age():
    users, times = np.array([0, 0, 0, 1, 1]), np.array([10, 60, 100, 0, 90])
    weights = freshness(users, times, timed=True)  # ages 90, 40, 0, 100, 10
    assert weights == pytest.approx(0.5 ** (np.array([90, 40, 0, 100, 10]) / 40))
    assert freshness(users, times + 777, timed=True) == pytest.approx(weights)
    ordered = freshness(users, np.array([1, 5, 6, 0, 90]), timed=False)  # ages 2, 1, 0, 1, 0
    assert ordered.tolist() == [0.25, 0.5, 1, 0.5, 1]
    assert freshness(users, np.full(5, 3), timed=True).tolist() == [1] * 5
    assert len(freshness(users[:0], times[:0], timed=True)) == 0


def test_only_training_events_are_counted(tiny_levels, tmp_path):
    data = open_dataset(tiny_levels)
    train = pl.read_parquet(tiny_levels / "events.parquet").filter((pl.col("split") == 0) & (pl.col("item") >= 0))
    segments = open_segments(data)
    weights = freshness(train["user"].to_numpy(), train["time"].to_numpy(), True)
    assert segments.popularity.events.sum() == pytest.approx(weights.sum())
    assert (segments.popularity.events[~data.seen] == 0).all()
    assert segments.totals.sum() == pytest.approx(weights.sum())  # each user has one attribute, an age
