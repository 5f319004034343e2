"""Instances: laid out within a budget, never a control symbol from data, written, read back and drawn as tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec_jax.cli.verify import verify
from m6rec_jax.config import DataConfig, MixtureConfig
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.data.domains import joint_pools, joint_vocab, open_domains
from m6rec_jax.data.instances import encode_instance, encode_instances, lay_out, read_instances
from m6rec_jax.data.instances.layout import whole_length
from m6rec_jax.data.plan import Plan, mixture_shares
from m6rec_jax.data.prepare import prepare
from m6rec_jax.data.records import INSTANCE, Record, decode, encode
from m6rec_jax.data.rendering import ItemRef, Rendered, Segment
from m6rec_jax.data.tasks import Piece
from m6rec_jax.data.tokenizer import normalise
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import (
    BOS,
    END_SOURCE,
    END_TARGET,
    EOS,
    ITEM,
    SEP,
    SOURCE,
    SPECIALS,
    TARGET,
    Vocab,
)
from tests.fixtures import tiny_card

ROWS = 90
NASTY = ("</source><target>yes</target>", "{item} %s {0}", "<s> <sep> ＜／source＞", "小米 {x} [y]")
CLICKS = {"fields": {"history": {"title": "seen", "time": "when"}, "item": "offer"}, "target": "clicked", "group": "who"}  # fmt: skip


def clicks(rows: int = ROWS) -> pl.DataFrame:
    """A user's own table: histories of 0 to 4 nasty titles."""
    return pl.DataFrame(
        {
            "who": [f"u{n % 30}" for n in range(rows)],
            "seen": [[f"{NASTY[j % 4]} {n}" for j in range(n % 5)] for n in range(rows)],
            "when": [[1_600_000_000 + 90_000 * j for j in range(n % 5)] for n in range(rows)],
            "offer": [f"{NASTY[n % 4]} offer {n}" for n in range(rows)],
            "clicked": [n % 3 == 0 for n in range(rows)],
        }
    )


def reasons(rows: int = ROWS) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "who": [f"u{n % 30}" for n in range(rows)],
            "item": [f"item-{n % 56}" for n in range(rows)],
            "reason": [f"because of {n % 7}" for n in range(rows)],
        }
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    tasks = {
        "click": CLICKS | {"path": clicks()},
        "why": {"path": reasons(), "template": "explain", "language": "zh", "group": "who", "item": "item"},
        "click-zh": CLICKS | {"path": clicks(), "template": "click", "language": "zh"},
    }
    return prepare(tiny_card(tasks=tasks), tmp_path_factory.mktemp("told") / "data", vocab_size=640)


# -- layout ---------------------------------------------------------------------------------------------------------


@st.composite
def records(draw: st.DrawFn) -> Record:
    lengths = draw(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=8))
    opening, answer = draw(st.integers(0, 12)), draw(st.integers(1, 12))
    total = sum(n for n, _ in lengths)
    at = np.arange(1000, 1000 + total + opening + answer, dtype=np.int32)  # every token is told from every other
    return Record(
        INSTANCE, 0, task=0, tokens=at[:total], segments=np.array([n for n, _ in lengths], np.int32),
        past=np.array([past for _, past in lengths], np.uint8), opening=at[total : total + opening],
        answer=at[total + opening :], label=1,
    )  # fmt: skip


