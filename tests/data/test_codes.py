"""Codes are unique, say what an item is like, and stay with it when others arrive."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec_jax.data.codes import Codebooks, assign_codes, fit_codes
from m6rec_jax.data.transitions import count_transitions
from m6rec_jax.errors import InputError


def content_of(n: int, groups: int = 5, width: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    made = rng.standard_normal((groups, width))[np.arange(n) % groups] + 0.2 * rng.standard_normal((n, width))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def transitions_of(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return count_transitions(np.repeat(np.arange(20), 10), rng.integers(0, n, 200), catalogue=n)


def unique(codes: np.ndarray) -> bool:
    return len(np.unique(codes, axis=0)) == len(codes)


def test_one_level_is_the_row():
    codes, books = fit_codes(content_of(7), transitions_of(7), 1, 256)
    assert codes.tolist() == [[i] for i in range(7)]
    assert assign_codes(content_of(2), books, np.arange(7)[:, None]).tolist() == [[7], [8]]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.sampled_from([3, 4]), st.integers(1, 40), st.integers(0, 30))
def test_codes_are_unique_in_range_and_new_items_get_free_ones(n, levels, groups, new):
    size = 5
    content = content_of(n, groups)
    codes, books = fit_codes(content, transitions_of(n), levels, size)
    assert codes.shape == (n, levels) and codes.dtype == np.int32
    assert unique(codes) and codes.min() >= 0 and codes.max() < size
    if n + new <= size**levels and new:
        added = assign_codes(content_of(new, groups, seed=1), books, codes)
        assert unique(np.concatenate([codes, added])) and added.max() < size


@pytest.mark.parametrize("content", [np.zeros((60, 4), np.float32), np.ones((60, 4), np.float32)], ids=["zero", "same"])
def test_items_that_are_all_alike_still_get_codes_of_their_own(content):
    codes, books = fit_codes(content, transitions_of(60), 3, 4)
    assert unique(codes)
    assert unique(np.concatenate([codes, assign_codes(content[:4], books, codes)]))  # the last free ones


def test_the_first_levels_say_what_an_item_is_like():
    content = content_of(100, groups=5)
    codes, _ = fit_codes(content, transitions_of(100), 3, 5)
    group = np.arange(100) % 5
    pure = sum(np.bincount(group[codes[:, 0] == c]).max() for c in np.unique(codes[:, 0]))
    assert pure >= 80


def test_the_last_level_only_breaks_ties():
    content = content_of(40)
    codes, _ = fit_codes(content, transitions_of(40), 3, 16)
    for prefix in np.unique(codes[:, :2], axis=0):
        last = codes[(codes[:, :2] == prefix).all(1), 2]
        assert sorted(last) == list(range(len(last)))


def test_a_new_item_is_coded_like_an_old_one_of_the_same_content_that_nobody_met():
    content = content_of(60)
    met = count_transitions(np.repeat(np.arange(20), 10), np.random.default_rng(0).integers(10, 60, 200), catalogue=60)
    codes, books = fit_codes(content, met, 3, 16)
    again = assign_codes(content[:10], books, codes)
    assert (again[:, :2] == codes[:10, :2]).all() and not (again[:, 2] == codes[:10, 2]).any()


def test_codes_do_not_depend_on_how_content_is_given_and_survive_the_disk(tmp_path):
    content = content_of(80)
    codes, books = fit_codes(content, transitions_of(80), 4, 8)
    np.savez(tmp_path / "codes.npz", **books.arrays())
    with np.load(tmp_path / "codes.npz", allow_pickle=False) as data:
        again = Codebooks.from_arrays(data)
    assert np.array_equal(assign_codes(content, books), assign_codes(content, again))
    assert np.array_equal(fit_codes(content, transitions_of(80), 4, 8)[0], codes)


def test_the_collaborative_part_is_predicted_and_moves_codes():
    content, n = content_of(60, groups=60, width=48), 60
    pairs = np.stack([np.arange(60), (np.arange(60) + 30) % 60], 1).ravel()  # i is always followed by its opposite
    opposite = count_transitions(np.repeat(np.arange(60), 2), pairs, catalogue=n)
    none = count_transitions(np.zeros(0, int), np.zeros(0, int), catalogue=n)
    assert fit_codes(content, none, 3, 8)[1].ridge.shape[1] == 0
    _, with_behaviour = fit_codes(content, opposite, 3, 8)
    made = with_behaviour.features(content)
    assert made.shape[1] > content.shape[1]

    def together(books):
        x = books.features(content)
        return np.mean([x[i] @ x[i + 30] / np.linalg.norm(x[i]) / np.linalg.norm(x[i + 30]) for i in range(30)])

    assert together(with_behaviour) > together(fit_codes(content, none, 3, 8)[1]) + 0.1


def test_items_of_one_text_are_told_apart_by_who_meets_them_the_more_they_are_met():
    """Two crowds, each with items of its own; all texts are the same."""
    content, groups = np.ones((40, 4), np.float32) / 2, np.arange(40) % 2
    rng = np.random.default_rng(0)

    def split(events: int) -> float:
        """How much of the second cells, those that behaviour can tell apart, hold one crowd alone."""
        user = np.repeat(np.arange(events // 10), 10)
        item = rng.integers(0, 20, len(user)) * 2 + user % 2
        codes, _ = fit_codes(content, count_transitions(user, item, catalogue=40), 3, 8)
        cells = codes[:, 0] * 8 + codes[:, 1]
        return np.mean([len(np.unique(groups[cells == cell])) == 1 for cell in np.unique(cells)])

    assert split(4000) == 1.0 > split(0)


@pytest.mark.parametrize(("levels", "size", "says"), [(2, 256, "levels=2"), (3, 1, "codebook=1"), (0, 8, "levels=0")])
def test_impossible_shapes_are_refused(levels, size, says):
    with pytest.raises(InputError, match=says):
        fit_codes(content_of(5), transitions_of(5), levels, size)


def test_a_full_code_space_is_refused():
    _, books = fit_codes(content_of(8), transitions_of(8), 3, 2)
    with pytest.raises(InputError, match="codebook=2: 9 items"):
        assign_codes(content_of(9), books)
