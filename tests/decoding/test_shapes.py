"""Widths of programs: few, and little padding."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from m6rec_jax.decoding.shapes import LEAST_TOKENS, PAGE, prefix_width


@given(st.integers(1, 1 << 14))
def test_a_width_holds_the_prefix_in_whole_pages_and_is_a_width_itself(tokens):
    width = prefix_width(tokens)
    assert width >= max(tokens, LEAST_TOKENS) and width % PAGE == 0
    assert prefix_width(width) == width
    assert tokens <= 128 or width < tokens * 1.25


def test_widths_are_few():
    assert len({prefix_width(n) for n in range(1, 4097)}) == 23
    assert [prefix_width(n) for n in (1, 65, 129, 201, 257, 513)] == [64, 96, 160, 224, 320, 640]
