"""Each rule rejects or repairs just what it names, is counted, and leaves nothing for a second cleaning."""

import json
import time
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec_jax.data.card import load_card
from m6rec_jax.data.clean import RULES, clean, near_duplicates
from m6rec_jax.data.sources import read_tables
from m6rec_jax.errors import InputError

NOW = 2_000_000_000


def cleaned(raw, catalogue=None, columns="user item t", **card):
    """Clean tables of rows; events are (user, item, t[, kind, text]) tuples, items (id, title) or dicts."""
    names = columns.split()
    frame = pl.DataFrame(
        [tuple(row) for row in raw], schema=dict.fromkeys(names, pl.String), orient="row", strict=False
    )
    said = {
        "name": "t",
        "events": {"path": frame, "user": "user", "item": "item", "time": "t"},
    }
    for name in set(names) - {"user", "item", "t"}:
        said["events"][name] = name
    if catalogue is not None:
        rows = [row if isinstance(row, dict) else dict(zip(("id", "title"), row, strict=True)) for row in catalogue]
        schema = {"id": pl.String, "title": pl.String, "text": pl.String, "cats": pl.List(pl.String)}
        said["items"] = {"path": pl.DataFrame(rows, schema=schema), "id": "id", "title": "title", "text": "text", "categories": "cats"}  # fmt: skip
    for key, value in card.items():
        said[key] = {**said[key], **value} if key in said else value
    card = load_card(said)
    return clean(read_tables(card), card, NOW), card


def rows(result):
    return result.tables.events.select("user_id", "item_id", "time").rows()


def rejected(result):
    return result.rejected.select("row", "rule").rows()


GOOD = [("a", "x", "1"), ("a", "y", "2"), ("b", "x", "3")]


def test_clean_tables_pass_untouched():
    made, _ = cleaned(GOOD)
    assert rows(made) == [("a", "x", 1), ("a", "y", 2), ("b", "x", 3)] and made.rejected.height == 0
    assert list(made.counts) == list(RULES)
    assert made.tables.items["item_id"].to_list() == ["x", "y"] and made.tables.items["title"].to_list() == ["", ""]
    assert {rule for rule, n in made.counts.items() if n} == {"added_item", "empty_title", "empty_text"}


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ((None, "x", "5"), "missing_user"),
        (("  ", "x", "5"), "missing_user"),
        (("a", None, "5"), "missing_item"),
        (("a", "\x00", "5"), "missing_item"),
        (("a", "x", None), "missing_time"),
        (("a", "x", "yesterday"), "bad_time"),
        (("a", "x", "nan"), "bad_time"),
        (("a", "x", "1e400"), "bad_time"),
        (("a", "x", str(NOW + 1)), "future_time"),
        (("a", "x", "1"), "duplicate_event"),
        (("a ", "x", "1.0"), "duplicate_event"),
    ],
)
def test_each_rule_takes_its_row_alone_and_keeps_it_on_record(row, rule):
    made, _ = cleaned([*GOOD, row])
    assert rows(made) == rows(cleaned(GOOD)[0])
    assert rejected(made) == [(3, rule)] and made.counts[rule] == 1
    content = json.loads(made.rejected["content"][0])
    assert content["item_id"] == (None if row[1] in (None, "\x00") else "x") and made.rejected["table"][0] == "events"


def test_times_on_the_edge_of_now_and_orders_have_no_future():
    assert rows(cleaned([("a", "x", str(NOW))])[0]) == [("a", "x", NOW)]
    made, _ = cleaned([("a", "x", str(NOW * 9))], events={"time_unit": "order"})
    assert rows(made) == [("a", "x", NOW * 9)]


def test_the_same_item_at_another_time_kind_or_value_is_no_duplicate():
    made, _ = cleaned(
        [
            ("a", "x", "1", "view", "1"),
            ("a", "x", "2", "view", "1"),
            ("a", "x", "1", "buy", "1"),
            ("a", "x", "1", "buy", "2"),
        ],
        columns="user item t kind value",
    )
    assert made.tables.events.height == 4 and made.counts["duplicate_event"] == 0


