"""A task's own table: what it may look like, how it is split, and how it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from m6rec_jax.data.beam.accepted import check_accepted
from m6rec_jax.data.card import load_card
from m6rec_jax.data.instances import read_instances
from m6rec_jax.data.instances.gather import asked_tasks
from m6rec_jax.data.instances.table import own_rows
from m6rec_jax.data.prepare import prepare
from m6rec_jax.data.rendering import ItemRef, render
from m6rec_jax.data.splits import SPLITS
from m6rec_jax.data.template import load_template
from m6rec_jax.errors import InputError
from tests.fixtures import tiny_card, tiny_tables

TABLES = tiny_tables()
MOODS = ("angry", "calm", "glad")


def rows(**task: Any) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """A task's table as it is read."""
    card = load_card(tiny_card(TABLES, tasks={"t": task}))
    (asked,) = asked_tasks(card)
    return own_rows(card, "t", asked.template, {"item-3": 3})


def moods(n: int = 60) -> pl.DataFrame:
    return pl.DataFrame({
        "text": [f"I am {MOODS[i % 3]} today, {i}" for i in range(n)], "mood": [MOODS[i % 3] for i in range(n)],
        "number": [i % 3 for i in range(n)], "who": [f"w{i % 20}" for i in range(n)], "day": list(range(n)),
        "part": [SPLITS[i // 3 % 3] for i in range(n)],
    })  # fmt: skip


MOOD = {"template": "sentiment", "target": "mood", "options": list(MOODS)}


@pytest.mark.parametrize("target", ["mood", "number"])
def test_labels_are_names_or_numbers(target: str):
    frame, options = rows(path=moods(), **MOOD | {"target": target})
    assert options == MOODS and frame["label"].to_list() == [i % 3 for i in range(60)]


def test_items_of_a_history_are_spelled_by_their_rows(tmp_path: Path):
    path = tmp_path / "next.yaml"
    path.write_text("{task: next, language: en, objective: retrieval, metric: recall@10, source: [{each: history, line: '{item:codes}'}], target: '{item}'}", encoding="utf-8")  # fmt: skip
    events = [[{"item": "item-3", "title": "a"}, {"item": "nowhere", "title": "b"}], [{"item": "item-3"}]]
    table = pl.DataFrame({"history": pl.Series([json.dumps(some) for some in events]), "item": ["item-3", "of text"]})
    frame, _ = rows(path=table, template=path)
    assert [[event["item"] for event in some] for some in frame["history"].to_list()] == [["3", None], ["3"]]
    assert frame["item"].to_list() == ["item-3", "of text"]  # the field of that name is text all the same
    (first, second) = (render(load_template(path), row) for row in frame.iter_rows(named=True))
    assert [segment.parts for segment in first.segments] == [(ItemRef(3),)] == [s.parts for s in second.segments]


def test_without_options_the_classes_are_those_of_the_data(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("{task: mood, language: en, objective: classify, metric: accuracy, source: '{text}'}", encoding="utf-8")  # fmt: skip
    assert rows(path=moods(), template=path, target="mood")[1] == MOODS
    assert rows(path=moods(), template=path, target="number")[1] == ("0", "1", "2")
    numbers = moods(36).with_columns(number=pl.int_range(pl.len()) % 12)
    assert rows(path=numbers, template=path, target="number")[1] == tuple(map(str, range(12)))  # 10 after 9


@pytest.mark.parametrize(
    "labels", [[True, False], [1, 0], [1.0, 0.0], ["1", "0"], ["yes", "no"], ["true", "False"], ["good", "bad"]]
)
def test_the_negative_option_is_the_first(labels: list[Any]):
    table = pl.DataFrame({"item": ["a", "b"], "y": labels})
    options = ["bad", "good"] if labels == ["good", "bad"] else ["no", "yes"]
    frame, found = rows(path=table, template="click", target="y", options=options)
    assert frame["label"].to_list() == [1, 0] and list(found) == options


HISTORIES = {"titles": [["a", "b"], [], ["c"]], "times": [[0, 90_000], [], [5]], "now": [800_000, 1, 6]}


@pytest.mark.parametrize("form", ["frame", "objects", "jsonl", "csv", "parquet"])
def test_histories_come_in_many_forms(form: str, tmp_path: Path):
    table = pl.DataFrame({**HISTORIES, "item": ["x", "y", "z"], "y": [0, 1, 1]})
    fields: dict[str, Any] = {"history": {"title": "titles", "time": "times"}}
    path: Any = table
    if form == "objects":
        events = [[{"title": t, "time": at} for t, at in zip(*both, strict=True)] for both in zip(HISTORIES["titles"], HISTORIES["times"], strict=True)]  # fmt: skip
        path, fields = table.with_columns(history=pl.Series(events)), {}
    elif form == "jsonl":
        path = tmp_path / "t.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in table.iter_rows(named=True)), encoding="utf-8")
    elif form == "csv":
        path = tmp_path / "t.csv"
        joined = [pl.col(c).cast(pl.List(pl.String)).list.join("|") for c in ("titles", "times")]
        table.with_columns(joined).write_csv(path)
    elif form == "parquet":
        path = tmp_path / "t.parquet"
        table.write_parquet(path)
    frame, _ = rows(path=path, template="click", fields=fields, target="y", time="now")
    assert [[(e["title"], e.get("gap")) for e in some] for some in frame["history"].to_list()] == [
        [("a", None), ("b", "a day later")], [], [("c", None)],
    ]  # fmt: skip
    assert frame["since"].to_list() == ["a week later", "", ""]
    assert frame["item"].to_list() == ["x", "y", "z"]


def test_splits_come_from_a_column_from_time_from_groups_or_from_rows():
    said, _ = rows(path=moods(), split="part", **MOOD)
    assert said["split"].to_list() == moods()["part"].to_list()
    dev = moods().with_columns(pl.col("part").replace({"valid": "DEV"}))
    assert rows(path=dev, split="part", **MOOD)[0]["split"].equals(said["split"])
    timed, _ = rows(path=moods().sample(fraction=1, shuffle=True, seed=1).with_columns(), time="day", time_unit="order", **MOOD)  # fmt: skip
    shuffled = moods().sample(fraction=1, shuffle=True, seed=1).with_columns(split=timed["split"])
    assert shuffled.sort("day")["split"].to_list() == ["train"] * 48 + ["valid"] * 6 + ["test"] * 6
    grouped, _ = rows(path=moods(), group="who", **MOOD)
    assert grouped.group_by("user_id").agg(pl.col("split").n_unique())["split"].max() == 1
    assert sorted(grouped.unique("user_id")["split"].to_list()) == ["test"] * 2 + ["train"] * 16 + ["valid"] * 2
    upside, _ = rows(path=moods().reverse(), group="who", **MOOD)
    assert upside.reverse().select("user_id", "split").equals(grouped.select("user_id", "split"))
    by_row, _ = rows(path=moods(), valid=0.2, test=0.3, **MOOD)
    assert by_row["split"].value_counts().sort("split")["count"].to_list() == [18, 30, 12]


def test_an_item_column_is_kept_and_may_be_spelled(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("{task: t, language: en, objective: text, metric: bleu, source: 'Saw {item:codes}', target: '{why}'}", encoding="utf-8")  # fmt: skip
    table = pl.DataFrame({"id": ["item-3", "nobody", None], "why": ["a", "b", "c"]})
    frame, _ = rows(path=table, template=path, item="id", fields={"item": "id"})
    assert frame["item"].to_list() == [3, -1, -1] and frame["item_id"].to_list() == ["item-3", "nobody", None]


def refusal(out: Path, **changes: Any) -> str:
    """The refusal of a card whose task is `changes`."""
    with pytest.raises(InputError) as raised:
        prepare(tiny_card(TABLES, tasks={"t": changes}), out / "data")
    message = str(raised.value)
    assert "\n" not in message and message.startswith("card: tasks.t")
    assert not (out / "data").exists()
    return message


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"template": "clik"}, "no such template; built in: chat, click"),
        ({"template": "click", "language": "de"}, "language: de: choose one of: en, zh"),
        ({"template": "chat"}, "chat cannot be made from events, items and users"),
        ({"template": "click", "fields": {"item": "x"}}, "fields: {'item': 'x'}: names a column, and the task has no table"),
        ({"template": "click", "typo": 1}, "typo: unknown key"),
        ({"template": "explain", "options": ["a", "b"]}, "options: its template is of objective text, which has none"),
        ({"template": "click"}, "click is made from impressions or rated events, and the events have no value"),
        ({"template": "sentiment"}, "sentiment is made from events with an item, a text and a value, and there are none"),
        ({"path": moods(), **MOOD, "fields": {"txt": "text"}}, "fields.txt: the template has no such field; its fields: item, text"),
        ({"path": moods(), **MOOD, "fields": {"text": "txt"}}, "fields.text: 'txt': no such column; the columns: text, mood"),
        ({"path": moods().drop("text"), **MOOD}, "fields.text: the template sentiment needs it, and there is no such column"),
        ({"path": moods(), **MOOD, "target": "moods"}, "target: 'moods': no such column; the columns: .* (did you mean mood?)"),
        ({"path": moods(), "template": "sentiment", "options": list(MOODS)}, "target: missing; name the column with the right option"),
        ({"path": moods(), **MOOD, "options": ["angry", "calm"]}, "'glad' is none of the 2 options, and the column holds 3 classes"),
        ({"path": moods(), **MOOD, "options": [*MOODS, "sad"]}, "options: 4 options, 3 classes in the data: no row is 'sad'"),
        ({"path": moods(), **MOOD, "split": "part", "time": "day"}, "split: 'part': and time: day both part the rows"),
        ({"path": moods(), **MOOD, "split": "who"}, "split: who: 'w0' in row 1; write train, valid or test in every row"),
        ({"path": moods(), **MOOD, "valid": 1.5}, "valid: 1.5: a share must lie between 0 and 1"),
        ({"path": moods(), **MOOD, "valid": 0.5, "test": 0.5}, "valid: 0.5: with test 0.5 nothing is left"),
        ({"path": moods(), **MOOD, "group": "nobody"}, "group: 'nobody': no such column"),
        ({"path": moods().with_columns(who=None), **MOOD, "group": "who"}, "group: who: nothing in row 1"),
        ({"path": moods().with_columns(day=pl.lit("?")), **MOOD, "time": "day"}, "time: day: no time in row 1"),
        ({"path": moods(0), **MOOD}, "path: <table>: holds no row"),
        ({"path": "no.csv", **MOOD}, "path: no.csv: no such file"),
        ({"path": moods().with_columns(mood=pl.when(pl.col("day") == 59).then(pl.lit("calm")).otherwise(pl.lit("glad"))), "template": "sentiment",
          "options": ["calm", "glad"], "target": "mood", "time": "day", "time_unit": "order"}, "class 'calm': its 1 row is all in test; merge it"),
        ({"path": moods().with_columns(mood=None, text=pl.lit("x")), **MOOD}, "no instance to train on (60 rows have no label)"),
        ({"path": pl.DataFrame({"item": ["a"] * 9, "reason": [" "] * 9}), "template": "explain"}, "no instance to train on (9 rows have no answer)"),
        ({"path": pl.DataFrame({"item": ["a"], "stars": [4]}), "template": "click", "target": "stars"}, "'4' is none of the 2 options"),
        ({"path": pl.DataFrame({"item": ["a"], "y": [1], "t": [["a"]], "w": [[1, 2]]}), "template": "click", "target": "y",
          "fields": {"history": {"title": "t", "time": "w"}}}, "row 1: lists of different lengths (title 1, time 2)"),
        ({"path": pl.DataFrame({"item": ["a"], "y": [1], "w": [[1, 2]]}), "template": "click", "target": "y",
          "fields": {"history": {"time": "w"}}}, "only a history has columns for the parts of its events, title among them"),
    ],
)  # fmt: skip
def test_refusals_name_the_task_the_key_and_the_way_out(task: dict[str, Any], says: str, tmp_path: Path):
    message = refusal(tmp_path, **task)
    for part in says.split(".*"):
        assert part in message


