"""Grounding: what a text names is found, what is not true of the facts is missed, another's words are copies."""

import polars as pl
import pytest

from m6rec_jax.recommend.grounding import WINDOW, Copies, Facts, Lexicon, ground, tokens_of

ITEMS = pl.DataFrame(
    {
        "item_id": ["a", "b", "c", "d"],
        "title": ["Star Wars", "The Blue Lipstick", "小米手机", "Heat of the Year"],
        "categories": [["Action", "Sci-Fi"], ["Beauty"], ["电子产品"], ["Action", "Crime"]],
        "attributes": [["year: 1977"], ["brand: Rare Beauty"], ["品牌: 小米"], ["year: 1995"]],
    }
)
LEXICON = Lexicon.of(ITEMS)
NOTHING = Copies([], [])


def facts_of(*rows: int) -> Facts:
    kept = ITEMS[list(rows)]
    return Facts([*kept["title"], *kept["categories"].explode(), *kept["attributes"].explode()])


def named(text: str) -> list[str]:
    return [" ".join(gram) for gram in LEXICON.named(text)]


def test_categories_brands_numbers_and_titles_are_named_once_and_common_words_not():
    assert named("It is ACTION and action, like Star Wars of 1977") == ["action", "star wars", "1977"]
    assert named("Rare Beauty, a beauty") == ["rare beauty", "beauty"]  # the longest name at a place
    assert named("some wars and the heat") == ["wars", "heat"]
    assert named("这是电子产品，品牌小米的手机") == ["电 子 产 品", "小 米", "手 机"]
    assert named("it is the one") == []
    assert tokens_of("Ｓｔａｒ Wars 3.5！") == ["star", "wars", "3.5"]


@pytest.mark.parametrize(
    ("text", "rows", "share", "missing"),
    [
        ("Action, Sci-Fi; year: 1977", [0], 1.0, ()),
        ("Action, Sci-Fi; year: 1995", [0], 2 / 3, ("1995",)),
        ("Action, Sci-Fi; year: 1995", [0, 3], 1.0, ()),  # the other is in the history
        ("it is Beauty, like Star Wars", [0], 0.5, ("beauty",)),
        ("属于电子产品，品牌小米", [2], 1.0, ()),
        ("属于电子产品，品牌小米", [0], 0.0, ("电子产品", "小米")),
        ("wonderful", [0], 0.0, ()),
        ("the year", [0], 0.0, ()),  # what all items have says nothing of one
        ("", [0], 0.0, ()),
    ],
)
def test_what_is_named_is_held_against_the_facts(text, rows, share, missing):
    made = ground(text, LEXICON, facts_of(*rows), NOTHING)
    assert made.share == pytest.approx(share) and made.missing == missing
    assert made.holds == (share == 1.0)


def test_numbers_are_whole_and_names_do_not_reach_over_borders():
    assert not Facts(["19775", "1977.5"]).hold(("1977",))
    assert not Facts(["star", "wars"]).hold(("star", "wars")) and Facts(["a star wars"]).hold(("star", "wars"))


LONG = "Star Wars was seen by everyone in the year 1977 and again with friends"


def test_a_text_of_training_about_another_is_a_copy_and_ones_own_facts_are_not():
    copies = Copies([LONG, "short one", "other words " * WINDOW], [{"d", "u9"}, {"a"}, {"a"}])
    facts = facts_of(0)
    copied = ground(LONG, LEXICON, facts, copies, {"a"})
    assert copied.share == 1.0 and copied.copied == 1.0 and not copied.holds
    assert ground(LONG, LEXICON, facts, copies, {"a", "d"}).holds  # what training said of this item
    assert ground(LONG, LEXICON, Facts([LONG]), copies, {"a"}).copied == 0.0  # the item's own text
    assert ground("short one", LEXICON, facts, copies).copied == 0.0
    half = LONG + " " + " ".join("x" * (n + 1) for n in range(len(tokens_of(LONG))))
    tokens = len(tokens_of(LONG))
    assert copies.share(half, facts, ()) == pytest.approx((tokens - WINDOW + 1) / (2 * tokens - WINDOW + 1))


def test_copies_are_counted_in_one_text_not_over_many():
    words = ["x" * (n + 1) for n in range(2 * WINDOW)]
    copies = Copies([" ".join(words[: WINDOW + 1]), " ".join(words[-WINDOW - 1 :])], [(), ()])
    assert copies.share(" ".join(words), Facts([]), ()) == pytest.approx(2 / (WINDOW + 1))
    chinese = "这是一部很好看的关于未来的电影"
    assert Copies([chinese], [()]).share(chinese, Facts([]), ()) == 1.0
