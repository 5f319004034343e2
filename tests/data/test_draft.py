"""A drafted card can be prepared as it stands, whatever the folder held."""

import json

import polars as pl
import pytest

from m6rec_jax.data.card import load_card
from m6rec_jax.data.clean import clean
from m6rec_jax.data.draft import draft_card
from m6rec_jax.data.sources import read_tables
from m6rec_jax.errors import InputError


def drafted(folder):
    """The card drafted for a folder, loaded from inside it, and its clean tables."""
    path = folder / "card.yaml"
    path.write_text(draft_card(folder), encoding="utf-8")
    card = load_card(path)
    return card, clean(read_tables(card), card)


def test_a_shop_with_kinds_seconds_and_lists(tmp_path):
    kinds = ("view", "add_to_cart", "purchase", "search")
    events = [(f"u{n % 7}", f"i{n % 11}", 1_700_000_000 + 60 * n, kinds[n % 4]) for n in range(200)]
    pl.DataFrame(events, schema=["customer_id", "product_id", "event_time", "event_type"], orient="row").write_csv(
        tmp_path / "events.csv"
    )
    items = {
        "id": [f"i{n}" for n in range(11)],
        "name": ["Tea"] * 11,
        "genres": ["A;B"] * 11,
        "brand": ["X"] * 11,
        "price": ["$5"] * 11,
    }
    pl.DataFrame(items).write_csv(tmp_path / "items.csv")
    pl.DataFrame({"user_id": ["u1"], "age": [30], "shoe": [41]}).write_parquet(tmp_path / "users.parquet")
    (tmp_path / "articles.jsonl").write_text(json.dumps({"title": "t", "body": "b"}) + "\n")
    (tmp_path / "notes.md").write_text("hello")
    card, made = drafted(tmp_path)
    assert (card.events.user, card.events.item, card.events.time, card.events.time_unit) == (
        "customer_id",
        "product_id",
        "event_time",
        "s",
    )
    assert card.kinds == {"view": 0.3, "add_to_cart": 0.7, "purchase": 1.0, "search": 0.0}
    assert card.items.title == "name" and card.items.numbers == ("price",) and card.items.attributes == ("brand",)
    assert card.users.attributes == ("age",) and card.corpus.text == ("title", "body")
    assert made.tables.items["categories"][0].to_list() == ["A", "B"] and made.rejected.height == 0
    assert card.split.rule == "global-time" and card.repeat is True
    assert "# not used: shoe" in (tmp_path / "card.yaml").read_text()


@pytest.mark.parametrize(
    ("cells", "unit"),
    [
        (["1600000000", "1600000001"], "s"), (["1600000000000", "1600000000001"], "ms"), (["1", "2"], "order"),
        (["2024-01-01", "2024-01-02"], "iso"), (["2024-01-01T10:00:00Z", "2024-01-02T10:00:00+01:00"], "iso"), (["soon", "later"], "order"),
    ],
)  # fmt: skip
def test_time_units_are_recognised(tmp_path, cells, unit):
    pl.DataFrame({"user": ["a", "b"], "item": ["x", "y"], "date": cells}).write_csv(tmp_path / "log.csv")
    card, made = drafted(tmp_path)
    assert card.events.time_unit == unit and made.tables.events.height == 2
    assert card.split.rule == ("leave-one-out" if unit == "order" else "global-time")


def test_sequences_and_items_whose_ids_must_be_matched(tmp_path):
    (tmp_path / "sequences.txt").write_text("1 10 20 30\n2 20 10\n3 30 20 10 10\n")
    items = [{"code": f"B{n}", "number": n, "title": f"T{n}", "categories": [["A", "B"]]} for n in (10, 20, 30)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    card, made = drafted(tmp_path)
    assert card.events.format == "sequences" and card.items.id == "number"
    assert made.tables.events.height == 9 and made.tables.items["title"].to_list() == ["T10", "T20", "T30"]


def test_histories_in_cells_over_two_files(tmp_path):
    one = {
        "user_id": ["a", "b"],
        "history_item_id": ["[1, 2]", "[3]"],
        "item_id": [3, 1],
        "history_titles": ["['x']", "['y']"],
    }
    two = {"user_id": ["a"], "history_item_id": ["[1, 2, 3]"], "item_id": [4], "history_titles": ["['x']"]}
    pl.DataFrame(one).write_csv(tmp_path / "valid.csv")
    pl.DataFrame(two).write_csv(tmp_path / "test.csv")
    (tmp_path / "items.json").write_text(
        json.dumps({str(n): {"title": f"T{n}", "description": "['d']"} for n in range(1, 5)})
    )
    card, made = drafted(tmp_path)
    assert card.events.item == ("history_item_id", "item_id") and [p.name for p in card.events.path] == [
        "valid.csv",
        "test.csv",
    ]
    found = made.tables.events.group_by("user_id", maintain_order=True).agg("item_id").rows()
    assert found == [("a", ["1", "2", "3", "4"]), ("b", ["3", "1"])]
    assert made.tables.items["text"][0] == "d"


def test_atomic_files_and_a_fetched_folder(tmp_path):
    (tmp_path / "x.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t2\t3\t881250949\n"
    )
    (tmp_path / "x.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n2\tToy Story\t1995\tA B\n"
    )
    (tmp_path / "x.user").write_text("user_id:token\tage:token\tgender:token\n1\t20\tF\n")
    (tmp_path / "x.kg").write_text("a\tb\tc\n")
    card, made = drafted(tmp_path)
    assert card.events.value == "rating" and card.items.published == "release_year"
    assert made.tables.items["categories"][0].to_list() == ["A", "B"] and made.tables.items["title"][0] == "Toy Story"
    assert draft_card(tmp_path) == draft_card(tmp_path), "its own card beside the tables changes nothing"


def test_a_card_elsewhere_names_its_way(tmp_path):
    (tmp_path / "raw").mkdir()
    pl.DataFrame({"user": ["a"], "item": ["x"]}).write_csv(tmp_path / "raw" / "events.csv")
    (tmp_path / "card.yaml").write_text(draft_card(tmp_path / "raw", beside=tmp_path))
    assert load_card(tmp_path / "card.yaml").events.path == tmp_path / "raw" / "events.csv"


def test_odd_names_are_quoted(tmp_path):
    folder = tmp_path / "yes: #1"
    folder.mkdir()
    pl.DataFrame({"user": ["a"], "item": ["x"], "title: #": ["y"]}).write_csv(folder / "events - no.csv")
    card, _ = drafted(folder)
    assert card.name == "yes: #1"


def test_a_folder_without_events(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        draft_card(tmp_path / "none")
    with pytest.raises(InputError, match="no table with a user and an item column; found no table"):
        draft_card(tmp_path)
    pl.DataFrame({"a": [1], "b": [2]}).write_csv(tmp_path / "x.csv")
    with pytest.raises(InputError, match=r"found x.csv \(a, b\)"):
        draft_card(tmp_path)