def test_tasks_are_a_mapping_or_a_list_of_names():
    assert list(load_card(tiny_card(TABLES, tasks=["retrieval", "explain"])).tasks) == ["retrieval", "explain"]
    for tasks, says in (([], "where tasks are needed"), ({"a b": {}}, "a file is named after it"), ({"t": 3}, "where keys are needed")):  # fmt: skip
        with pytest.raises(InputError, match=says):
            load_card(tiny_card(TABLES, tasks=tasks))


def test_dirty_fields_are_cleaned_and_counted(tmp_path: Path):
    text = [f"fine {i}" for i in range(60)]
    text[3], text[4] = "bell \x07 inside", "x" * 100_000
    table = moods().with_columns(text=pl.Series(text))
    made = prepare(tiny_card(TABLES, tasks={"mood": {"path": table, **MOOD}}), tmp_path / "data", vocab_size=640)
    assert made.tasks[0]["counts"] == {"control_characters": 1, "white_space": 1, "overlong": 1}
    fields = pl.read_parquet(made.path / "instances" / "mood.parquet")
    assert fields["text"][3] == "bell inside" and fields["text"].str.len_chars().max() == 10_000


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path):
    table = moods().with_columns(mood=pl.when(pl.col("day") != 5).then("mood"))
    made = prepare(tiny_card(TABLES, tasks={"mood": {"path": table, **MOOD}}), tmp_path / "data", vocab_size=640)
    assert made.tasks[0]["counts"]["without_answer"] == 1 and sum(made.tasks[0]["sizes"].values()) == 59