def test_time_ties_keep_the_order_of_the_source():
    raw = [("b", f"i{n}", "5") for n in (3, 1, 2, 9, 0)] + [("a", "z", "1"), ("b", "first", "1")]
    made, _ = cleaned(raw)
    assert [r[1] for r in rows(made)] == ["first", "i3", "i1", "i2", "i9", "i0", "z"]
    assert made.tables.events["user_id"].unique(maintain_order=True).to_list() == ["b", "a"]


def test_unknown_items_are_dropped_or_kept():
    items = [("y", "Yes"), ("q", "Never bought")]
    made, _ = cleaned(GOOD, items)
    assert rows(made) == [("a", "y", 2)] and rejected(made) == [(0, "unknown_item"), (2, "unknown_item")]
    assert made.tables.items["item_id"].to_list() == ["y", "q"]
    made, _ = cleaned(GOOD, items, clean={"unknown_items": "keep"})
    assert made.tables.events.height == 3 and made.counts["added_item"] == 1 and made.rejected.height == 0
    assert made.tables.items.select("item_id", "title", "text").rows()[2] == ("x", "", "")
    assert made.tables.items["categories"].to_list()[2] == []


def slow_minimums(events, least_user, least_item):
    while True:
        by_user = {u: sum(e[0] == u for e in events) for u, _, _ in events}
        by_item = {i: sum(e[1] == i for e in events) for _, i, _ in events}
        kept = [e for e in events if by_user[e[0]] >= least_user and by_item[e[1]] >= least_item]
        if len(kept) == len(events):
            return kept
        events = kept


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=40),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_minimum_counts_hold_in_the_end(pairs, least_user, least_item):
    raw = [(f"u{u}", f"i{i}", str(n)) for n, (u, i) in enumerate(pairs)]
    wanted = slow_minimums(raw, least_user, least_item)
    limits = {"min_user_events": least_user, "min_item_events": least_item}
    if not wanted:
        with pytest.raises(InputError, match=r"none of \d+ rows is left.*lower clean.min"):
            cleaned(raw, clean=limits)
        return
    made, _ = cleaned(raw, clean=limits)
    assert sorted(rows(made)) == sorted((u, i, int(t)) for u, i, t in wanted)
    assert (
        made.counts["few_user_events"] + made.counts["few_item_events"]
        == len(raw) - len(wanted)
        == made.rejected.height
    )


def test_kinds():
    raw = [("a", "x", "1", "view"), ("a", "x", "2", "hover"), ("a", "x", "3", None), ("a", "y", "4", "buy")]
    made, _ = cleaned(raw, columns="user item t kind", kinds={"view": 0.5, "buy": 1})
    assert made.tables.events["kind"].to_list() == ["view", "buy"]
    assert rejected(made) == [(2, "missing_kind"), (1, "unknown_kind")]
    made, _ = cleaned(raw, columns="user item t kind")
    assert made.tables.events["kind"].to_list() == ["view", "hover", None, "buy"]
    many = [("a", "x", str(n), f"kind{n}") for n in range(17)]
    with pytest.raises(InputError, match="events.kind.*17.*at most 16"):
        cleaned(many, columns="user item t kind")


def test_a_search_has_a_text_and_needs_no_item():
    raw = [("a", None, "1", "<b>red</b> shoes"), ("a", "x", "2", None), ("b", None, "1", "tea"), ("a", None, "3", " ")]
    made, _ = cleaned(raw, [("x", "X")], columns="user item t text", clean={"min_user_events": 1, "min_item_events": 1})
    assert made.tables.events.select("user_id", "item_id", "text").rows() == [
        ("a", None, "red shoes"), ("a", "x", None), ("b", None, "tea")
    ]  # fmt: skip
    assert rejected(made) == [(3, "missing_item")]
    more = [*raw, ("c", "x", "1", None), ("c", "x", "2", None), ("c", None, "3", "cup")]
    made, _ = cleaned(more, [("x", "X")], columns="user item t text", clean={"min_user_events": 2})
    assert made.tables.events["user_id"].to_list() == ["c"] * 3, "queries do not count, and go with their user"