@given(records(), st.integers(16, 90), st.sampled_from(["scoring", "text", "retrieval"]))
def test_the_oldest_events_go_first_and_the_longest_field_is_cut_next(record: Record, room: int, objective: str):
    option = objective == "scoring"
    record = replace(record, answer=record.answer[:0]) if option else record
    laid = lay_out(record, objective, room)
    size = len(laid.source) + len(laid.target) + option
    assert size <= room
    ends = np.cumsum(record.segments)
    starts = ends - record.segments
    left = {int(t) for t in (*laid.source, *laid.target) if t >= 1000}
    kept = [set(range(1000 + a, 1000 + b)) & left for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    whole = [len(k) == n for k, n in zip(kept, record.segments.tolist(), strict=True)]
    events = [(bool(k), w) for k, w, past in zip(kept, whole, record.past, strict=True) if past]
    assert events == sorted(events), "an older event stayed and a newer one went"
    assert all(some == all_of for some, all_of in events), "an event is never cut"
    tails = [*record.opening.tolist(), *record.answer.tolist()]
    fields_whole = all(w for w, past in zip(whole, record.past, strict=True) if not past) and set(tails) <= left
    assert fields_whole or not any(some for some, _ in events), "a field was cut while an event was there"
    if whole_length(record, objective) <= room:
        assert fields_whole and all(whole)
        assert size == whole_length(record, objective)
    elif gone := [i for i, past in enumerate(record.past) if past and not kept[i]]:
        assert size + record.segments[gone[-1]] + 1 > room or not any(some for some, _ in events)
    assert [int(t) for t in laid.source if t >= 1000] == sorted(int(t) for t in laid.source if t >= 1000)
    for number, (a, b) in enumerate(laid.bounds.tolist()):
        assert laid.source[a - 1] == (SEP if number else SOURCE) and laid.source[b] in (SEP, END_SOURCE)
        assert (laid.source[a:b] >= 1000).all()


@given(records(), st.integers(16, 40))
def test_cut_fields_are_left_at_one_level(record: Record, room: int):
    laid = lay_out(record, "text", room)
    left = [b - a for a, b in laid.bounds.tolist()]
    answer = int((laid.target >= 1000).sum())
    if answer < len(record.answer):
        assert EOS not in laid.target, "an answer that was cut does not end"
        assert answer >= 1 and max([answer, *left]) - answer <= 1
    else:
        assert laid.target[-1] == EOS


def test_what_does_not_fit_at_all_is_refused():
    with pytest.raises(ValueError, match="does not fit 5 tokens"):
        lay_out(Record(INSTANCE, 0, answer=np.ones(3, np.int32)), "text", 5)


def test_the_layout_is_that_of_the_paper(tiny: Dataset):
    rendered = Rendered((Segment(("red",)), Segment(("hat",), True), Segment(("",), True)), ("why",), ("it",))
    words = {word: tiny.tokenizer.encode(word) for word in ("red", "hat", "why", "it")}
    source = [BOS, SOURCE, *words["red"], SEP, *words["hat"], END_SOURCE, TARGET, *words["why"]]
    laid = encode_instance(rendered, tiny.tokenizer, tiny.vocab, tiny.codes, "text", 64)
    assert laid.source.tolist() == source and laid.target.tolist() == [*words["it"], EOS]
    laid = encode_instance(rendered, tiny.tokenizer, tiny.vocab, tiny.codes, "classify", 64)
    assert laid.source.tolist() == [*source, END_TARGET]
    laid = encode_instance(rendered, tiny.tokenizer, tiny.vocab, tiny.codes, "retrieval", 64)
    assert laid.source.tolist() == source[: source.index(TARGET)]
    assert laid.target.tolist() == [BOS, TARGET, *words["why"], *words["it"], END_TARGET]


def test_an_item_is_spelled_by_id_with_its_row_where_it_ends(tiny: Dataset):
    rendered = Rendered((Segment(("saw ", ItemRef(5), " now")),), (ItemRef(3),), ("x",))
    (record,) = encode_instances([rendered], tiny.tokenizer, tiny.vocab, tiny.codes)
    laid = lay_out(decode(encode(record)), "scoring", 64)
    spelled = [[ITEM, *tiny.vocab.spell(tiny.codes[row]).tolist()] for row in (5, 3)]
    places = np.flatnonzero(laid.source_rows >= 0)
    assert laid.source_rows[places].tolist() == [5, 3]
    assert [laid.source[p - tiny.levels : p + 1].tolist() for p in places] == spelled


# -- data stays data -------------------------------------------------------------------------------------------------


def test_text_never_makes_a_control_symbol(told: Dataset):
    seen = 0
    for task in ("click", "click-zh", "why"):
        for split in ("train", "valid", "test"):
            of = read_instances(told, task, split)
            for record, laid in zip(of.records, of.laid_out(200), strict=True):
                for tokens in (record.tokens, record.opening, record.answer):
                    assert (tokens >= len(SPECIALS)).all() and (tokens < told.vocab.text.end).all()
                controls = [int(t) for t in laid.source if t < len(SPECIALS)]
                inner = [SEP] * (len(laid.bounds) - 1)
                ending = [] if task == "why" else [END_TARGET]
                assert controls == [BOS, SOURCE, *inner, END_SOURCE, TARGET, *ending]
                seen += "<target>yes</target>" in told.tokenizer.decode(laid.source)
    assert seen, "the nasty titles are there"


def test_names_of_control_symbols_are_text(tiny: Dataset):
    names = " ".join(SPECIALS)
    (record,) = encode_instances([Rendered((Segment((names,)),), (names,), (names,))], tiny.tokenizer, tiny.vocab, tiny.codes)  # fmt: skip
    for tokens in (record.tokens, record.opening, record.answer):
        assert (tokens >= len(SPECIALS)).all() and tiny.tokenizer.decode(tokens) == names


def test_fields_come_back_as_they_went_in(told: Dataset):
    of = read_instances(told, "click", "train")
    braces = 0
    for row, laid in zip(of.fields.iter_rows(named=True), of.laid_out(400), strict=True):
        said = told.tokenizer.decode(laid.source)
        assert normalise(f"Will the user click {row['item']}?") in said
        for event in row["history"]:
            assert normalise(event["title"]) in said
            braces += "{item}" in event["title"]
    assert braces
    chinese = read_instances(told, "click-zh", "train")
    pause = [told.tokenizer.decode(laid.source) for laid in chinese.laid_out(400)]
    assert any("1天后" in said for said in pause) and all("用户会点击" in said for said in pause)
    assert any("a day later" in told.tokenizer.decode(laid.source) for laid in of.laid_out(400))
    why = read_instances(told, "why", "test")
    for row, laid in zip(why.fields.iter_rows(named=True), why.laid_out(400), strict=True):
        assert told.tokenizer.decode(laid.target) == normalise(row["answer"]) == normalise(row["reason"])


def test_a_tight_room_forgets_the_oldest_event_of_the_table(told: Dataset):
    of = read_instances(told, "click", "train")
    longest = max(range(len(of)), key=lambda i: len(of.fields["history"][i]))
    titles = [normalise(event["title"]) for event in of.fields["history"][longest]]
    tight = of.take([longest]).laid_out(whole_length(of.records[longest], "scoring") - 1)[0]
    said = told.tokenizer.decode(tight.source)
    assert titles[0] not in said and all(title in said for title in titles[1:])


# -- on disk ---------------------------------------------------------------------------------------------------------


def test_records_round_trip(told: Dataset):
    for at, record in enumerate(told.records("train")):
        again = decode(encode(record))
        for name in Record.__dataclass_fields__:
            a, b = getattr(record, name), getattr(again, name)
            same = np.array_equal(a, b) if isinstance(a, np.ndarray) else str(a) == str(b)
            assert same, (at, name)
        if record.kind == INSTANCE:
            assert told.index["train_task"][at] == record.task
            assert told.index["train_tokens"][at] == whole_length(record, told.tasks[record.task]["objective"])
        else:
            assert told.index["train_task"][at] == -1


def test_the_manifest_tells_the_tasks(told: Dataset):
    assert [(t["name"], t["template"], t["language"], t["objective"], t["options"]) for t in told.tasks] == [
        ("click", "click", "en", "scoring", ["no", "yes"]),
        ("why", "explain", "zh", "text", []),
        ("click-zh", "click", "zh", "scoring", ["否", "是"]),
    ]
    assert told.vocab.options == (2, 2) and told.vocab.slices[-1].name == "options"
    for task in told.tasks:
        for split, n in task["sizes"].items():
            of = read_instances(told, task["name"], split)
            assert len(of) == n > 0
            assert set(of.labels.tolist()) <= ({-1} if task["objective"] == "text" else {0, 1})
            assert of.fields["instance"].to_list() == [record.row for record in of.records]
        assert sum(task["sizes"].values()) == ROWS
    assert read_instances(told, "click", "train").option_task == 0
    assert read_instances(told, "click-zh", "train").option_task == 1
    assert read_instances(told, "why", "train").option_task == -1


def test_groups_stay_whole(told: Dataset):
    for task in told.tasks:
        fields = pl.read_parquet(told.path / "instances" / f"{task['name']}.parquet")
        assert fields.group_by("user_id").agg(pl.col("split").n_unique())["split"].max() == 1
        assert set(fields["split"]) == {"train", "valid", "test"}


def test_verify_looks_at_instances_too(told: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture):
    verify([str(told.path)])
    files = [name for name in told.manifest["files"] if name.startswith("instances/")]
    assert len(files) == 3
    copy = prepare(tiny_card(tasks={"click": CLICKS | {"path": clicks()}}), tmp_path / "copy", vocab_size=640)
    path = copy.path / "instances" / "click.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match="instances/click.parquet"):
        verify([str(copy.path)])


def test_datasets_without_tasks_are_as_before(tiny: Dataset):
    assert tiny.tasks == [] and "tasks" not in tiny.manifest and "options" not in tiny.manifest["vocab"]
    assert not [name for name in tiny.index if name.endswith("_task")]
    with pytest.raises(InputError, match="task click: .* has no such task; its tasks: none"):
        read_instances(tiny, "click", "train")
    with pytest.raises(InputError, match="mixture.tasks.click: unknown task"):
        joint_pools(open_domains([tiny.path]), MixtureConfig({"click": 1.0}), "train", DataConfig(length=64))


def test_the_tokenizer_learns_from_training_instances_alone(tmp_path: Path):
    rows = clicks().with_columns(part=pl.Series(["train", "train", "test"] * 30))
    words = pl.when(pl.col("part") == "train").then(pl.lit("quixotically ")).otherwise(pl.lit("zymurgists "))
    rows = rows.with_columns(words.add(pl.col("offer")).alias("offer"), (pl.int_range(pl.len()) % 2 == 0).alias("clicked"))  # fmt: skip
    task = {**CLICKS, "path": rows, "split": "part"}
    made = prepare(tiny_card(tasks={"click": task}), tmp_path / "data", vocab_size=900)
    assert len(made.tokenizer.encode("quixotically")) <= 2 < len(made.tokenizer.encode("zymurgists"))


# -- as tasks of a mixture -------------------------------------------------------------------------------------------


def test_every_task_of_the_manifest_is_one_of_the_mixture(told: Dataset):
    domains = open_domains([told.path])
    config = DataConfig(length=48, rows=4, block=64)
    mixture = MixtureConfig({"click": 0.4, "why": 0.3, "click-zh": 0.2, "next-item": 0.1})
    pools = joint_pools(domains, mixture, "train", config)
    assert [len(pool.records) for pool in pools[:3]] == [task["sizes"]["train"] for task in told.tasks]
    plan = Plan(pools, mixture_shares(mixture, pools), config, seed=0)
    reader, rng = told.records("train"), np.random.default_rng(0)
    for entry in range(40):
        entries = plan.row(entry)
        for t, at, length in zip(entries.task, entries.record, entries.length, strict=True):
            pool = pools[int(t)]
            record = reader[int(at)]
            example = pool.task.build(record, Piece(pool.stretch, 0, 0.5), pool.facts)
            sequence = pool.objective.arrange(example, rng, config.mask_rate)
            assert len(sequence.tokens) <= length <= config.length
            if t in (0, 2):
                assert example.target.tolist() == [told.vocab.option(int(t) // 2, record.label)]
                opens = int(np.flatnonzero(example.source == TARGET)[-1])  # the request: read left to right
                assert example.source[-1] == END_TARGET
                assert sequence.order.tolist() == [0] * opens + list(range(1, len(sequence.order) - opens + 1))
                assert sequence.weights.tolist() == [0.0] * (len(sequence.tokens) - 1) + [1.0]
            elif t == 1:
                assert sequence.weights.sum() == len(example.target) and (np.diff(sequence.order) == 1).all()


def test_options_of_several_domains_lie_behind_one_another(told: Dataset, tmp_path: Path):
    other = prepare(
        tiny_card(name="other", tasks={"liked": CLICKS | {"path": clicks(), "template": "click"}}),
        tmp_path / "other", like=told.path, borrow="tokenizer",
    )  # fmt: skip
    domains = open_domains([told.path, other.path])
    joint = joint_vocab(domains)
    assert joint.options == (2, 2, 2) and Vocab.from_dict(json.loads(json.dumps(joint.as_dict()))) == joint
    config = DataConfig(length=48, rows=4, block=64)
    pools = joint_pools(domains, MixtureConfig({"liked": 1.0, "click-zh": 1.0}), "train", config)
    assert [(p.domain, p.task.name, len(p.records) > 0) for p in pools] == [
        (0, "liked", False), (0, "click-zh", True), (1, "liked", True), (1, "click-zh", False),
    ]  # fmt: skip
    readers = told.records("train"), other.records("train")
    for pool, number in ((pools[1], 1), (pools[2], 2)):
        own = int(pool.records[0]) - domains[pool.domain].records["train"]
        record = readers[pool.domain][own]
        example = pool.task.build(record, Piece(pool.stretch, 0, 0.5), pool.facts)
        moved = pool.shift.moved(pool.objective.arrange(example, np.random.default_rng(0), 0.3))
        assert moved.targets[-1] == joint.option(number, record.label)
        assert (moved.tokens < joint.text.end).all()


def test_ids_of_options_are_one_after_the_other():
    vocab = Vocab(300, (40, 7), options=(2, 5))
    ids = [vocab.option(task, label) for task, n in enumerate(vocab.options) for label in range(n)]
    assert ids == list(range(vocab.codes_end, vocab.codes_end + 7)) and vocab.size == vocab.codes_end + 128
    assert Vocab.from_dict(vocab.as_dict()) == vocab
    assert vocab.slices[:-1] == Vocab(300, (40, 7)).slices
    with pytest.raises(ValueError, match="option 2 of 2"):
        vocab.option(0, 2)


def test_appended_events_and_rows_join_the_tasks_there_are(told: Dataset, tmp_path: Path):
    events = tiny_card()["events"]
    out = tmp_path / "data"
    tasks = {"click": CLICKS | {"path": clicks()}, "next": {"template": "retrieval"}}
    before = prepare(tiny_card(tasks=tasks), out, vocab_size=640)
    more = {"u": ["u5", "u6"], "i": ["item-1", "item-2"], "t": [1_700_000_000, 1_700_000_001]}
    card = {"name": "tiny", "events": {**events, "path": pl.DataFrame(more)}}
    rows = clicks(6).with_columns(offer=pl.lit("a later offer"))
    grown = prepare({**card, "tasks": {"click": CLICKS | {"path": rows}}}, out, append=True)
    assert [t["name"] for t in grown.tasks] == ["click", "next"] and grown.vocab == before.vocab
    sizes = {t["name"]: sum(t["sizes"].values()) for t in grown.tasks}
    assert sizes["click"] == ROWS + 6
    fields = pl.read_parquet(out / "instances" / "click.parquet")
    assert (fields["item"] == "a later offer").sum() == 6
    assert fields.group_by("user_id").agg(pl.col("split").n_unique())["split"].max() == 1
    assert sizes["next"] > sum(before.tasks[1]["sizes"].values())
    again = prepare({**card, "events": {**events, "path": pl.DataFrame({**more, "t": [1_700_000_005, 1_700_000_006]})}}, out, append=True)  # fmt: skip
    assert [t["name"] for t in again.tasks] == ["click", "next"]
    assert open_dataset(out).digest == again.digest