def test_a_card_in_a_file_finds_table_and_template_beside_it(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("{task: mood, language: zh, objective: classify, metric: accuracy, source: '我：{text}'}", encoding="utf-8")  # fmt: skip
    moods().write_csv(tmp_path / "moods.csv")
    TABLES["events"].write_csv(tmp_path / "events.csv")
    task = {"path": "moods.csv", "template": "mine.yaml", "target": "mood", "group": "who"}
    card = {
        "name": "x",
        "events": {"path": "events.csv", "user": "u", "item": "i", "time": "t"},
        "tasks": {"mood": task},
    }
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    made = prepare(tmp_path / "card.yaml", tmp_path / "data", vocab_size=640)
    assert made.tasks[0]["language"] == "zh" and made.tasks[0]["options"] == list(MOODS)
    assert str(tmp_path) not in json.dumps(made.manifest)
    assert prepare(tmp_path / "card.yaml", tmp_path / "data", vocab_size=640).digest == made.digest  # prepared before
    changed = (tmp_path / "mine.yaml").read_text(encoding="utf-8").replace("我", "你")
    (tmp_path / "mine.yaml").write_text(changed, encoding="utf-8")
    with pytest.raises(InputError, match="holds a dataset made from other input"):
        prepare(tmp_path / "card.yaml", tmp_path / "data", vocab_size=640)
    with pytest.raises(InputError, match="tasks: mood: behaviour as text, which --runner beam does not do"):
        check_accepted(load_card(tmp_path / "card.yaml"))


def test_hidden_ids_are_hidden_in_instances_too(tmp_path: Path):
    (tmp_path / "key").write_bytes(bytes(range(32)))
    card = tiny_card(TABLES, tasks={"mood": {"path": moods(), "group": "who", **MOOD}, "retrieval": {}})
    made = prepare(card | {"privacy": {"ids": "hmac", "key": str(tmp_path / "key")}}, tmp_path / "data", vocab_size=640)
    for task in ("mood", "retrieval"):
        ids = read_instances(made, task, "train").fields["user_id"]
        assert ids.str.contains("^[0-9a-f]{32}$").all()
