"""The quality report says what is in the data, survives hostile text, needs no network; thresholds stop bad data."""

import re

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec_jax.data.card import load_card
from m6rec_jax.data.clean import clean
from m6rec_jax.data.inequality import gini
from m6rec_jax.data.quality import check_thresholds, quality_report
from m6rec_jax.data.quality_figures import figures
from m6rec_jax.data.sources import read_tables
from m6rec_jax.errors import InputError

START = 1_600_000_000
EVIL = '<script>alert("x")</script><img src=http://evil.example/x.png>'


def shop(**card):
    """200 shoppers with pauses, a crawler without, a fan of one item, a shop full of every kind of dirt."""
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{rng.integers(40)}", START + int(rng.integers(10**7)), float(rng.integers(1, 6))) for u in range(200) for _ in range(8)]  # fmt: skip
    rows += [("crawler", f"i{n % 40}", START + n, 3.0) for n in range(400)]
    rows += [("fan", "i7", START + 9000 * n, 5.0) for n in range(150)]
    rows += (
        [(None, "i1", START, 1.0)] * 3 + [rows[0]] * 20 + [(EVIL, "i0", START + n * 10**6, 9000.0) for n in range(3)]
    )
    rows += [("u1", "nowhere", START + n, None) for n in range(5)]
    events = pl.DataFrame(rows, schema=["u", "i", "t", "v"], orient="row")
    titles = [EVIL + " lamp", "Tea cup", "cup, tea", "", *(f"thing {n}" for n in range(36))]
    items = pl.DataFrame({"id": [f"i{n}" for n in range(40)], "title": titles, "price": [*range(39), 10**6]})
    return {
        "name": EVIL,
        "events": {"path": events, "user": "u", "item": "i", "time": "t", "value": "v"},
        "items": {"path": items, "id": "id", "title": "title", "numbers": "price"},
        **card,
    }


def report(tmp_path, **card):
    card = load_card(shop(**card))
    tables = read_tables(card)
    cleaned = clean(tables, card)
    found = quality_report(tables, cleaned, card, tmp_path / "quality.html")
    return found, (tmp_path / "quality.html").read_text(encoding="utf-8"), card


def test_figures_say_what_is_there(tmp_path):
    found, _, _ = report(tmp_path)
    assert found["read"] == 1600 + 400 + 150 + 3 + 20 + 3 + 5 and found["events"] == found["read"] - 28
    assert {rule["rule"]: rule["count"] for rule in found["rules"]}["duplicate_event"] == 20
    assert found["limits"]["rejected"] == 28 / found["read"] and found["limits"]["unknown_items"] == 5 / found["read"]
    suspects = {one["user"]: one["why"] for one in found["bots"]["listed"]}
    assert suspects.keys() == {"crawler", "fan"}
    assert "a second or less" in suspects["crawler"] and "one item" in suspects["fan"]
    assert found["limits"]["bot_events"] == 550 / found["events"]
    outside = {one["name"]: one["outside"] for one in found["outliers"]}
    assert outside["items: price"] == 1 and outside["events: v"] >= 3
    missing = {(one["table"], one["column"]): one["missing"] for one in found["missing"]}
    assert missing["events", "user_id"] == 3 and missing["events", "value"] == 5 and missing["items", "title"] == 1
    assert found["near"][0]["count"] == 2 and found["limits"]["near_duplicates"] == 1 / 40
    assert [part["name"] for part in found["drift"]["parts"]] == ["train", "valid", "test"]
    assert sum(part["events"] for part in found["drift"]["parts"]) == found["events"]
    assert sum(found["activity"]["events"]) + found["activity"]["outside"] == found["events"]


def test_the_page_is_whole_by_itself_and_runs_nothing(tmp_path):
    _, page, _ = report(tmp_path, quality={"max_rejected": 0.5})
    assert page.rstrip().endswith("</html>") and page.count("<svg") == 3
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\((?!#)|@import""", page)
    for part in (
        "Missing values",
        "Suspected bots",
        "Long tail",
        "Activity over time",
        "Drift between splits",
        "Near dup",
    ):
        assert part in page


def test_data_with_nothing_but_an_order(tmp_path):
    frame = pl.DataFrame({"u": ["a", "a", "b"], "i": ["x", "y", "x"]})
    card = load_card({"name": "t", "events": {"path": frame, "user": "u", "item": "i", "time_unit": "order"}})
    tables = read_tables(card)
    found = quality_report(tables, clean(tables, card), card, tmp_path / "q.html")
    assert "activity" not in found and "Activity over time" not in (tmp_path / "q.html").read_text()
    assert found["drift"]["parts"][0]["events"] == 3 and found["short_users"] == 2


@pytest.mark.parametrize(("n", "same_time"), [(1, True), (9, True), (4, False)])
def test_degenerate_data(n, same_time):
    frame = pl.DataFrame(
        {"u": ["a"] * n, "i": [f"i{k}" for k in range(n)], "t": [5 if same_time else k for k in range(n)]}
    )
    card = load_card({"name": "t", "events": {"path": frame, "user": "u", "item": "i", "time": "t"}})
    tables = read_tables(card)
    found = figures(tables, clean(tables, card), card)
    assert found["events"] == n and found["limits"]["gini"] == 0


@pytest.mark.parametrize(
    ("limit", "holds"),
    [
        ({"max_rejected": 0.05}, True), ({"max_rejected": 0.001}, False), ({"max_duplicate_events": 0.001}, False),
        ({"max_unknown_items": 0.001}, False), ({"max_missing_titles": 0.01}, False), ({"max_missing_titles": 0.03}, True),
        ({"max_near_duplicates": 0.01}, False), ({"max_bot_events": 0.1}, False), ({"max_new_item_events": 0}, True),
        ({"max_gini": 0.001}, False), ({"max_gini": 1.0}, True), ({"max_top_share": 0.001}, False),
        ({"min_events": 10**6}, False), ({"min_users": 203}, True), ({"min_users": 204}, False), ({"min_items": 41}, False),
    ],
)  # fmt: skip
def test_thresholds(limit, holds, tmp_path):
    card = load_card(shop(quality=limit))
    tables = read_tables(card)
    found = figures(tables, clean(tables, card), card)
    (tmp_path / "page.html").write_text("the page")
    check = (found, card, tmp_path / "page.html", tmp_path / "kept.html")
    if holds:
        check_thresholds(*check)
        assert not (tmp_path / "kept.html").exists()
        return
    ((key, value),) = limit.items()
    with pytest.raises(InputError, match=rf"card: quality.{key}: {value}: .* was found"):
        check_thresholds(*check)
    assert (tmp_path / "kept.html").read_text() == "the page"


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30))
def test_gini_is_half_the_relative_mean_difference(counts):
    counts = np.array(counts)
    n, total = len(counts), counts.sum()
    slow = np.abs(counts[:, None] - counts).sum() / (2 * n * total) if total else 0
    assert gini(counts) == pytest.approx(slow, abs=1e-12)


def test_the_same_data_gives_the_same_page(tmp_path):
    _, first, _ = report(tmp_path)
    _, second, _ = report(tmp_path)
    assert second == first
    ids = re.findall(r'\bid="([^"]*)"', first)
    assert len(ids) == len(set(ids)), "charts of one page share no id"
