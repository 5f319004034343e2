"""The filter language: what it allows is what a slow reading in Python allows, and every mistake is shown in its place."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec_jax.errors import InputError
from m6rec_jax.recommend.filters import DEEPEST, filter_mask, item_columns

WORDS = ["Skin Care", "hair", "护肤", "it's", 'a "b"', "back\\slash", ""]
WORD, PRICE = st.sampled_from(WORDS), st.integers(-2, 3).map(float)
SOME = st.lists(WORD, max_size=3)
ITEM = st.fixed_dictionaries(
    {"title": st.none() | WORD, "categories": st.none() | SOME, "num_price": st.none() | PRICE, "seen": st.booleans()}
)
SCHEMA = {"title": pl.String, "categories": pl.List(pl.String), "num_price": pl.Float64, "seen": pl.Boolean}


def quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def opposite(truth):
    return lambda item: not truth(item)


@st.composite
def leaf(draw):
    """(sentence, what it means of an item) of one comparison."""
    word, price, words = draw(WORD), draw(PRICE), draw(SOME)
    prices = [price, draw(PRICE)]
    listed = f"[{', '.join(map(quoted, words))}]"
    cheap = lambda item, compare: item["num_price"] is not None and compare(item["num_price"])  # noqa: E731
    low = word.lower()
    return draw(
        st.sampled_from(
            [
                (f"title == {quoted(word)}", lambda i: i["title"] == word),
                (f"{quoted(word)} != title", lambda i: i["title"] != word),
                (f"title in {listed}", lambda i: i["title"] in words),
                (f"category == {quoted(word)}", lambda i: word in (i["categories"] or [])),
                (f"categories != {quoted(word)}", lambda i: word not in (i["categories"] or [])),
                (f"{quoted(word)} in category", lambda i: word in (i["categories"] or [])),
                (f"category not in {listed}", lambda i: not set(words) & set(i["categories"] or [])),
                (f"contains(title, {quoted(word)})", lambda i: i["title"] is not None and low in i["title"].lower()),
                (f"contains(category, {quoted(word)})", lambda i: any(low in c.lower() for c in i["categories"] or [])),
                (f"price < {price}", lambda i: cheap(i, lambda p: p < price)),
                (f"{price:.0f} <= num_price", lambda i: cheap(i, lambda p: p >= price)),
                (f"price>{price}", lambda i: cheap(i, lambda p: p > price)),
                (f"`price` >= {price}", lambda i: cheap(i, lambda p: p >= price)),
                (f"price == {price}", lambda i: i["num_price"] == price),
                (f"price != {price}", lambda i: i["num_price"] != price),
                (f"price in {prices}", lambda i: i["num_price"] in prices),
                ("price <= num_price", lambda i: i["num_price"] is not None),
                ("seen", lambda i: i["seen"]),
                ("seen == false", lambda i: not i["seen"]),
            ]
        )
    )


def grown(inner):
    """Sentences of sentences; brackets stand only where the order of `not`, `and`, `or` needs them."""
    pair = st.tuples(inner, inner)
    return st.one_of(
        inner.map(lambda a: (f"not ({a[0]})", opposite(a[1]))),
        pair.map(lambda ab: (f"({ab[0][0]}) and ({ab[1][0]})", lambda i: ab[0][1](i) and ab[1][1](i))),
        pair.map(lambda ab: (f"({ab[0][0]}) or ({ab[1][0]})", lambda i: ab[0][1](i) or ab[1][1](i))),
    )


@settings(max_examples=150)
@given(items=st.lists(ITEM, min_size=1, max_size=6), rule=st.recursive(leaf(), grown, max_leaves=5))
def test_a_filter_allows_what_a_slow_reading_of_it_allows(items, rule):
    sentence, means = rule
    allowed = filter_mask(pl.DataFrame(items, schema=SCHEMA), sentence)
    assert allowed.dtype == bool and allowed.tolist() == [bool(means(item)) for item in items], sentence


@settings(max_examples=50)
@given(item=ITEM, a=leaf(), b=leaf(), c=leaf())
def test_not_binds_before_and_and_before_or(item, a, b, c):
    items = pl.DataFrame([item], schema=SCHEMA)
    (first, a), (second, b), (third, c) = a, b, c
    of = lambda sentence: filter_mask(items, sentence).item()  # noqa: E731
    assert of(f"{first} or {second} and not {third}") == bool(a(item) or (b(item) and not c(item)))
    assert of(f"{first} and {second} or {third}") == bool((a(item) and b(item)) or c(item))


ITEMS = pl.DataFrame({"item_id": ["a", "b"], "categories": [["x"], ["y"]], "num_price": [1.0, 30.0], "num_list price": [2, 3], "seen": [True, False]})  # fmt: skip


def test_short_names_stand_aside_for_columns_of_that_name():
    assert item_columns(ITEMS)["price"] == ("num_price", "a number")
    taken = ITEMS.with_columns(price=pl.lit("dear"))
    assert filter_mask(taken, "price == 'dear'").all() and filter_mask(taken, "num_price < 20").tolist() == [True, False]  # fmt: skip
    assert filter_mask(ITEMS, "`list price` > price").tolist() == [True, False]
    assert filter_mask(ITEMS, "contains == 'x'" if "contains" in ITEMS.columns else "seen").tolist() == [True, False]


@pytest.mark.parametrize(
    ("sentence", "at", "says"),
    [
        ("category == 'x' and prise < 20", 21, "unknown item column prise; there are category, item_id, list price, price, seen"),
        ("price < 'x'", 9, "price is a number and 'x' is a text"),
        ("'x' > price", 1, "price is a number and 'x' is a text"),
        ("price in [1, 'x']", 14, "'x' is a text and 1 a number"),
        ("price in ['x']", 11, "price is a number, and 'x' is a text"),
        ("seen == 1", 9, "seen is true or false and 1 is a number"),
        ("category < 'x'", 10, "category is a list"),
        ("category == 3", 13, "category is a list of texts, and 3 is a number"),
        ("item_id < 'x'", 9, "< orders numbers"),
        ("item_id in 'abc'", 12, "in needs values"),
        ("price = 3", 7, "write =="),
        ("price < 3 & seen", 11, "write `and`"),
        ("price <", 8, "a column or a value is missing"),
        ("price", 6, "a comparison is missing after price"),
        ("(price < 3", 11, ") is missing to close the ( of character 1"),
        ("price < 3)", 10, ") is not expected here"),
        ("price < 3 seen", 11, "join conditions"),
        ("1 < 2", 3, "neither 1 nor 2 is an item column"),
        ("contains(price, 'x')", 10, "contains looks into a column of text"),
        ("contains(category, 3)", 20, "contains looks for a text"),
        ("category == 'x", 13, "never closed"),
        ("price in [1 2]", 13, ", is missing"),
        ("price < 3x", 9, "means nothing here"),
        ("__import__('os')", 1, "unknown item column __import__"),
        ("price < 3; seen", 10, "; means nothing here"),
        ("not " * (DEEPEST + 1) + "seen", 4 * DEEPEST + 1, "flatter"),
        ("(" * 5000, DEEPEST + 1, "flatter"),
        ("price in " + "[" * 5000, DEEPEST + 10, "flatter"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_shows_its_place(sentence, at, says):
    with pytest.raises(InputError) as caught:
        filter_mask(ITEMS, sentence, "--filter")
    message = str(caught.value)
    assert message.startswith(f"--filter, character {at}: ") and says in message and "\n" not in message
    assert message.endswith(("^" + sentence[at - 1 :])[:41] + ("..." if len(sentence[at - 1 :]) > 40 else ""))


def test_an_empty_filter_and_very_long_ones():
    with pytest.raises(InputError, match="--filter: empty; write a condition"):
        filter_mask(ITEMS, " \n ", "--filter")
    assert filter_mask(ITEMS, " or ".join(["price < 0"] * 3000 + ["seen"])).tolist() == [True, False]
    assert filter_mask(ITEMS, f"price in {list(range(2, 5000))}").tolist() == [False, True]
    assert not filter_mask(ITEMS, "price in []").any() and filter_mask(ITEMS, "category not in []").all()
    assert np.array_equal(filter_mask(ITEMS.head(0), "seen"), np.zeros(0, bool))
