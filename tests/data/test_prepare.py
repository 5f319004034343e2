"""From tables to a dataset: nothing held out leaks, nothing half-written stays, what is there can grow."""

import filecmp
import json
import os
import re
import shutil

import numpy as np
import pandas as pd
import polars as pl
import pytest

from m6rec_jax.artifacts.manifest import read_manifest
from m6rec_jax.artifacts.run import Run, TrainedOn, write_run
from m6rec_jax.config import Config
from m6rec_jax.data import prepare as module
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.prepare import prepare
from m6rec_jax.data.records import HISTORY, ITEM
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import CONTROL_SYMBOLS, SPECIALS
from tests.fixtures import ITEMS, tiny_card, tiny_tables

SMALL = {"vocab_size": 640, "codebook": 8}
LEARNT = ("train-00000.arrayrecord", "transitions.npz", "tokenizer.model", "codes.npz")


def histories(data, split="test") -> dict[str, list[tuple[str, int]]]:
    """user id -> [(item id, time)]."""
    names, found = data.users["user_id"], {}
    for record in data.records(split):
        if record.kind == HISTORY:
            items = [data.item_ids[i] if i >= 0 else "" for i in record.items]
            found[names[record.row]] = list(zip(items, record.times.tolist(), strict=True))
    return found


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("split", ["leave-one-out", {"rule": "ratio", "valid": 0.2, "test": 0.2}, "global-time"])
def test_held_out_events_reach_nothing_that_is_learnt(tmp_path, levels, split):
    """Other items in the held-out events: every byte that training, memory, codes and tokenizer see stays the same."""
    tables = tiny_tables(kinds=True)
    first = prepare(tiny_card(tables, split=split), tmp_path / "first", levels=levels, **SMALL)
    kept = pl.read_parquet(first.path / "events.parquet")
    users, held = first.users["user_id"], kept.filter(pl.col("split") > 0)
    keys = {(users[u], t) for u, t in zip(held["user"], held["time"], strict=True)}
    moved = tables["events"].with_columns(
        i=pl.Series(
            [f"item-{(int(i[5:]) * 7 + 11) % ITEMS}" if i and (u, t) in keys else i for u, i, t in tables["events"].select("u", "i", "t").rows()]
        ),
        q=pl.Series(["something else entirely" if q and (u, t) in keys else q for u, q, t in tables["events"].select("u", "q", "t").rows()]),
    )  # fmt: skip
    second = prepare(tiny_card(tables | {"events": moved}, split=split), tmp_path / "second", levels=levels, **SMALL)
    assert second.manifest["sizes"] == first.manifest["sizes"]
    assert histories(second) != histories(first)
    for name in LEARNT:
        assert filecmp.cmp(first.path / name, second.path / name, shallow=False), name
    for name in ("events", "seen"):
        assert second.items[name].equals(first.items[name])
        assert name == "seen" or second.users[name].equals(first.users[name])


def test_held_out_texts_do_not_reach_the_tokenizer(tmp_path, tiny):
    quiet = [r.row for r in tiny.records("valid") if r.kind == ITEM]
    tables = tiny_tables()
    title = [f"zzqq xkcd {row} " * 9 if row in quiet else t for row, t in enumerate(tables["items"]["title"])]
    changed = tables | {"items": tables["items"].with_columns(title=pl.Series(title))}
    made = prepare(tiny_card(changed), tmp_path / "changed", vocab_size=640)
    assert quiet and made.tokenizer.model == tiny.tokenizer.model
    for name in ("train-00000.arrayrecord", "transitions.npz"):
        assert filecmp.cmp(made.path / name, tiny.path / name, shallow=False)


def test_the_same_input_gives_the_same_bytes_and_costs_nothing_the_second_time(tmp_path, tiny, monkeypatch):
    made = prepare(tiny_card(), tmp_path / "again", codebook=16, vocab_size=640)
    assert made.digest == tiny.digest
    stamp = os.stat(made.path / "manifest.json").st_mtime_ns
    monkeypatch.setattr(module, "read_tables", None)  # not even read
    assert prepare(tiny_card(), tmp_path / "again", codebook=16, vocab_size=640).digest == tiny.digest
    assert os.stat(made.path / "manifest.json").st_mtime_ns == stamp


