"""Packing loses nothing and hides segments from each other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec_jax.data.examples import Sequence
from m6rec_jax.data.packing import pack_lengths, pack_row

LENGTHS = st.lists(st.integers(1, 64), max_size=200).map(lambda x: np.array(x, np.int64))


@given(LENGTHS)
def test_every_example_lands_in_one_row_that_holds_it(lengths):
    rows = pack_lengths(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < lengths[row].sum() <= 64 for row in rows)


@given(LENGTHS)
def test_no_two_rows_would_fit_in_one(lengths):
    totals = sorted(lengths[row].sum() for row in pack_lengths(lengths, 64))
    assert len(totals) < 2 or totals[0] + totals[1] > 64


def test_a_length_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="1..65 do not fit rows of 64"):
        pack_lengths(np.array([1, 65]), 64)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 99))
def test_a_row_holds_every_token_and_sees_by_order_within_its_segment(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = []
    for n in sizes:
        order = np.sort(rng.integers(0, n, n)).astype(np.int32)
        parts.append(
            Sequence(*(rng.integers(1, 90, n) for _ in range(2)), order, rng.random(n), rng.integers(-1, 9, n))
        )
    row = pack_row([(part, i) for i, part in enumerate(parts)], 64)
    real = row["segment_ids"] > 0
    assert row["tokens"][real].tolist() == [t for part in parts for t in part.tokens]
    assert row["loss_weights"].sum() == pytest.approx(sum(part.weights.sum() for part in parts), rel=1e-5)
    keys = np.arange(64)
    in_range = (row["k_start"][:, None] <= keys) & (keys < row["k_end"][:, None])
    same = (row["segment_ids"][:, None] == row["segment_ids"]) & real
    assert (in_range == (same & (row["order"] <= row["order"][:, None]) & real[:, None])).all()
    assert (row["item_rows"][~real] == -1).all()