def test_item_texts_are_repaired_and_empty_ones_kept():
    items = [
        {"id": "x", "title": "Tea &amp; cup", "text": "<p>CafÃ©</p>", "cats": ["A &amp; B", "A & B"]},
        {"id": "y", "title": None, "text": None, "cats": []},
        {"id": None, "title": "lost"},
        {"id": "x", "title": "again"},
    ]
    made, _ = cleaned(GOOD, items)
    table = made.tables.items
    assert table.select("item_id", "title", "text").rows() == [("x", "Tea & cup", "Café"), ("y", "", "")]
    assert table["categories"].to_list() == [["A & B"], []]
    assert made.rejected.select("table", "row", "rule").rows() == [
        ("items", 2, "missing_item"),
        ("items", 3, "duplicate_item"),
    ]
    assert made.counts["entities"] == 2 and made.counts["html"] == 1 and made.counts["mojibake"] == 1
    assert made.counts["empty_title"] == made.counts["empty_text"] == 1


def test_ten_megabytes_of_title_and_a_nul_byte():
    start = time.perf_counter()
    made, _ = cleaned(GOOD, [("x", "<b>tea</b> & " * 800_000), ("y", "nul\x00byte")])
    assert time.perf_counter() - start < 5
    assert made.tables.items["title"].str.len_chars().max() <= 500 and made.tables.items["title"][1] == "nulbyte"
    assert made.counts["overlong"] == 1 and made.counts["control_characters"] == 1
    made, _ = cleaned([("a", "x", "soon " * 2_000_000), *GOOD])
    assert len(made.rejected["content"][0]) < 10_000


def test_users_corpus_and_impressions():
    made, _ = cleaned(
        GOOD,
        [("x", "X")],
        clean={"unknown_items": "keep"},
        users={"path": pl.DataFrame({"u": ["a", None, "a"], "g": ["f &amp; m", "x", "y"]}), "id": "u", "attributes": "g"},
        corpus={"path": pl.DataFrame({"d": ["one", " one ", "<br>", None, "two"]}), "text": "d"},
        impressions={
            "path": pl.DataFrame({"u": ["a", None, "b"], "i": ["x", "x", "nope"], "t": [1, 1, 1], "y": [1, 0, 0]}),
            "user": "u", "item": "i", "time": "t", "clicked": "y",
        },
    )  # fmt: skip
    assert made.tables.users.select("user_id", "attributes").rows() == [("a", ["g: f & m"])]
    assert made.tables.corpus["text"].to_list() == ["one", "two"]
    assert made.tables.impressions.select("user_id", "item_id", "clicked").rows() == [("a", "x", True)]
    rules = made.rejected.select("table", "rule").rows()
    assert sorted(rules) == sorted(
        [
            ("users", "missing_user"),
            ("users", "duplicate_user"),
            ("corpus", "duplicate_document"),
            ("corpus", "empty_document"),
            ("corpus", "empty_document"),
            ("impressions", "missing_user"),
            ("impressions", "unknown_item"),
        ]
    )


def test_near_duplicates_are_told_and_kept():
    items = [
        ("x", "Red Tea-Cup"),
        ("y", "tea cup, RED"),
        ("z", "red cup"),
        ("w", "!!"),
        ("v", "?"),
        ("u", "茶 杯"),
        ("t", "杯，茶"),
    ]
    made, _ = cleaned(GOOD, items)
    assert made.tables.items.height == 7 and made.counts["near_duplicate_item"] == 2
    assert near_duplicates(made.tables.items)["item_ids"].to_list() == [["x", "y"], ["u", "t"]]