def test_pandas_and_polars_and_files_give_the_same_dataset(tmp_path, tiny):
    tables = tiny_tables()
    as_pandas = {name: pd.DataFrame(t.to_dicts(), columns=t.columns) for name, t in tables.items()}
    assert prepare(tiny_card(as_pandas), tmp_path / "pandas", vocab_size=640).digest == tiny.digest
    for name, table in tables.items():
        table.write_parquet(tmp_path / f"{name}.parquet")
    card = tiny_card({name: tmp_path / f"{name}.parquet" for name in tables} | {"events": tables["events"]})
    assert prepare(card, tmp_path / "files", vocab_size=640).digest == tiny.digest


def test_other_input_or_another_folder_is_never_overwritten(tmp_path):
    out = tmp_path / "out"
    prepare(tiny_card(), out, **SMALL)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(InputError, match="other input.*--append"):
        prepare(tiny_card(name="another"), out, **SMALL)
    with pytest.raises(InputError, match="other input"):
        prepare(tiny_card(), out, levels=3, **SMALL)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="full: not empty and not a dataset"):
        prepare(tiny_card(), tmp_path / "full", **SMALL)
    with pytest.raises(InputError, match="a file, not a folder"):
        prepare(tiny_card(), tmp_path / "full" / "thesis.txt", **SMALL)
    with pytest.raises(InputError, match="append"):
        prepare(tiny_card(), tmp_path / "nothing", append=True, **SMALL)
    (tmp_path / "empty").mkdir()
    assert prepare(tiny_card(), tmp_path / "empty", **SMALL).catalogue == ITEMS


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_manifest", fail)
    with pytest.raises(OSError, match="No space"):
        prepare(tiny_card(), tmp_path / "out", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("levels", [1, 3])
def test_like_keeps_old_codes_and_gives_new_items_codes_from_their_text(tmp_path, levels):
    tables = tiny_tables()
    first = prepare(tiny_card(tables), tmp_path / "first", levels=levels, **SMALL)
    new = pl.DataFrame({"id": ["new-1", "new-2"], "title": ["classic red shoes 99", "unheard of"], "group": ["clothing", "?"],
                        "brand": ["brand 0", "x"], "price": [3.0, None], "about": ["", ""]})  # fmt: skip
    items = pl.concat([new[:1], tables["items"][::-1], new[1:]])  # another order, one retired
    items = items.filter(pl.col("id") != "item-5")
    events = tables["events"].filter(pl.col("i") != "item-5").with_columns(i=pl.col("i").replace("item-9", "new-1"))
    card = tiny_card(tables | {"items": items, "events": events})
    second = prepare(card, tmp_path / "second", like=first.path)
    assert second.item_ids[:ITEMS] == first.item_ids and second.item_ids[ITEMS:] == ["new-1", "new-2"]
    assert (second.codes[:ITEMS] == first.codes).all() and len(np.unique(second.codes, axis=0)) == ITEMS + 2
    assert second.tokenizer.model == first.tokenizer.model and second.levels == levels
    assert [s.offset for s in second.vocab.slices] == [s.offset for s in first.vocab.slices]
    assert second.vocab.size == first.vocab.size  # the new rows were spare
    np.testing.assert_allclose(second.content[:ITEMS], first.content, atol=1e-6)
    assert np.argmax(first.content @ second.content[ITEMS]) == first.row_of("item-0")
    assert second.items.filter(~pl.col("listed"))["item_id"].to_list() == ["item-5"] and not second.seen[5]
    if levels == 3:
        twin = first.items["title"].to_list().index("classic red shoes 0")
        assert second.codes[ITEMS, 0] == first.codes[twin, 0]
    assert second.seen[second.row_of("new-1")] and not second.seen[second.row_of("new-2")]


def test_like_another_domain_shares_text_and_has_its_own_items(tmp_path, tiny):
    tables = tiny_tables()
    events = tables["events"].with_columns(i="b-" + pl.col("i"))
    items = tables["items"].with_columns(id="b-" + pl.col("id"))[:50]
    card = tiny_card(tables | {"events": events, "items": items})
    other = prepare(card, tmp_path / "other", like=tiny.path)
    assert other.catalogue == 50 and other.codes[:, 0].tolist() == list(range(50))
    assert other.tokenizer.model == tiny.tokenizer.model


def test_like_something_else_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder: neither a dataset nor a run"):
        prepare(tiny_card(), tmp_path / "out", like=tmp_path / "folder")


@pytest.mark.parametrize("kinds", [False, True])
def test_appending_gives_the_histories_of_preparing_all_at_once(tmp_path, kinds):
    tables = tiny_tables(kinds=kinds)
    events = tables["events"].sort("t", maintain_order=True)
    cut = int(events["t"].quantile(0.7))
    early, late = events.filter(pl.col("t") <= cut), events.filter(pl.col("t") > cut)
    whole = prepare(tiny_card(tables), tmp_path / "whole", **SMALL)
    out = tmp_path / "grown"
    before = prepare(tiny_card(tables | {"events": early}), out, levels=3, **SMALL)
    new = pl.DataFrame(
        {"id": ["new"], "title": ["new hat"], "group": ["music"], "brand": ["b"], "price": [1.0], "about": [""]}
    )
    extra = late[-1:].with_columns(t=pl.col("t") + 60, i=pl.lit("new"))
    if kinds:
        extra = extra.with_columns(k=pl.lit("buy"), q=pl.lit(None, pl.String))
    late_with_new = pl.concat([late, extra])
    card = tiny_card(tables | {"events": late_with_new, "items": new})
    del card["corpus"], card["users"]
    grown = prepare(card, out, append=True)
    found = histories(grown)
    last_user = late["u"][-1]
    assert found[last_user][-1][0] == "new"
    for user, history in histories(whole).items():
        if user != last_user:
            assert sorted(found[user]) == sorted(history)
            assert [t for _, t in found[user]] == sorted(t for _, t in found[user])
    assert (grown.codes[:ITEMS] == before.codes).all() and grown.item_ids == [*before.item_ids, "new"]
    assert grown.manifest["sizes"]["documents"] == before.manifest["sizes"]["documents"] == 24
    assert grown.users.filter(pl.col("user_id") == "u5")["attributes"].to_list() == [["age: 25"]]
    digest = grown.digest
    assert prepare(card, out, append=True).digest == digest  # the same events again change nothing
    assert len(read_manifest(out, "dataset", 1)["inputs"]) == 2


def test_appending_to_an_order_puts_new_events_behind_the_old(tmp_path):
    first = {"name": "s", "events": {"path": tmp_path / "a.txt", "format": "sequences"}}
    (tmp_path / "a.txt").write_text("u1 a b c d\nu2 b c d\n")
    prepare(first, tmp_path / "out", **SMALL)
    (tmp_path / "b.txt").write_text("u1 e a\nu3 a b c\n")
    grown = prepare(
        {"name": "s", "events": {"path": tmp_path / "b.txt", "format": "sequences"}}, tmp_path / "out", append=True
    )
    assert {u: [i for i, _ in h] for u, h in histories(grown).items()} == {
        "u1": list("abcdea"),
        "u2": list("bcd"),
        "u3": list("abc"),
    }
    with pytest.raises(InputError, match="same clock"):
        prepare(tiny_card(), tmp_path / "out", append=True)


def one_table(rows) -> dict:
    return {"name": "odd", "events": {"path": pl.DataFrame(rows, schema=["u", "i", "t"], orient="row"), "user": "u", "item": "i", "time": "t"}}  # fmt: skip


def test_a_catalogue_of_one_item(tmp_path):
    card = one_table([("a", "x", 1), ("b", "x", 2)]) | {"split": "leave-one-out"}
    for levels in (1, 3):
        data = prepare(card, tmp_path / str(levels), levels=levels)
        assert data.catalogue == 1 and len(data.records("train")) == 2 and len(data.records("test")) == 0
        assert data.content.shape[0] == 1 and data.manifest["sizes"]["short_users"] == 2


def test_no_text_anywhere_still_makes_a_dataset(tmp_path):
    rows = [(f"u{n % 9}", f"i{n * n % 23}", n) for n in range(120)]
    for levels in (1, 3):
        data = prepare(one_table(rows) | {"split": "leave-one-out"}, tmp_path / str(levels), levels=levels, codebook=4)
        assert len(np.unique(data.codes, axis=0)) == data.catalogue
        assert not data.content.any() and data.tokenizer.decode(data.tokenizer.encode("小米 x")) == "小米 x"
        assert (data.index["train_kind"] == HISTORY).all()


def test_all_events_at_one_instant(tmp_path):
    card = one_table([(f"u{n % 5}", f"i{n}", 77) for n in range(25)])
    with pytest.raises(InputError, match=r"split\.rule: global-time.*leave-one-out"):
        prepare(card, tmp_path / "global")
    data = prepare(card | {"split": "leave-one-out"}, tmp_path / "loo")
    assert [i for i, _ in histories(data)["u0"]] == ["i0", "i5", "i10", "i15", "i20"]  # source order
    assert not (tmp_path / "global").exists()


def test_users_under_three_events_train_only_and_are_counted(tiny):
    short = {f"u{n}" for n in range(4)}
    assert tiny.manifest["sizes"]["short_users"] == 4
    assert short <= set(histories(tiny, "train")) and not short & set(histories(tiny, "test"))


def test_the_manifest_is_plain_json_and_names_no_path(tiny, tmp_path):
    text = (tiny.path / "manifest.json").read_text()
    assert json.loads(text)["counts"]["near_duplicate_item"] >= 0
    assert str(tiny.path.parent) not in text and "/tmp" not in text
    assert open_dataset(tiny.path).manifest["split"]["rule"] == "leave-one-out"


def test_kinds_that_the_card_does_not_list_are_numbered_and_all_count(tmp_path):
    events = pl.DataFrame([("a", f"i{n}", n, k) for n, k in enumerate(["view", None, "buy", "view", "buy"])], schema=["u", "i", "t", "k"], orient="row")  # fmt: skip
    card = {
        "name": "k",
        "events": {"path": events, "user": "u", "item": "i", "time": "t", "kind": "k"},
        "split": "leave-one-out",
    }
    data = prepare(card, tmp_path / "out")
    assert data.kinds == ["", "buy", "view"] and data.manifest["kind_weights"] == [1.0, 1.0, 1.0]
    assert data.records("test")[0].kinds.tolist() == [2, 0, 1, 2, 1] and data.records("test")[0].targets == 1
    more = pl.DataFrame([("a", "i0", 9, "share"), ("a", "i1", 10, "buy")], schema=["u", "i", "t", "k"], orient="row")
    card["events"] = {**card["events"], "path": more}
    grown = prepare(card, tmp_path / "out", append=True)
    assert grown.kinds == ["", "buy", "view", "share"]  # a model's kind tokens keep their meaning
    assert grown.records("test")[0].kinds.tolist() == [2, 0, 1, 2, 1, 3, 1]


def test_thresholds_of_the_card_refuse_the_data(tmp_path):
    page = tmp_path / "out.quality.html"
    with pytest.raises(InputError, match=rf"quality\.min_users: 1000: 60 was found; see {page}, then"):
        prepare(tiny_card(quality={"min_users": 1000}), tmp_path / "out", **SMALL)
    assert list(tmp_path.iterdir()) == [page] and "min_users" in page.read_text()


def test_hidden_ids_are_nowhere_in_the_folder(tmp_path):
    (tmp_path / "key").write_bytes(bytes(range(32)))
    tables = tiny_tables()
    named = {n: t.with_columns(pl.col(c).str.replace("u", "private-person-")) for n, c, t in (("events", "u", tables["events"]), ("users", "id", tables["users"]))}  # fmt: skip
    bad = pl.concat([named["events"], named["events"][:1].with_columns(t=pl.lit(2**40))])
    card = tiny_card(tables | named | {"events": bad}, privacy={"ids": "hmac", "key": str(tmp_path / "key")})
    data = prepare(card, tmp_path / "out", **SMALL)
    assert data.manifest["counts"]["future_time"] == 1 and data.users["user_id"].n_unique() == 60
    for path in data.path.iterdir():
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content = pl.read_parquet(path).write_json().encode()
        assert b"private-person" not in content and bytes(range(32)) not in content, path.name
    with pytest.raises(InputError, match="inside the dataset"):
        card["privacy"]["key"] = str(tmp_path / "out" / "key")
        (tmp_path / "out" / "key").write_bytes(bytes(range(32)))
        prepare(card, tmp_path / "out", **SMALL)


def test_a_run_lends_as_a_dataset_does(tmp_path, tiny_levels):
    source = open_dataset(tiny_levels)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("items.parquet", "codes.npz", "tokenizer.model"):
        shutil.copy(source.path / name, run / name)
    trained = TrainedOn.of(source.path, source.digest, source.manifest)
    write_run(Run(run, Config(), source.vocab, source.content.shape[1], (trained,), "", ""))
    made = prepare(tiny_card(tiny_tables(seed=1, kinds=True)), tmp_path / "out", like=run)
    assert (made.codes == source.codes).all() and made.kinds == source.kinds and made.vocab == source.vocab
    plain = prepare(tiny_card(tiny_tables(seed=1)), tmp_path / "plain", like=run)
    assert plain.kinds == [*source.kinds, ""] and set(plain.records("test")[0].kinds) == {3}


def test_a_global_split_forgets_nothing_of_the_time_before(tmp_path):
    data = prepare(tiny_card(split={"rule": "global-time", "valid": 0.15, "test": 0.15}), tmp_path / "out", **SMALL)
    kept = pl.read_parquet(data.path / "events.parquet")
    ends = [kept.filter(pl.col("split") == s)["time"] for s in range(3)]
    assert ends[0].max() < ends[1].min() and ends[1].max() < ends[2].min()
    for split, number in (("valid", 1), ("test", 2)):
        for record in data.records(split):
            if record.kind == HISTORY:
                mine = kept.filter((pl.col("user") == record.row) & (pl.col("split") <= number))
                assert record.items.tolist() == mine["item"].to_list()
                assert record.targets == (mine["split"] == number).sum() > 0


def test_hostile_titles_reach_no_reserved_id(tmp_path):
    nasty = [
        *CONTROL_SYMBOLS,
        "\x00\x01 nul",
        "",
        "x" * 10_000_000,
        "＜ｍａｓｋ＞",
        "</s>",
        "\ud83d",
        "<item><sep>▁<next>",
    ]
    items = pl.DataFrame(
        {"id": [str(n) for n in range(len(nasty))], "title": [t.encode("utf-8", "replace").decode() for t in nasty]}
    )
    events = pl.DataFrame({"u": ["a", "b"] * 4, "i": [str(n) for n in range(8)], "t": list(range(8))})
    card = {"name": "n", "events": {"path": events, "user": "u", "item": "i", "time": "t"},
            "items": {"path": items, "id": "id", "title": "title"}, "split": "leave-one-out"}  # fmt: skip
    data = prepare(card, tmp_path / "out")
    said = [r for split in ("train", "valid") for r in data.records(split) if r.kind == ITEM]
    without = {"", "<source>", "</source>", "</s>"}  # nothing, and what are tags of HTML too
    assert len(said) == len(nasty) - len(without) and data.catalogue == len(nasty)
    assert all(r.tokens.min() >= len(SPECIALS) and len(r.tokens) <= 600 for r in said)


def test_kinds_without_a_column_of_kinds_put_no_token_before_events(tmp_path):
    """The example card with every section: it lists `kinds:`, and its events have no kind."""
    rows = [(f"u{n % 8}", f"i{n * n % 13}", n) for n in range(64)]
    pl.DataFrame(rows, schema=["user", "item", "t"], orient="row").write_csv(tmp_path / "events.csv")
    items = pl.DataFrame({"id": [f"i{n}" for n in range(13)], "title": [f"cup {n}" for n in range(13)], "categories": [["a", "b"]] * 13})  # fmt: skip
    items.write_ndjson(tmp_path / "items.jsonl")
    pl.DataFrame({"user": ["u1"], "age": [30], "gender": ["f"]}).write_csv(tmp_path / "users.csv")
    pl.DataFrame({"body": ["Cups are made of clay."]}).write_ndjson(tmp_path / "docs.jsonl")
    pl.DataFrame({"user": ["u1"], "item": ["i1"], "t": [3], "y": [1]}).write_csv(tmp_path / "shown.csv")
    (tmp_path / "card.yaml").write_text("""\
name: beauty
events: {path: events.csv, format: csv, user: user, item: item, time: t, time_unit: order}
items:  {path: items.jsonl, format: jsonl, id: id, title: title, categories: categories}
users:  {path: users.csv, format: csv, id: user, attributes: [age, gender]}
corpus: {path: docs.jsonl, format: jsonl, text: [body]}
impressions: {path: shown.csv, format: csv, user: user, item: item, time: t, clicked: y}
split: {rule: leave-one-out}
clean: {min_user_events: 3, min_item_events: 1, unknown_items: drop}
repeat: false
privacy: {ids: plain}
kinds: {view: 0.3, click: 0.5, buy: 1.0, search: 0}
""")
    data = prepare(tmp_path / "card.yaml", tmp_path / "out")
    assert data.kinds == [] and data.manifest["sizes"]["events"] == 64
    histories_ = data.index["train_kind"] == HISTORY
    assert (data.index["train_tokens"][histories_] == data.index["train_events"][histories_]).all()  # an event, a token


def test_what_an_appended_card_leaves_out_is_as_it_was(tmp_path):
    tables = tiny_tables(kinds=True)
    split = {"rule": "ratio", "valid": 0.2, "test": 0.2}
    out = tmp_path / "out"
    first = prepare(tiny_card(tables, split=split, repeat=True), out, levels=3, **SMALL)
    late = pl.DataFrame({"u": ["u9"], "i": ["item-3"], "t": [1_700_000_000], "k": ["view"], "q": [None]})
    card = tiny_card({**tables, "events": late.cast({"q": pl.String})})
    for key in ("split", "kinds", "items", "users", "corpus"):
        del card[key]
    for _ in range(2):  # and what the second card left out, the third may leave out too
        grown = prepare(card, out, append=True)
        for key in ("split", "repeat", "kinds", "kind_weights", "levels"):
            assert grown.manifest[key] == first.manifest[key], key
        assert grown.items.select("title", "listed").equals(first.items.select("title", "listed"))
        card["events"] = {**card["events"], "path": card["events"]["path"].with_columns(pl.col("t") + 60)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"split": "global-time"}, r"split: global-time \(valid 0\.1, test 0\.1\): .*ratio \(valid 0\.2, test 0\.2\)"),
        ({"split": {"rule": "ratio", "valid": 0.2, "test": 0.1}}, r"split: ratio \(valid 0\.2, test 0\.1\).*test 0\.2"),
        ({"repeat": False}, "repeat: false: .* has true"),
        ({"kinds": {"view": 1, "buy": 1, "search": 0}}, r"kinds\.view: 1: .* has 0\.3"),
        ({"privacy": {"ids": "hmac", "key": "KEY"}}, r"privacy\.ids: hmac: .* has plain"),
    ],
)
def test_an_appended_card_that_contradicts_the_dataset_is_refused(grown_from, tmp_path, change, said):
    (tmp_path / "key").write_bytes(bytes(range(32)))
    if "privacy" in change:
        change = {"privacy": {"ids": "hmac", "key": str(tmp_path / "key")}}
    tables = tiny_tables(kinds=True)
    card = tiny_card(tables, split={"rule": "ratio", "valid": 0.2, "test": 0.2}, repeat=True) | change
    before = {p.name: p.read_bytes() for p in grown_from.iterdir()}
    with pytest.raises(InputError, match=f"^card: {said}"):
        prepare(card, grown_from, append=True)
    assert {p.name: p.read_bytes() for p in grown_from.iterdir()} == before


