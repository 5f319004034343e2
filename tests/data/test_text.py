"""Text is repaired where it is broken, left alone where it is not, and cleaning twice is cleaning once."""

import time

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from m6rec_jax.data.text import _clean, clean_column, clean_lists

BROKEN = st.sampled_from(
    [
        *("<b>", "</p>", "<br/>", "<script>", "<!--", "-->", "a<b & c>d", "＜"),
        *("&amp;", "&lt;", "&#60;", "&#x3c;", "&amp;lt;", "&nbsp;", "&"),
        *("Ã©", "â€œ", "Â ", "ﬁ", "½", "茶", "👩\u200d👧"),
        *("\x00", "\x85", "\u200b", "\ufeff", "\u202e", "  ", "\n"),
    ]
)


def clean_text(text: str, limit: int) -> str:
    """One text, cleaned as the only cell of a column."""
    return clean_column(pl.Series("x", [text], dtype=pl.String), limit, {})[0]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a<b & c>d", "a<b & c>d"),
        ("x < y > z, <3, <Untitled>", "x < y > z, <3, <Untitled>"),
        ("<b>Bold</b> move", "Bold move"),
        ("H<sub>2</sub>O", "H2O"),
        ("<p>one</p><p>two</p>", "one two"),
        ("5 < 6<br/>7 > 6", "5 < 6 7 > 6"),
        ("<a href='x' target=_blank>link</a>", "link"),
        ("<script>if (a<b) alert(1)</script>Sofa<!-- new -->", "Sofa"),
        ("&lt;b&gt;Tea&lt;/b&gt; &amp;amp; cup", "Tea & cup"),
        ("AT&T &copy; &notathing; &#39;x&#x27;", "AT&T © &notathing; 'x'"),
        ("CafÃ© schÃ¶n", "Café schön"),
        ("Café schön", "Café schön"),
        ("ＡＢＣ １２ ﬁ", "ABC 12 fi"),
        ("a\x00b\x07c\u200bd\ufeff", "abcd"),
        ("  tea\n\n \t cup ", "tea cup"),
        ("👩\u200d👩\u200d👧 棉质T恤", "👩\u200d👩\u200d👧 棉质T恤"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("", ""),
    ],
)
def test_examples(raw, clean):
    assert clean_text(raw, 500) == clean


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=8), BROKEN), max_size=8).map("".join), st.integers(1, 40))
@example("&amp;" * 9 + "lt;b>", 40)
@example("<" * 3 + "b>" * 3, 40)
def test_cleaning_twice_is_cleaning_once(raw, limit):
    once = clean_text(raw, limit)
    assert clean_text(once, limit) == once
    assert len(once) <= limit and once == once.strip() and "\x00" not in once and "  " not in once


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(max_size=12), BROKEN), max_size=12), st.integers(1, 10))
def test_a_column_is_its_cells(cells, limit):
    """The cheap look that spares most cells the full treatment changes no result."""
    made = clean_column(pl.Series("x", cells, dtype=pl.String), limit, {}).to_list()
    assert made == [None if cell is None else _clean(cell, limit)[0] for cell in cells]


def test_rules_are_counted_by_cell():
    counts = {}
    column = pl.Series(["<b>a</b>", "<b>a</b>", "b &amp; c", "CafÃ©", "ok", None, "x" * 60, "ｘ", "a  b", "\x00"])
    clean_column(column, 50, counts)
    assert counts == {
        "html": 2, "entities": 1, "mojibake": 1, "control_characters": 1, "nfkc": 1, "white_space": 1, "overlong": 1
    }  # fmt: skip


def test_lists_lose_what_is_empty_and_what_is_there_already():
    column = pl.Series("c", [["A &amp; B", "A & B"], [], ["<br>", "C"], ["plain"], []], dtype=pl.List(pl.String))
    assert clean_lists(column, 50, {}).to_list() == [["A & B"], [], ["C"], ["plain"], []]
    assert clean_lists(clean_lists(column, 50, {}), 50, {}).to_list() == [["A & B"], [], ["C"], ["plain"], []]


@pytest.mark.parametrize("unit", ["x", "<b>x</b> &amp; ", "<a ", "&amp;", "Ã©", "<!--", "< ", "\x00"])
def test_ten_megabytes_of_title_are_cut_at_once(unit):
    raw = unit * (10_000_000 // len(unit))
    start = time.perf_counter()
    made = clean_column(pl.Series([raw]), 500, counts := {})[0]
    assert len(made) <= 500 and counts["overlong"] == 1
    assert time.perf_counter() - start < 3