@pytest.mark.parametrize(
    ("raw", "card", "said"),
    [
        ([("a", "x", str(NOW * 1000))] * 2, {}, ("future_time 2", "time_unit")),
        ([("a", "x", "2020-01-01")], {}, ("bad_time 1", "events.time_unit")),
        ([("a", "zzz", "1")], {"items": True}, ("unknown_item 1", "unknown_items: keep")),
        ([(None, "x", "1")], {}, ("missing_user 1", "events.user")),
    ],
)
def test_when_nothing_is_left_the_reason_is_told(raw, card, said):
    with pytest.raises(InputError) as caught:
        cleaned(raw, [("x", "X")] if card else None)
    for part in (f"none of {len(raw)} rows", *said):
        assert part in str(caught.value)


def test_one_event_and_one_instant():
    assert rows(cleaned([("a", "x", "1")])[0]) == [("a", "x", 1)]
    made, _ = cleaned([(f"u{n % 3}", f"i{n}", "7") for n in range(9)])
    assert [r[1] for r in rows(made)] == ["i0", "i3", "i6", "i1", "i4", "i7", "i2", "i5", "i8"]


IDS = st.sampled_from(["a", "b", "1", "1.0", "007", " a", "", None, "\x00", "é"])
TIMES = st.sampled_from(["1", "2", "2.0", "3", str(NOW), str(NOW + 5), "soon", None, "-4"])
TEXTS = st.sampled_from(
    [None, "", "<b>x</b>", "&amp;amp;lt;", "CafÃ©", "tea  cup", "Tea cup", "\x00", "＜b＞", "ok" * 300]
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(IDS, IDS, TIMES, st.sampled_from(["view", "buy", None, "x"]), TEXTS), min_size=1, max_size=25),
    st.lists(st.tuples(IDS, TEXTS), max_size=6),
    st.sampled_from(["drop", "keep"]),
    st.integers(0, 2),
)
def test_cleaning_is_idempotent(events, items, unknown, least):
    limits = {"unknown_items": unknown, "min_user_events": least, "min_item_events": least}
    try:
        once, card = cleaned(
            events, items or None, columns="user item t kind text", clean=limits, kinds={"view": 1, "buy": 1, "x": 0}
        )
    except InputError:
        return
    twice = clean(once.tables, card, NOW)
    assert twice.rejected.height == 0
    for name in ("events", "items"):
        assert getattr(twice.tables, name).equals(getattr(once.tables, name))
    assert not any(
        twice.counts[rule] for rule in RULES if rule not in ("empty_title", "empty_text", "near_duplicate_item")
    )


@pytest.mark.parametrize(
    ("unit", "times"),
    [
        ("ms", [1_600_000_000_900, 1_600_000_000_100, 1_600_000_000_500]),
        ("ms", ["1600000000900", "1600000000100.0", "1600000000100.5"]),
        ("s", [1_600_000_000.9, 1_600_000_000.1, 1_600_000_000.5]),
        ("iso", ["2020-01-01T00:00:00.9Z", "2020-01-01T00:00:00.1Z", "2020-01-01T00:00:00.100001Z"]),
        ("iso", ["2020-01-01T00:00:00.9+01:00", "2020-01-01T00:00:00.1+01:00", "2020-01-01T00:00:00.5+01:00"]),
        ("s", [datetime.fromtimestamp(-1, UTC) + timedelta(microseconds=m) for m in (900, 100, 500)]),
        ("order", [7.75, 7.25, 7.5]),
    ],
)
def test_what_happened_within_a_second_keeps_its_order(unit, times):
    frame = pl.DataFrame({"u": ["a"] * 4, "i": ["late", "early", "middle", "late"], "t": [*times, times[0]]})
    card = load_card({"name": "t", "events": {"path": frame, "user": "u", "item": "i", "time": "t", "time_unit": unit}})
    made = clean(read_tables(card), card, NOW)
    assert [item for _, item, _ in rows(made)] == ["early", "middle", "late"]
    assert len({time for _, _, time in rows(made)}) == 1 and rejected(made) == [(3, "duplicate_event")]
    assert clean(made.tables, card, NOW).tables.events.equals(made.tables.events)


def test_one_item_twice_within_a_second_is_two_events():
    made, _ = cleaned([("a", "x", "5.1"), ("a", "x", "5.9")])
    assert rows(made) == [("a", "x", 5), ("a", "x", 5)]