@pytest.fixture(scope="module")
def grown_from(tmp_path_factory):
    card = tiny_card(tiny_tables(kinds=True), split={"rule": "ratio", "valid": 0.2, "test": 0.2}, repeat=True)
    return prepare(card, tmp_path_factory.mktemp("grown") / "out", levels=3, **SMALL).path


@pytest.mark.parametrize(
    ("lacks", "said"), [("privacy", "manifest.json: privacy"), ("fraction", "events.parquet: fraction")]
)
def test_a_dataset_of_an_earlier_make_takes_no_more_events(tmp_path, tiny_dataset, lacks, said):
    out = tmp_path / "out"
    shutil.copytree(tiny_dataset, out)
    if lacks == "privacy":
        body = json.loads((out / "manifest.json").read_text())
        del body["privacy"], body["seal"]
        (out / "manifest.json").write_text(json.dumps(body))
    else:
        pl.read_parquet(out / "events.parquet").drop("fraction").write_parquet(out / "events.parquet")
    late = {"events": pl.DataFrame({"u": ["u9"], "i": ["item-3"], "t": [1_700_000_000]})}
    with pytest.raises(
        InputError, match=rf"{out}: prepared by an earlier version \({said} missing\).*prepare it again"
    ):
        prepare(tiny_card(tiny_tables() | late), out, append=True)


