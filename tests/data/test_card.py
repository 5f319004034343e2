"""A card is read strictly: what it says is what happens, and what it cannot say is refused in one helpful line."""

import re

import pandas as pd
import polars as pl
import pytest

from m6rec_jax.data.card import Card, Events, Items, Split, load_card
from m6rec_jax.errors import InputError

FULL = """\
name: beauty
events: {path: events.csv, format: csv, user: user, item: item, time: t, time_unit: order}   # kind:, value:, text: optional
items:  {path: items.jsonl, format: jsonl, id: id, title: title, categories: categories}
users:  {path: users.csv, format: csv, id: user, attributes: [age, gender]}
corpus: {path: docs.jsonl, format: jsonl, text: [body]}
impressions: {path: shown.csv, format: csv, user: user, item: item, time: t, clicked: y}
split: {rule: leave-one-out}
clean: {min_user_events: 3, min_item_events: 1, unknown_items: drop}
repeat: false
privacy: {ids: plain}
kinds: {view: 0.3, click: 0.5, buy: 1.0, search: 0}
"""
SHORT = "".join(FULL.splitlines(keepends=True)[:3]) + "split: leave-one-out\n"


@pytest.fixture
def folder(tmp_path):
    for name in ("events.csv", "items.jsonl", "users.csv", "docs.jsonl", "shown.csv"):
        (tmp_path / name).write_text("x\n")
    return tmp_path


def write(folder, text):
    path = folder / "card.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder, text) -> str:
    with pytest.raises(InputError) as caught:
        load_card(write(folder, text))
    message = str(caught.value)
    assert "\n" not in message and "card.yaml" in message
    return message


def test_the_example_of_the_documentation_loads_whole(folder):
    card = load_card(write(folder, FULL))
    assert card.items.categories == ("categories",) and card.users.attributes == ("age", "gender")
    assert card.impressions.clicked == "y" and card.kinds["search"] == 0 and card.clean.min_user_events == 3
    assert card.events.path == folder / "events.csv" and card.split == Split("leave-one-out")


def test_its_first_lines_suffice(folder):
    card = load_card(write(folder, SHORT))
    assert card.split.rule == "leave-one-out" and card.repeat is False and card.privacy.ids == "plain"
    assert card.clean.min_user_events == 1 and card.clean.unknown_items == "drop" and not card.kinds


def test_the_split_follows_from_the_times_when_left_out(folder):
    ordered = "".join(FULL.splitlines(keepends=True)[:2])
    assert load_card(write(folder, ordered)).split == Split("leave-one-out")
    assert load_card(write(folder, ordered.replace("order", "s"))).split == Split("global-time", 0.1, 0.1)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("user: user, item", "usr: user, item", ("events.usr", "'user'", "did you mean user?")),
        ("name: beauty", "nam: beauty", ("nam", "'beauty'", "did you mean name?")),
        (
            "path: events.csv",
            "path: event.csv",
            ("events.path", "event.csv", "no such file", "did you mean events.csv?"),
        ),
        ("path: events.csv", "path: sub/e.csv", ("events.path", "no folder")),
        ("format: csv, user", "format: xlsx, user", ("events.format", "'xlsx'", "parquet, csv, tsv")),
        ("time_unit: order", "time_unit: minutes", ("events.time_unit", "'minutes'", "s, ms, iso, order")),
        ("user: user, item: item, time: t", "item: item, time: t", ("events.user: missing", "user_id")),
        ("time: t, time_unit: order", "time_unit: s", ("events.time: missing", "time_unit: order")),
        ("rule: leave-one-out", "rule: leave-2-out", ("split.rule", "'leave-2-out'", "ratio")),
        ("rule: leave-one-out", "rule: ratio, valid: 0.6, test: 0.5", ("split.valid", "0.6", "lower")),
        ("rule: leave-one-out", "rule: ratio, test: 1.5", ("split.test", "1.5", "between 0 and 1")),
        ("rule: leave-one-out", "rule: global-time", ("split.rule", "order", "leave-one-out")),
        ("min_user_events: 3", "min_user_events: three", ("clean.min_user_events", "'three'", "whole number")),
        ("min_user_events: 3", "min_user_events: -1", ("clean.min_user_events", "-1", "negative")),
        ("unknown_items: drop", "unknown_items: dorp", ("clean.unknown_items", "'dorp'", "drop, keep")),
        ("repeat: false", "repeat: maybe", ("repeat", "'maybe'", "true or false")),
        ("ids: plain", "ids: hmac", ("privacy.ids", "key")),
        ("ids: plain", "ids: plain, key: k", ("privacy.key", "plain")),
        ("buy: 1.0", "buy: much", ("kinds.buy", "'much'", "number")),
        ("buy: 1.0", "buy: -1", ("kinds.buy", "-1")),
        ("view: 0.3, click: 0.5, buy: 1.0, search: 0", "search: 0", ("kinds", "weight above 0")),
        ("repeat: false", "repeat:", ("repeat", "empty", "remove")),
        ("repeat: false", "quality: {max_rejected: 3}", ("quality.max_rejected", "3", "between 0 and 1")),
        ("repeat: false", "quality: {max_typos: 3}", ("quality.max_typos", "unknown key")),
        ("repeat: false", "repeat: false\nrepeat: true", ("'repeat'", "twice")),
        ("id: id,", "id: {a: b},", ("items.id", "one name")),
        ("name: beauty\n", "", ("name: missing",)),
        ("name: beauty", "- name: beauty", ("not YAML",)),
    ],
)
def test_what_is_wrong_is_named_with_the_way_out(folder, old, new, said):
    assert old in FULL
    message = refusal(folder, FULL.replace(old, new, 1))
    for part in said:
        assert part in message, message


