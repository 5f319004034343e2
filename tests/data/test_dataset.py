"""A dataset opens as it was written, agrees with itself, and says so when a file is missing or damaged."""

import shutil

import numpy as np
import polars as pl
import pytest

from m6rec_jax.artifacts.manifest import verify_files
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.history import spell_history
from m6rec_jax.data.records import DOCUMENT, HISTORY, ITEM
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import KIND_0, SEP, SPECIALS, gap_token
from tests.fixtures import ITEMS, USERS, tiny_tables

SPLITS = ("train", "valid", "test")


@pytest.fixture(params=["tiny_dataset", "tiny_levels"])
def data(request):
    return open_dataset(request.getfixturevalue(request.param))


def slow_spelling(data, record):
    """`spell_history`, an event at a time."""
    tokens, rows, events = [], [], []
    for i, (item, time, kind) in enumerate(zip(record.items, record.times, record.kinds, strict=True)):
        made = []
        if data.timed and i and gap_token(int(time - record.times[i - 1])):
            made.append(gap_token(int(time - record.times[i - 1])))
        if len(data.kinds) > 1:
            made.append(KIND_0 + int(kind))
        if i in record.queries:
            made += record.queries[i].tolist()
            rows += [-1] * len(made)
        else:
            made += [s.offset + int(c) for s, c in zip(data.vocab.levels, data.codes[item], strict=True)]
            rows += [-1] * (len(made) - 1) + [int(item)]
        tokens += made
        events += [i] * len(made)
    return tokens, rows, events


def test_histories_are_spelled_and_counted_alike_everywhere(data):
    for split in SPLITS:
        for at, record in enumerate(data.records(split)):
            if record.kind != HISTORY:
                continue
            made = spell_history(
                data.vocab,
                data.codes,
                record.items,
                record.times,
                record.kinds,
                data.timed,
                len(data.kinds),
                record.queries,
            )
            assert [a.tolist() for a in made] == list(slow_spelling(data, record))
            assert len(made[0]) == data.index[f"{split}_tokens"][at]
            assert len(record.items) == data.index[f"{split}_events"][at]


def test_an_empty_history_is_spelled_as_nothing(data):
    none = np.zeros(0, np.int32)
    assert [len(a) for a in spell_history(data.vocab, data.codes, none, none, none, True, 3, {})] == [0, 0, 0]


def test_the_index_is_in_the_order_of_the_records(data):
    for split in SPLITS:
        reader = data.records(split)
        kinds = [r.kind for r in reader]
        assert kinds == data.index[f"{split}_kind"].tolist() == sorted(kinds)
        for kind in (HISTORY, ITEM, DOCUMENT):
            rows = [r.row for r in reader if r.kind == kind]
            assert rows == sorted(set(rows))
        assert all(len(r.tokens) == n for r, n in zip(reader, data.index[f"{split}_tokens"], strict=True) if r.kind)


def test_texts_of_items_and_documents(tiny):
    said = {r.row: r for split in SPLITS for r in tiny.records(split) if r.kind == ITEM}
    assert sorted(said) == list(range(ITEMS))
    table = tiny_tables()["items"]
    for row in (0, 3, 41):
        fields, part = [[]], said[row].tokens.tolist()
        for token in part:
            fields[-1].append(token) if token != SEP else fields.append([])
        texts = [tiny.tokenizer.decode(f) for f in fields]
        assert texts[:3] == [table["title"][row], table["group"][row], f"brand: {table['brand'][row]}"]
        assert texts[-1] == table["about"][row] or not table["about"][row]
        assert all(token == SEP or token >= len(SPECIALS) for token in part)
    documents = [tiny.tokenizer.decode(r.tokens) for r in tiny.records("train") if r.kind == DOCUMENT]
    assert documents == tiny_tables()["docs"]["body"].to_list()
    assert sum(r.kind == ITEM for r in tiny.records("valid")) == tiny.manifest["sizes"]["valid_records"] - 56 > 0


def test_what_the_tables_say(tiny):
    events = tiny_tables()["events"]
    assert tiny.items["item_id"].to_list() == tiny_tables()["items"]["id"].to_list() == tiny.item_ids
    assert (
        tiny.users.height == USERS
        and tiny.users["user_id"].to_list() == events["u"].unique(maintain_order=True).to_list()
    )
    assert tiny.row_of("item-7") == 7 and tiny.row_of("nothing") is None
    assert tiny.items["events"].sum() == tiny.manifest["sizes"]["train_events"] == tiny.transitions.degree.sum()
    assert (tiny.seen == (tiny.items["events"] > 0).to_numpy()).all()
    assert tiny.content.shape == (ITEMS, tiny.manifest["content_width"]) and tiny.content.dtype == np.float32
    kept = pl.read_parquet(tiny.path / "events.parquet")
    assert kept.height == events.height and set(kept["split"]) == {0, 1, 2}
    for record in tiny.records("test"):
        mine = kept.filter(pl.col("user") == record.row)
        assert record.items.tolist() == mine["item"].to_list() and record.times.tolist() == mine["time"].to_list()


def test_every_file_has_a_digest_and_the_digest_names_them_all(tiny):
    files = {p.name for p in tiny.path.iterdir()} - {"manifest.json"}
    assert files == set(tiny.manifest["files"])
    assert verify_files(tiny.path, tiny.manifest["files"]) == []
    assert tiny.digest == open_dataset(tiny.path).digest


@pytest.fixture
def copy(tiny_dataset, tmp_path):
    return shutil.copytree(tiny_dataset, tmp_path / "copy")


@pytest.mark.parametrize(
    "name", ["items.parquet", "codes.npz", "tokenizer.model", "transitions.npz", "index.npz", "test-00000.arrayrecord"]
)
def test_a_missing_or_damaged_file_is_named(copy, name):
    def use():
        data = open_dataset(copy)
        return data.transitions, data.index, list(data.records("test"))

    use()
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{copy}.*prepare"):
        use()
    (copy / name).unlink()
    with pytest.raises(InputError, match=name):
        use()


def test_a_shard_of_another_length_is_noticed(copy):
    shutil.copy(copy / "valid-00000.arrayrecord", copy / "test-00000.arrayrecord")
    with pytest.raises(InputError, match="test records where 56 were written"):
        open_dataset(copy).records("test")
    with pytest.raises(InputError, match="split=tests"):
        open_dataset(copy).records("tests")


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json"):
        open_dataset(tmp_path)
