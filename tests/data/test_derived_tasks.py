"""Tasks made from the dataset itself: what each says, and that nothing held out is said in training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.events import Events
from m6rec_jax.data.instances import read_instances
from m6rec_jax.data.instances.behaviour import Moments, counted_topics, statistics, told_users
from m6rec_jax.data.instances.wording import gap_of, rank_of, span_of
from m6rec_jax.data.instances.world import World
from m6rec_jax.data.prepare import prepare
from m6rec_jax.data.records import DOCUMENT, ITEM
from m6rec_jax.data.splits import SPLITS
from m6rec_jax.errors import InputError
from tests.fixtures import tiny_card, tiny_tables

BEHAVIOUR = ("click", "conversion", "retrieval", "plausibility", "explain", "describe", "query", "sentiment")
ON_ITEMS = ("topic", "title", "description", "summarise", "complete")
ITEMS = 240


def tables() -> dict[str, pl.DataFrame]:
    """The tiny tables with ratings, reviews and queries, and a catalogue large enough to hold some of it out."""
    rng = np.random.default_rng(3)
    made = tiny_tables(kinds=True)
    n = made["events"].height
    item = pl.Series([f"item-{i}" for i in rng.integers(0, ITEMS, n)])
    searches = pl.col("k") == "search"
    made["events"] = made["events"].with_columns(
        i=pl.when(searches).then(None).otherwise(item),
        v=pl.when(~searches).then(pl.Series(rng.integers(1, 6, n).astype(float))),
        q=pl.when(searches).then("q").otherwise(pl.Series([f"review number {i}" for i in range(n)])),
    )
    numbers = np.arange(ITEMS)
    made["items"] = pl.DataFrame({
        "id": [f"item-{i}" for i in numbers], "title": [f"title {i} of things" for i in numbers],
        "group": [[f"group{i % 5}", f"also{i % 3}"] for i in numbers], "brand": [f"brand {i % 4}" for i in numbers],
        "price": numbers.astype(float), "about": [f"Lead {i} here. The rest of it {i}." for i in numbers],
    })  # fmt: skip
    return made


def with_values(card: dict[str, Any]) -> dict[str, Any]:
    card["events"] |= {"value": "v"}
    return card


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    tasks: dict[str, Any] = {name: {} for name in (*BEHAVIOUR, *ON_ITEMS, "interest")}
    tasks["click-zh"] = {"template": "click", "language": "zh", "most": 20}
    card = with_values(tiny_card(tables(), tasks=tasks))
    return prepare(card, tmp_path_factory.mktemp("derived") / "data", vocab_size=900)


def events_of(dataset: Dataset) -> dict[str, list[tuple[str, int, float | None, str]]]:
    """user -> (title or query, split, value, item id) of its events in order."""
    found: dict[str, list] = {}
    table = pl.read_parquet(dataset.path / "events.parquet")
    titles, ids, users = dataset.items["title"], dataset.item_ids, dataset.users["user_id"]
    for row in table.iter_rows(named=True):
        said = titles[row["item"]] if row["item"] >= 0 else row["text"]
        found.setdefault(users[row["user"]], []).append((said, row["split"], row["value"], ids[row["item"]] if row["item"] >= 0 else ""))  # fmt: skip
    return found


@pytest.mark.parametrize("task", BEHAVIOUR)
def test_an_instance_is_of_the_split_of_what_it_asks_for(world: Dataset, task: str):
    past = events_of(world)
    asked = {}
    for number, split in enumerate(SPLITS):
        of = read_instances(world, task, split)
        assert len(of)
        for row in of.fields.iter_rows(named=True):
            events = past[row["user_id"]]
            if "history" in row:
                told = [event["title"] for event in row["history"]]
                places = [
                    n for n in range(len(events) + 1) if [e[0] for e in events[max(0, n - len(told)) : n]] == told
                ]
                wanted = (lambda e, r=row: e[0] == r["query"]) if task == "query" else (lambda e, r=row: e[3] == r["item_id"])  # fmt: skip
                nexts = [events[n] for n in places if n < len(events)]
                assert any(wanted(e) and e[1] == number for e in nexts), (task, row)  # told up to the event, without it
                if split == "train":
                    assert all(any(e[0] == title and e[1] == 0 for e in events) for title in told)
            if task == "query":
                assert any(e[:2] == (row["query"], number) for e in events)
            elif task != "plausibility" or row["label"] == 1:
                assert any(e[3] == row["item_id"] and e[1] == number for e in events), (task, row)
                asked.setdefault((row["user_id"], row["item_id"]), set()).add(split)
    if task != "query":
        repeated = Counter((user, e[3]) for user, events in past.items() for e in events)
        assert all(len(splits) == 1 or repeated[key] > 1 for key, splits in asked.items())


def test_ratings_part_the_liked_from_the_others(world: Dataset):
    past = events_of(world)
    for task in ("click", "conversion", "sentiment"):
        of = read_instances(world, task, "train")
        labels = of.labels
        assert 0.3 < labels.mean() < 0.7
        rated: dict[int, list[float]] = {0: [], 1: []}
        for row in of.fields.iter_rows(named=True):
            values = [e[2] for e in past[row["user_id"]] if e[3] == row["item_id"]]
            if len(values) == 1:
                rated[row["label"]] += values
        assert max(rated[0]) < min(rated[1])


def test_held_out_pairs_have_a_false_one_of_an_item_never_had(world: Dataset):
    assert set(read_instances(world, "plausibility", "train").labels.tolist()) == {1}
    past = events_of(world)
    of = read_instances(world, "plausibility", "test")
    assert of.labels.tolist() == [1, 0] * (len(of) // 2)
    for row in of.fields.filter(pl.col("label") == 0).iter_rows(named=True):
        assert row["item_id"] not in {e[3] for e in past[row["user_id"]]}
    seen = dict(zip(world.item_ids, world.seen.tolist(), strict=True))
    assert all(seen[item] for item in of.fields.filter(pl.col("label") == 0)["item_id"])


def test_a_reason_names_what_two_items_share(world: Dataset):
    groups = dict(zip(world.items["title"], world.items["categories"].to_list(), strict=True))
    for row in read_instances(world, "explain", "train").fields.iter_rows(named=True):
        what, like = row["reason"].removeprefix("it is ").split(", like ")
        assert like in [event["title"] for event in row["history"]]
        assert set(what.split(", ")) == set(groups[like]) & set(groups[row["item"]])


@pytest.mark.parametrize("task", ON_ITEMS)
def test_items_held_out_are_held_out_everywhere(world: Dataset, task: str):
    held = set()
    for split in SPLITS:
        ids = set(read_instances(world, task, split).fields["item_id"])
        assert ids and not ids & held
        held |= ids if split != "train" else set()
    quiet = {world.row_of(item) for item in held}
    train = world.index["train_kind"]
    assert not quiet & {record.row for record in world.records("train").take(np.flatnonzero(train == ITEM))}
    assert (train == DOCUMENT).any()
    for other in BEHAVIOUR:
        fields = read_instances(world, other, "train").fields.filter(pl.col("item_id").is_in(list(held)))
        if other == "describe":
            assert not fields.height
        for column in set(fields.columns) & {"categories", "attributes", "description", "reason"}:
            assert (fields[column].fill_null("") == "").all(), (other, column)
        assert fields.height or other in ("describe", "explain", "query")


def test_texts_of_items_are_parted_as_they_say(world: Dataset):
    about = dict(zip(world.item_ids, world.items.iter_rows(named=True), strict=True))
    options = world.tasks[[t["name"] for t in world.tasks].index("topic")]["options"]
    assert options == [f"group{i}" for i in range(5)]
    for row in read_instances(world, "topic", "train").fields.iter_rows(named=True):
        assert options[row["label"]] == about[row["item_id"]]["categories"][0] == row["answer"]
    for row in read_instances(world, "summarise", "train").fields.iter_rows(named=True):
        assert f"{row['answer']} {row['description']}" == about[row["item_id"]]["text"]
    for row in read_instances(world, "complete", "train").fields.iter_rows(named=True):
        item = about[row["item_id"]]
        assert f"{row['start']} {row['rest']}" == f"{item['title']} {item['text']}"
    topic = read_instances(world, "topic", "test")
    for laid, answer in zip(topic.laid_out(400), topic.fields["answer"], strict=True):
        assert answer not in world.tokenizer.decode(laid.source)


def test_interests_of_users_held_out_are_not_told_in_training(world: Dataset):
    held = set()
    for split in ("valid", "test"):
        of = read_instances(world, "interest", split)
        held |= set(of.fields["user_id"])
        assert all(row["answer"] for row in of.fields.iter_rows(named=True))
    assert held and not held & set(read_instances(world, "interest", "train").fields["user_id"])
    told = read_instances(world, "click", "train").fields
    mine = told.filter(pl.col("user_id").is_in(list(held)))
    assert mine.height and (mine["interests"] == "").all() and (told["interests"] != "").any()


def test_most_holds_every_split(world: Dataset):
    sizes = {task["name"]: task["sizes"] for task in world.tasks}
    assert sizes["click-zh"]["train"] == 20 and sizes["click"]["train"] > 20


def test_chinese_is_chinese(world: Dataset):
    of = read_instances(world, "click-zh", "train")
    said = " ".join(world.tokenizer.decode(laid.source) for laid in of.laid_out(500))
    assert "用户会点击title" in said and "热度:前" in said and "later" not in said and "top " not in said


# -- words and numbers -------------------------------------------------------------------------------------------------


def test_pauses_and_shares_in_words():
    assert [span_of(s, "en") for s in (3599, 3600, 7200, 86_400, 3 * 86_400, 604_800, 31_536_000 * 2)] == [
        "", "an hour", "2 hours", "a day", "3 days", "a week", "2 years",
    ]  # fmt: skip
    assert gap_of(3 * 86_400, "zh") == "3天后" and gap_of(10, "zh") == "" and gap_of(604_800, "en") == "a week later"
    assert [rank_of(s, "en") for s in (0.001, 0.03, 0.1, 0.4, 0.9)] == ["top 1%", "top 5%", "top 20%", "top 50%", "lower half"]  # fmt: skip


def shown_tables() -> dict[str, pl.DataFrame]:
    made = tiny_tables()
    events = made["events"].sort("t")
    rng = np.random.default_rng(0)
    times = np.sort(rng.integers(int(events["t"].min()), int(events["t"].max()), 4000))
    item = rng.integers(0, 8, 4000)
    made["shown"] = pl.DataFrame({"u": [f"u{i}" for i in rng.integers(0, 60, 4000)], "i": [f"item-{i}" for i in item],
                                  "t": times, "c": rng.random(4000) < item / 8})  # fmt: skip
    return made


@pytest.mark.parametrize("rule", ["leave-one-out", "global-time"])
def test_impressions_are_split_where_the_events_are(rule: str, tmp_path: Path):
    made = shown_tables()
    shown = {"path": made["shown"], "user": "u", "item": "i", "time": "t", "clicked": "c"}
    card = tiny_card(made, impressions=shown, split=rule, tasks={"click": {"most": 300}})
    dataset = prepare(card, tmp_path / "data", vocab_size=640)
    events = pl.read_parquet(dataset.path / "events.parquet")
    rows = {user: number for number, user in enumerate(dataset.users["user_id"])}
    clicked = {(r["u"], r["i"]): set() for r in made["shown"].iter_rows(named=True)}
    for r in made["shown"].iter_rows(named=True):
        clicked[r["u"], r["i"]].add(r["c"])
    titles = dataset.items["title"].to_list()
    rated = 0
    for number, split in enumerate(SPLITS):
        for row in read_instances(dataset, "click", split).fields.iter_rows(named=True):
            own = events.filter(pl.col("user") == rows[row["user_id"]])
            before = own.filter(pl.col("split") <= number)["item"].to_list()
            told = [event["title"] for event in row["history"]]
            assert [titles[i] for i in before[: len(told)]] == told or len(told) == 30
            assert bool(row["label"]) in clicked[row["user_id"], row["item_id"]]
            rated += "CTR over the last 14 days" in row["statistics"]
    assert rated
    assert all(dataset.tasks[0]["sizes"].values())


def small_world() -> World:
    """Two users and three items on a clock, all of it training."""
    n = 6
    none = pl.Series([None] * n, dtype=pl.String)
    events = Events(
        users=np.array([0, 0, 0, 1, 1, 1]), items=np.array([0, 1, 0, 0, 2, -1], np.int32),
        times=np.array([0, 86_400, 90_000, 50, 31_536_000, 31_540_000]), fractions=pl.Series([0.0] * n),
        kinds=np.zeros(n, np.uint8), values=none.cast(pl.Float64), texts=pl.Series([None] * 5 + ["hat"]), kind_names=[],
        kind_weights=[],
    )  # fmt: skip
    items = pl.DataFrame({"item_id": list("abc"), "title": ["A", "B", ""], "text": [""] * 3, "attributes": [[]] * 3,
                          "categories": [["x"], ["y"], ["x", "z"]]}, schema_overrides={"attributes": pl.List(pl.String)})  # fmt: skip
    users = pl.DataFrame({"user_id": ["u", "v"], "attributes": [["age: 3"], []]}, schema_overrides={"attributes": pl.List(pl.String)})  # fmt: skip
    return World(items, users, events, np.zeros(n, np.uint8), None, True)


def test_a_moment_tells_what_was_before_it():
    world = small_world()
    moments = Moments(np.array([1, 0, 0]), np.array([6, 2, 0]), np.array([31_540_000, 90_000, 0]), np.zeros(3, np.uint8))  # fmt: skip
    told = told_users(world, moments, "en")
    assert told["user"].to_list() == ["", "age: 3", "age: 3"]
    assert [[(e["action"], e["gap"], e["title"]) for e in some] for some in told["history"].to_list()] == [
        [("", "", "A"), ("", "12 months later", "x"), ("searched for", "an hour later", "hat")],
        [("", "", "A"), ("", "a day later", "B")],
        [],
    ]  # fmt: skip
    assert told["interests"].to_list() == ["x, z", "x, y", ""]
    assert told["since"].to_list() == ["", "an hour later", ""]
    assert {place: dict(counts) for place, counts in ((p, Counter(c)) for p, c in counted_topics(world, moments))} == {
        0: {"x": 2, "z": 1}, 1: {"x": 1, "y": 1}, 2: {},
    }  # fmt: skip


def test_statistics_count_only_what_was_before():
    world = small_world()
    moments = Moments(np.array([0, 0, 0]), np.array([0, 2, 3]), np.array([0, 90_000, 86_400 * 800]), np.zeros(3, np.uint8))  # fmt: skip
    said = statistics(world, moments, np.array([0, 0, 0]), "en").to_list()
    assert said[0] == "nobody chose it before"
    assert said[1].endswith("the user chose x once in a day") and "popularity" in said[1]
    assert said[2].endswith("the user chose x twice in 2 years")
    assert statistics(world, moments, np.array([0, 0, 0]), "zh")[2].endswith("用户在2年内选择过x2次")


def test_what_the_dataset_lacks_is_said(tmp_path: Path):
    card = with_values(tiny_card(tables(), tasks={"click": {"least": 9}}))
    with pytest.raises(InputError, match="tasks.click.least: 9: the values of training events lie between 1 and 5"):
        prepare(card, tmp_path / "data", vocab_size=640)
    bare = tiny_tables()
    bare["items"] = bare["items"].select("id", "title", group=pl.lit(None, dtype=pl.String), brand=pl.lit(None, dtype=pl.String), price=pl.lit(None, dtype=pl.Float64), about=pl.lit(None, dtype=pl.String))  # fmt: skip
    for task, says in (("topic", "fewer than two"), ("explain", "categories that items of a user share"), ("interest", "categories of items"),
                       ("summarise", "texts, categories or attributes of items"), ("describe", "categories, attributes and texts"), ("sentiment", "an item, a text and a value")):  # fmt: skip
        with pytest.raises(InputError, match=f"tasks.{task}: .*{says}.*; give the task a table"):
            prepare(tiny_card(bare, tasks=[task]), tmp_path / "data", vocab_size=640)


def test_without_searches_and_long_texts_there_is_still_something_to_ask_for(tmp_path: Path):
    bare = tiny_tables()
    bare["items"] = bare["items"].with_columns(about=pl.lit(None, dtype=pl.String))
    data = prepare(tiny_card(bare, tasks=["query", "summarise"]), tmp_path / "data", vocab_size=640)
    titles = dict(data.items.select("item_id", "title").iter_rows())
    for split in SPLITS:
        asked = read_instances(data, "query", split).fields
        assert asked["query"].to_list() == [titles[item].lower() for item in asked["item_id"].to_list()]
    for row in read_instances(data, "summarise", "train").fields.iter_rows(named=True):
        assert row["summary"] == f"{row['item']}: {row['categories']}; {row['attributes']}"
