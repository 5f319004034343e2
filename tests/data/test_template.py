"""Templates: what they refuse, how they are filled in, and that a value is never anything but data."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from m6rec_jax.data.rendering import ItemRef, render
from m6rec_jax.data.template import LANGUAGES, built_in, load_template, parse_template
from m6rec_jax.errors import InputError

TASKS = (
    "chat", "click", "complete", "conversion", "describe", "description", "explain", "interest", "plausibility", "query",
    "retrieval", "sentiment", "summarise", "title", "topic",
)  # fmt: skip
BODY = {
    "task": "like",
    "language": "en",
    "objective": "text",
    "metric": "bleu",
    "source": ["Who: {user}.", {"each": "history", "line": "[{gap}, ]{title}"}, "[Now {since}.]"],
    "opening": "About {item}:",
    "target": "{reason}",
}


def test_every_task_in_every_language_is_built_in_and_asks_for_the_same_fields():
    assert {language: tuple(built_in(language)) for language in LANGUAGES} == dict.fromkeys(LANGUAGES, TASKS)
    for task in TASKS:
        english, chinese = (load_template(task, language) for language in LANGUAGES)
        assert (english.task, english.language, chinese.language) == (task, "en", "zh")
        assert (english.objective, english.metric) == (chinese.objective, chinese.metric)
        assert set(english.fields) == set(chinese.fields) and set(english.needed) == set(chinese.needed)
        assert len(english.options) == len(chinese.options)
        assert load_template(task) == english


def filled(body: dict, **fields: object) -> tuple[list[str], str, str]:
    made = render(parse_template(body), fields)
    assert all(isinstance(part, str) for segment in made.segments for part in segment.parts)
    return ["".join(map(str, s.parts)) for s in made.segments], "".join(map(str, made.opening)), "".join(map(str, made.answer))  # fmt: skip


def test_lines_and_brackets_are_left_out_when_their_field_is_empty():
    history = [{"title": "Heat", "gap": ""}, {"title": "Alien", "gap": "a day later"}, {"gap": "no title"}, "Jaws"]
    full = filled(BODY, user="x", history=history, since="a week later", item="Up", reason="y")
    assert full == (["Who: x.", "Heat", "a day later, Alien", "Jaws", "Now a week later."], "About Up:", "y")
    assert filled(BODY, user=" ", item=None, reason="y") == ([], "", "y")
    with pytest.raises(KeyError):
        filled(BODY, item="Up", reason="y")  # a needed field is not merely empty


def test_numbers_are_written_as_people_write_them():
    body = BODY | {"source": "{n}", "opening": "{user}", "target": "{reason}"}
    assert filled(body, n=3.0, user=float("nan"), reason=2.5) == (["3"], "", "2.5")


def test_events_know_that_they_are_past_and_order_is_kept():
    made = render(parse_template(BODY), {"user": "x", "history": ["a", "b"], "item": "i", "reason": "r"})
    assert [segment.past for segment in made.segments] == [False, True, True]


@given(st.text(alphabet="{}[]\\:titleuser %s<>/", max_size=30), st.text(max_size=20))
def test_a_value_is_data_whatever_it_looks_like(value: str, other: str):
    segments, opening, answer = filled(BODY, user=value, history=[{"title": value}], item=value, reason=other)
    if value.strip():
        assert segments == [f"Who: {value}.", value]
        assert opening == f"About {value}:"
    assert answer == (other if other.strip() else "")


def test_escapes_write_braces_and_brackets():
    body = BODY | {"source": r"\[\{user\}\] \\ {user}"}
    assert filled(body, user="{user}", item="i", reason="r")[0] == [r"[{user}] \ {user}"]


def test_an_item_may_be_spelled():
    made = render(parse_template(BODY | {"opening": "Item {item:codes} it is"}), {"user": "x", "item": 7, "reason": "r"})  # fmt: skip
    assert made.opening == ("Item ", ItemRef(7), " it is")
    assert parse_template(BODY | {"opening": "{item:codes}"}).spelled == ("item",)
    unknown = render(parse_template(BODY | {"opening": "{item:codes}"}), {"user": "x", "item": -1, "reason": "r"})
    assert unknown.opening == ()


CHOICE = {key: value for key, value in BODY.items() if key != "target"} | {"objective": "classify"}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (BODY | {"sources": ["x"]}, "sources: unknown key (value ['x']); known keys: .* (did you mean source?)"),
        (BODY | {"language": "de"}, "language: de: choose one of: en, zh"),
        (BODY | {"objective": "score"}, "objective: score: choose one of"),
        (BODY | {"metric": None}, "metric: empty"),
        (BODY | {"target": ""}, "target: empty; give it a value"),
        (BODY | {"target": "  "}, "target: '  ': empty, or no text"),
        (BODY | {"target": "always this"}, "target: 'always this': has no field"),
        ({k: v for k, v in BODY.items() if k != "target"}, "target: missing; say what is to be written"),
        ({k: v for k, v in BODY.items() if k != "source"}, "source: missing"),
        (BODY | {"options": ["a", "b"]}, "options: only scoring and classify have options"),
        (CHOICE | {"target": "{x}"}, "target: a classify template is answered by one of its options"),
        (CHOICE | {"options": ["a"]}, "options: 1 options: at least two"),
        (CHOICE | {"options": ["a", "a"]}, "a name twice"),
        (CHOICE | {"objective": "scoring", "options": ["a", "b", "c"]}, "options: 3 options: scoring has two"),
        (BODY | {"source": "{us er}"}, "no field; write {name}"),
        (BODY | {"source": "{user"}, "no field; write {name}"),
        (BODY | {"source": "{user:hex}"}, "no field; write {name}"),
        (BODY | {"source": "user}"}, "} without its other half"),
        (BODY | {"source": "[{user}"}, "[ without its other half"),
        (BODY | {"source": "[user]"}, "brackets without a field"),
        (BODY | {"source": [{"user": None}]}, "user: unknown key; a line of events is"),
        (BODY | {"source": [{"each": "history"}]}, "where text is needed"),
        (BODY | {"opening": [{"each": "history", "line": "{title}"}]}, "events belong into the source"),
        (BODY | {"target": "{label}"}, "{label}: a column that every task has"),
        ("text", "where keys are needed"),
    ],
)  # fmt: skip
def test_refusals_are_one_line_and_name_the_key(body: object, says: str):
    with pytest.raises(InputError) as raised:
        parse_template(body, "mine.yaml")
    message = str(raised.value)
    assert "\n" not in message and message.startswith("mine.yaml")
    for part in says.split(".*"):
        assert part in message


def test_a_bare_yes_in_yaml_is_the_word(tmp_path: Path):
    body = yaml.safe_dump(CHOICE) + "options: [no, yes]\n"
    (tmp_path / "mine.yaml").write_text(body.replace("options: ['no', 'yes']", "options: [no, yes]"), encoding="utf-8")
    assert load_template(tmp_path / "mine.yaml").options == ("no", "yes")


def test_a_template_of_ones_own_is_read_from_its_file_again_when_that_changes(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(BODY), encoding="utf-8")
    assert load_template(path, "en").task == "like"
    with pytest.raises(InputError, match="language: en: the task asks for zh"):
        load_template(path, "zh")
    path.write_text(yaml.safe_dump(BODY | {"task": "likes"}), encoding="utf-8")
    assert load_template(path).task == "likes"
    for name, says in (("clik", "did you mean click"), (str(tmp_path / "no.yaml"), "no such file"), ("click", "")):
        if says:
            with pytest.raises(InputError, match=says):
                load_template(name)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        load_template(path)
    path.write_text("a: [", encoding="utf-8")
    with pytest.raises(InputError, match="not YAML"):
        load_template(path)
    with pytest.raises(InputError, match="language: de: choose one of"):
        load_template("click", "de")
