"""Widths of programs: few, and little padding."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from m6rec_jax.decoding.shapes import BATCH_TOKENS, LEAST_TOKENS, PAGE, batches, prefix_width


@given(st.integers(1, 1 << 14))
def test_a_width_holds_the_prefix_in_whole_pages_and_is_a_width_itself(tokens):
    width = prefix_width(tokens)
    assert width >= max(tokens, LEAST_TOKENS) and width % PAGE == 0
    assert prefix_width(width) == width
    assert tokens <= 128 or width < tokens * 1.25


def test_widths_are_few():
    assert len({prefix_width(n) for n in range(1, 4097)}) == 23
    assert [prefix_width(n) for n in (1, 65, 129, 201, 257, 513)] == [64, 96, 160, 224, 320, 640]


@given(st.lists(st.integers(1, 600), min_size=1, max_size=200), st.sampled_from([1, 7, 1 << 30]))
def test_every_request_is_in_one_batch_that_holds_it(lengths, most):
    seen = []
    for chosen, T, B in batches(np.array(lengths), most):
        assert len(chosen) <= B <= most and B * T <= max(BATCH_TOKENS, T)
        assert max(lengths[u] for u in chosen) <= T
        seen += chosen.tolist()
    assert sorted(seen) == list(range(len(lengths)))