@pytest.mark.parametrize("kind", ["missing", "folder", "binary", "list"])
def test_a_card_that_is_none(tmp_path, kind):
    path = tmp_path / "card.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(b"\xff\xfe\x00" if kind == "binary" else b"[1, 2]")
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_card(path)


def test_names_that_yaml_takes_for_something_else(folder):
    card = load_card(
        write(folder, "name: 2024\nevents: {path: events.csv, user: no, item: on, time: y, time_unit: order}")
    )
    assert (card.name, card.events.user, card.events.item, card.events.time) == ("2024", "no", "on", "y")


def test_several_files_by_list_or_pattern(folder):
    for name in ("log-2.csv", "log-1.csv"):
        (folder / name).write_text("x\n")
    rest = "user: u, item: i, time_unit: order}"
    pattern = load_card(write(folder, f"name: a\nevents: {{path: log-*.csv, {rest}")).events.path
    listed = load_card(write(folder, f"name: a\nevents: {{path: [log-2.csv, log-1.csv], {rest}")).events.path
    assert pattern == listed[::-1] == (folder / "log-1.csv", folder / "log-2.csv")
    assert "log-3.csv" in refusal(folder, f"name: a\nevents: {{path: [log-3.csv], {rest}")
    assert "no file matches" in refusal(folder, f"name: a\nevents: {{path: nolog-*.csv, {rest}")


@pytest.mark.parametrize("make", [pl.DataFrame, pd.DataFrame])
def test_tables_in_memory(make):
    frame = make({"u": ["a"], "i": ["x"]})
    for card in (
        load_card({"name": "t", "events": {"path": frame, "user": "u", "item": "i", "time_unit": "order"}}),
        Card("t", Events(frame, user="u", item="i", time_unit="order"), Items(frame, id="i", text="u")),
    ):
        assert card.events.path is frame and card.to_dict()["events"]["path"] == "<table>"
        assert load_card(card) is card
    assert card.items.text == ("u",)


def test_a_manifest_can_hold_it(folder):
    import json

    (folder / "key").write_bytes(b"k" * 32)
    card = load_card(write(folder, FULL.replace("ids: plain", "ids: hmac, key: key")))
    told = json.dumps(card.to_dict())
    assert json.loads(told)["split"] == {"rule": "leave-one-out"} and str(folder) not in told and '"key"' not in told