def test_a_dataset_whose_events_are_damaged_takes_no_more(tmp_path, tiny_dataset):
    shutil.copytree(tiny_dataset, tmp_path / "out")
    (tmp_path / "out" / "events.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"events\.parquet: not readable .*prepare the dataset again"):
        prepare(tiny_card(repeat=False), tmp_path / "out", append=True)


def test_kinds_cannot_be_weighed_afterwards(tmp_path, tiny_dataset):
    shutil.copytree(tiny_dataset, tmp_path / "out")
    with pytest.raises(InputError, match=r"kinds: .*: the dataset .* has events without a kind; leave `kinds` out"):
        prepare(tiny_card(tiny_tables(kinds=True)), tmp_path / "out", append=True)


def test_hidden_users_are_joined_under_the_same_key_only(tmp_path):
    for name, first in (("key", 0), ("other", 1)):
        (tmp_path / name).write_bytes(bytes(range(first, first + 32)))
    card = tiny_card(privacy={"ids": "hmac", "key": str(tmp_path / "key")})
    data = prepare(card, tmp_path / "out", **SMALL)
    with pytest.raises(InputError, match=r"privacy\.key: .*other: .*another key"):
        prepare(card | {"privacy": {"ids": "hmac", "key": str(tmp_path / "other")}}, data.path, append=True)
    with pytest.raises(InputError, match=r"privacy\.ids: plain: .* has hmac; name the same key file"):
        prepare(tiny_card(), data.path, append=True)
    grown = prepare(card, data.path, append=True)
    assert grown.users.height == 60


@pytest.mark.parametrize(
    ("option", "there"), [({"levels": 1}, 3), ({"codebook": 256}, 16), ({"vocab_size": 4096}, ""), ({"content_width": 8}, "")]
)  # fmt: skip
@pytest.mark.parametrize("how", ["like", "append"])
def test_options_that_contradict_what_is_borrowed_are_refused(tmp_path, tiny_levels, option, there, how):
    flag = f"--{next(iter(option)).replace('_', '-')}"
    if how == "append":
        shutil.copytree(tiny_levels, tmp_path / "out")
    keys = {"append": True} if how == "append" else {"like": tiny_levels}
    with pytest.raises(InputError, match=f"^{flag} {next(iter(option.values()))}: .* has {there}.*leave {flag} out"):
        prepare(tiny_card(tiny_tables(kinds=True)), tmp_path / "out", **keys, **option)


def test_options_that_repeat_what_is_borrowed_are_taken(tmp_path, tiny_levels):
    size = open_dataset(tiny_levels).tokenizer.size
    card = tiny_card(tiny_tables(kinds=True))
    plain = prepare(card, tmp_path / "out", like=tiny_levels)
    said = prepare(card, tmp_path / "out", like=tiny_levels, levels=3, codebook=16, vocab_size=size)  # the same input
    assert said.digest == plain.digest


def test_without_a_folder_the_dataset_is_named_after_the_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = prepare(
        one_table([(f"u{n % 3}", f"i{n}", n) for n in range(12)]) | {"name": "my shop/2", "split": "leave-one-out"}
    )
    assert (
        made.path.resolve() == (tmp_path / "my-shop-2-dataset").resolve() and (tmp_path / "my-shop-2-dataset").is_dir()
    )


def test_long_stages_are_counted_in_what_they_work_on(tmp_path, capsys):
    data = prepare(tiny_card(), tmp_path / "out", **SMALL)
    said = capsys.readouterr().err
    sizes = data.manifest["sizes"]
    for line in (f"train records: {sizes['train_records']} records", f"clean: {sizes['events']} rows",
                 f"features: {ITEMS} items", f"codes: {ITEMS} items"):  # fmt: skip
        assert f"{line}\n" in said and f"{line.split(':')[0]}: done, {line.split(': ')[1]} in" in said, line
    texts = re.search(r"^tokenizer: (\d+) texts$", said, re.MULTILINE)
    assert texts and f"tokenizer: done, {texts[1]} texts in" in said and int(texts[1]) > 2 * ITEMS
