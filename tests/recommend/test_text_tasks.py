"""Texts of a tiny run: every task answers, the same whatever the batch; what fails is the template's; items are real ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from flax import nnx

from m6rec_jax.cli import SUCCESS, WRONG_INPUT, main
from m6rec_jax.config import ModelConfig
from m6rec_jax.data.instances.read import read_instances
from m6rec_jax.data.prepare import prepare
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.decoding.instances import InstanceScorer
from m6rec_jax.decoding.texts import Text
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import View
from m6rec_jax.recommend.histories import Past
from m6rec_jax.recommend.recommender import Recommender
from m6rec_jax.recommend.say import Setting
from m6rec_jax.recommend.say.asking import spoken, turns_of
from m6rec_jax.recommend.say.chat import MOST_ITEMS, converse
from m6rec_jax.recommend.say.finding import EQUAL
from m6rec_jax.vocab import BOS, ITEM, SPELL
from tests.fixtures import tiny_card, tiny_tables
from tests.recommend.conftest import saved_run

WITHOUT_PROMPT = ("describe", "summarise", "explain", "query", "complete")
CHAT = pl.DataFrame(
    {"turns": [[{"speaker": "USER", "title": f"something number {n}"}] for n in range(30)],
     "reply": [f"How about thing {n}?" for n in range(30)]}
)  # fmt: skip
MOOD = pl.DataFrame({"text": [f"text {n}" for n in range(30)], "label": [n % 2 for n in range(30)]})


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """(dataset with text tasks, a run of it with random parameters)."""
    root = tmp_path_factory.mktemp("told")
    tasks = {name: {} for name in WITHOUT_PROMPT} | {
        "explain-zh": {"template": "explain", "language": "zh"},
        "chat": {"path": CHAT},
        "sentiment": {"path": MOOD, "target": "label", "options": ["bad", "good"]},
    }
    data = prepare(tiny_card(tiny_tables(), tasks=tasks), root / "data", vocab_size=640)
    mixture = {"next-item": 0.5, "text-to-codes": 0.1} | dict.fromkeys(tasks, 0.1)
    return data, saved_run(data.path, root / "run", mixture)


@pytest.fixture(scope="module")
def recommender(told):
    return Recommender.load(told[1], dataset=told[0])


@pytest.fixture(scope="module")
def past(told):
    return Past(told[0]).take([3, 8, 20, 30])


def said_by(recommender, past, task, chosen=(0, 1, 2, 3), language="", items=None, **setting):
    wanted = Setting(**{"tokens": 12, "k": 3} | setting)
    speaker = recommender.speaker
    some = past.take(list(chosen))
    return speaker.speak(speaker.task(task, language, wanted, True, items is not None), some, [f"u{i}" for i in chosen], wanted, items=items)  # fmt: skip


@pytest.mark.parametrize("task", WITHOUT_PROMPT)
def test_every_task_answers_without_a_prompt_and_alike_in_any_batch(recommender, past, task):
    whole = said_by(recommender, past, task, show_steps=True)
    assert whole["user_id"].to_list() == ["u0", "u1", "u2", "u3"] and whole["text"].str.len_chars().min() > 0
    alone = pl.concat([said_by(recommender, past, task, [i], show_steps=True) for i in (0, 1, 2, 3)])
    assert alone.equals(whole)
    steps = [{step["step"]: step["text"] for step in one} for one in whole["steps"].to_list()]
    for row, step in zip(whole.iter_rows(named=True), steps, strict=True):
        assert row["grounded"] or row["text"] == row["template"] == step["template"]
        assert step["read"] and 0 <= row["grounding"] <= 1 and 0 <= row["copied"] <= 1
    assert (whole["item_id"].null_count() == 0) == (task in ("summarise", "explain", "complete"))
    written = [step.get("written") for step in steps]
    other = said_by(recommender, past, task, seed=1, show_steps=True)["steps"].to_list()
    assert written != [{step["step"]: step["text"] for step in one}.get("written") for one in other]


@pytest.mark.parametrize("task", ["describe", "query"])
def test_a_description_is_brought_to_real_items_that_the_user_has_not(recommender, past, told, task):
    made = said_by(recommender, past, task)
    best = recommender.recommend_histories(past, 1).rows[:, 0].tolist()
    assert not made["grounded"].all()
    for row, wanted in zip(made.iter_rows(named=True), best, strict=True):  # what a template says, it says of an item
        assert row["grounded"] or told[0].row_of(row["items"][0]) == wanted
    for items, alike, history in zip(made["items"].to_list(), made["similarity"].to_list(), past.known, strict=True):
        assert len(items) == len(set(items)) == 3 and alike[1:] == sorted(
            alike[1:], reverse=True
        )  # the first may be meant
        rows = [told[0].row_of(item) for item in items]
        assert None not in rows and not set(rows) & set(history.tolist())


def test_an_items_own_words_find_it(recommender, told):
    finder, nothing = recommender.speaker.finder, np.zeros(0, np.int32)
    for row in (5, 17, 40):
        rows, alike = finder.find([told[0].items["title"][row]], 2, [nothing])
        assert rows[0, 0] == row and alike[0, 0] > alike[0, 1]
        away, _ = finder.find([told[0].items["title"][row]], 2, [np.array([row])])
        assert row not in away
    rows, alike = finder.find(["kitchen"], 56, [nothing])
    by_text, _ = dataclasses.replace(finder, spells=False).find(["kitchen"], 56, [nothing])
    assert set(told[0].items["categories"].gather(rows[0, :5]).list.first()) == {"kitchen"}
    equal = np.round(alike[0] / EQUAL)
    assert (by_text[0] == rows[0][np.lexsort((rows[0], -equal))]).all()  # without the model equals come by row
    assert not np.array_equal(rows, by_text)  # with it, as it spells them


def test_what_holds_is_said_and_what_fails_is_the_templates(recommender, past, monkeypatch):
    """The right answer, of the template, must hold as it is; one about another item must not."""
    setting, speaker = Setting(tokens=12), recommender.speaker
    asked = speaker.task("summarise", "", setting, True, True)
    drafts = ["", ""]
    write = lambda prompts, **_: [Text(draft, (), "end") for draft in drafts]  # noqa: E731
    monkeypatch.setattr(recommender.engine, "write", write)
    right = speaker.speak(asked, past.take([]), [], setting, items=[9, 10])["template"].to_list()
    for given, holds in ((right, True), (right[::-1], False), (["", "so it is"], False)):
        drafts[:] = given
        made = speaker.speak(asked, past.take([]), [], setting, items=[9, 10])
        assert made["grounded"].to_list() == [holds] * 2
        assert made["text"].to_list() == (given if holds else right)
        assert made["user_id"].null_count() == 2 and made["item_id"].to_list() == ["item-9", "item-10"]


def test_a_reason_may_name_the_history_but_lends_nothing_from_it(recommender, past, monkeypatch):
    speaker, setting, item = recommender.speaker, Setting(tokens=12), 45  # garden
    other = next(row for row in past.known[3].tolist() if row // 10 != item // 10)
    group, title = recommender.items["categories"][other][0], recommender.titles[other]
    asked = speaker.task("explain", "", setting, True, True)
    for text, holds in ((f"it is garden, like {title}", True), (f"it is {group}, unlike garden", False)):
        monkeypatch.setattr(recommender.engine, "write", lambda prompts, text=text, **_: [Text(text, (), "end")])
        made = speaker.speak(asked, past.take([3]), ["u"], setting, items=[item])
        assert made["grounded"].to_list() == [holds], text


def test_every_user_with_every_item_that_is_named(recommender, past):
    made = said_by(recommender, past, "explain", chosen=[0, 1], items=[4, 5], temperature=0)
    assert list(zip(made["user_id"], made["item_id"], strict=True)) == [(u, f"item-{i}") for u in ("u0", "u1") for i in (4, 5)]  # fmt: skip
    chinese = said_by(recommender, past, "explain", chosen=[0, 1], items=[4, 5], language="zh")
    assert set(chinese["task"]) == {"explain-zh"} and all("它" in text for text in chinese["template"])


def test_a_prompt_begins_the_answer_and_is_what_is_completed(recommender, past):
    for task in ("query", "complete"):
        made = said_by(recommender, past, task, prompt="red shoes", show_steps=True)
        for steps in made["steps"].to_list():
            step = {one["step"]: one["text"] for one in steps}
            assert step["read"].endswith("red shoes") and (task == "complete" or step["written"].startswith("red shoes"))  # fmt: skip


def test_items_of_an_answer_are_real_and_named_once(recommender):
    engine = recommender.engine
    write, opened = engine.write, []

    def eager(prompts, **asked):
        """The model as it is, but that it opens an item wherever it may."""
        made = write(prompts, **asked | {"items": False, "most": [min(n, 2) for n in asked["most"]]})
        opened.append(list(asked["items"]))
        return [dataclasses.replace(one, finish="item" if may else one.finish) for one, may in zip(made, asked["items"], strict=True)]  # fmt: skip

    prompt = np.array([BOS, *engine.texts.desk.tokenizer.encode("red shoes")], np.int32)
    prompts = [(prompt, np.full(len(prompt), -1, np.int32))] * 2
    engine.write = eager
    try:
        answers = converse(engine, recommender.titles, prompts, Setting(tokens=30), [1, 2], None)
        few = converse(engine, recommender.titles, prompts, Setting(tokens=30), [1, 2], np.arange(56) == 7)
    finally:
        del engine.write
    for one in answers:
        assert len(set(one.items)) == len(one.items) == MOST_ITEMS
        assert all(recommender.titles[row] in one.text for row in one.items)
        at = np.flatnonzero(one.tokens == ITEM)
        assert [engine.vocab.spell(engine.codes[row]).tolist() for row in one.items] == [one.tokens[a + 1 : a + 2].tolist() for a in at]  # fmt: skip
        assert one.item_rows[at + 1].tolist() == one.items and len(one.tokens) - len(prompt) <= 30
    assert all(one.items == [7] for one in few)  # only real ones that may be listed; the second time none is left
    assert opened[0] == [True, True] and not any(opened[MOST_ITEMS])


@pytest.mark.parametrize("both_ways", [False, True])
def test_items_are_spelled_after_a_prompt_read_in_order_or_both_ways(told, both_ways):
    data = told[0]
    blueprint = Blueprint(
        ModelConfig(layers=2, width=16, heads=2), data.vocab, data.content.shape[1]
    )  # one layer reads alike
    deep = blueprint.bind(jax.tree.map(lambda x: 3 * x, blueprint.init(0)))
    engine = Engine(deep, data.codes, data.content, data.seen, length=64, tokenizer=data.tokenizer)
    prompt = np.array([SPELL, *data.tokenizer.encode("blue lipstick for kids"), ITEM], np.int32)
    at = jnp.arange(len(prompt))[None]
    view = View(at, jnp.zeros_like(at), jnp.full_like(at, len(prompt)) if both_ways else at + 1)
    model = nnx.merge(engine._define, engine.params)
    hidden = model.hidden(jnp.asarray(prompt)[None], jnp.full_like(at, -1), view, engine.items)
    logp = jax.nn.log_softmax(model.logits(hidden[:, -1], 1, engine.items))[0, engine.codes[:, 0]]
    found = engine.spell([prompt], 5, both_ways=both_ways)
    assert found.rows[0].tolist() == np.argsort(-logp, kind="stable")[:5].tolist()
    np.testing.assert_allclose(found.scores[0], np.sort(logp)[::-1][:5], rtol=1e-4)


def test_the_model_itself_may_open_an_item_and_otherwise_never_does(recommender):
    engine = recommender.engine
    prompts = [[BOS, *engine.texts.desk.tokenizer.encode(f"number {n}")] for n in range(40)]
    asked = {"most": 20, "temperature": 3.0, "seeds": list(range(40))}
    plain, may = engine.write(prompts, **asked), engine.write(prompts, **asked, items=True)
    assert not any(one.finish == "item" for one in plain) and any(one.finish == "item" for one in may)
    assert all(ITEM not in one.tokens for one in (*plain, *may))


def test_a_chat_is_answered_and_a_run_without_one_says_the_templates(recommender, past, told, tmp_path):
    made = said_by(recommender, past, "chat", prompt="USER: red shoes SYSTEM: for whom? USER: kids")
    assert made["text"].str.len_chars().min() > 0 and all(len(items) == 3 for items in made["items"].to_list())
    bare = Recommender.load(saved_run(told[0].path, tmp_path / "bare"), dataset=told[0])
    made = said_by(bare, past, "describe")
    assert not made["grounded"].any() and made["text"].to_list() == made["template"].to_list()
    assert made["items"].list.len().min() == 3


def test_an_option_is_chosen_as_the_scorer_of_instances_chooses(recommender, past, told):
    """The prompt is the text that is told; with it a training instance is what the verb lays out."""
    instances = read_instances(told[0], "sentiment", "train").take([0, 1])
    chances = InstanceScorer.load(told[1]).chances(instances)
    for text, wanted in zip(instances.fields["text"].to_list(), chances, strict=True):
        made = said_by(recommender, past, "classify", [0], prompt=text)
        assert made["task"].to_list() == ["sentiment"]
        assert made["probabilities"].to_list()[0] == pytest.approx(wanted, abs=5e-6)
        assert made["text"].to_list() == [("bad", "good")[int(wanted.argmax())]]
        assert made["probability"].to_list() == pytest.approx([wanted.max()], abs=1e-5)
    assert np.abs(chances[0] - chances[1]).max() > 2e-5  # so that the text counts


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--task", "descrbe", "--users", "all"], "task: descrbe: choose one of"),
        (["--task", "describe", "--users", "all", "--language", "de"], "language: de: choose one of: en, zh"),
        (["--task", "chat", "--users", "all"], "prompt: missing; chat needs a conversation"),
        (["--task", "chat", "--users", "all", "--prompt", "SYSTEM: hello"], "has a turn of the user"),
        (["--task", "chat", "--users", "all", "--prompt", "hello"], "begins with USER: or SYSTEM:"),
        (["--task", "describe", "--users", "all", "--items", "item-1"], "items: describe is about users"),
        (["--task", "explain", "--items", "item-1"], "users: none; explain needs users"),
        (["--task", "summarise", "--items", "item-1,nope"], "items: nope: not in the catalogue"),
        (["--task", "summarise"], "--users is missing"),
        (["--task", "describe", "--users", "all", "--top-p", "2"], "top_p=2.0: must be above 0, up to 1"),
        (["--task", "describe", "--users", "all", "--explain"], "--explain is of lists"),
        (["--users", "all", "--prompt", "x"], "--prompt is of texts; say which with --task"),
        (["--task", "describe", "--users", "all", "--engine", "popularity"], "no model was opened"),
    ],
)
def test_what_makes_no_sense_is_one_line(told, tmp_path, capsys, given, says):
    assert main(["generate", "--run", str(told[1]), "--out", str(tmp_path / "x.parquet"), *given]) == WRONG_INPUT
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert says in said[-1]
    assert not (tmp_path / "x.parquet").exists()


def test_the_verb_writes_the_same_file_in_any_parts(told, tmp_path, capsys):
    argv = ["generate", "--run", str(told[1]), "--task", "describe", "--users", "all", "--limit", "3", "--tokens", "8"]
    for name, more in (("a", []), ("b", ["--chunk", "1"])):
        assert main([*argv, *more, "--out", str(tmp_path / f"{name}.parquet")]) == SUCCESS
    assert "generate: 3 users" in capsys.readouterr().err
    whole = pl.read_parquet(tmp_path / "a.parquet")
    assert whole.equals(pl.read_parquet(tmp_path / "b.parquet")) and whole.height == 3
    assert {"user_id", "item_id", "text", "grounded", "grounding", "copied", "template", "task", "model_version", "items", "similarity"} == set(whole.columns)  # fmt: skip
    argv = ["generate", "--run", str(told[1]), "--task", "summarise", "--items", "item-3,item-7", "--tokens", "8"]
    assert main([*argv, "--out", str(tmp_path / "items.parquet")]) == SUCCESS
    assert pl.read_parquet(tmp_path / "items.parquet")["item_id"].to_list() == ["item-3", "item-7"]
    assert "generate: 2 items" in capsys.readouterr().err


def test_the_python_face_says_what_the_speaker_says(recommender):
    histories = [["item-1", "item-5"], ["item-30"]]
    made = recommender.say("explain", histories, items=["item-2"], tokens=8, seed=4)
    assert made["item_id"].to_list() == ["item-2"] * 2 and made["user_id"].to_list() == ["0", "1"]
    assert recommender.say("explain", histories, items=["item-2"], tokens=8, seed=4).equals(made)


def test_turns_and_tasks_are_found_by_their_names():
    assert turns_of("USER: a: b SYSTEM：c  USER: d") == [
        {"speaker": "USER", "title": "a: b"}, {"speaker": "SYSTEM", "title": "c"}, {"speaker": "USER", "title": "d"},
    ]  # fmt: skip
    assert not spoken("describe", "zh", []).learnt and spoken("describe", "zh", []).template.language == "zh"


def test_a_dataset_is_not_needed_by_a_run_that_has_its_own(tiny_run):
    own = Recommender.load(tiny_run)
    made = own.say("summarise", items=["item-5"], tokens=4)
    assert made["text"][0] == made["template"][0] == own.titles[5] + ": clothing; brand: brand 0; price high, top 40 percent" and not made["grounded"][0]  # fmt: skip
