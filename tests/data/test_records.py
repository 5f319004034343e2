"""Records come back as written, in any order, and damage is named."""

import pickle

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec_jax.data.records import (
    DOCUMENT,
    HISTORY,
    ITEM,
    Record,
    RecordReader,
    RecordWriter,
    decode,
    encode,
    encode_histories,
)
from m6rec_jax.errors import InputError

INT32 = st.integers(-(2**31), 2**31 - 1)


def same(a: Record, b: Record) -> bool:
    arrays = all(
        np.array_equal(getattr(a, name), getattr(b, name)) and getattr(a, name).dtype == getattr(b, name).dtype
        for name in ("items", "times", "kinds", "tokens")
    )
    queries = a.queries.keys() == b.queries.keys() and all(
        np.array_equal(a.queries[k], b.queries[k]) for k in a.queries
    )
    return arrays and queries and (a.kind, a.row, a.targets) == (b.kind, b.row, b.targets)


@st.composite
def records(draw) -> Record:
    row = draw(st.integers(0, 2**31 - 1))
    if draw(st.booleans()):
        return Record(draw(st.sampled_from([ITEM, DOCUMENT])), row, tokens=np.array(draw(st.lists(INT32)), np.int32))
    n = draw(st.integers(0, 9))
    times = np.array(draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=n, max_size=n)), np.int64)
    items = np.array(draw(st.lists(INT32, min_size=n, max_size=n)), np.int32)
    places = draw(st.sets(st.integers(0, n - 1))) if n else set()
    queries = {i: np.array(draw(st.lists(INT32, max_size=4)), np.int32) for i in places}
    kinds = np.array(draw(st.lists(st.integers(0, 15), min_size=n, max_size=n)), np.uint8)
    return Record(HISTORY, row, items, times, kinds, draw(st.integers(0, n)), queries=queries)


@given(records())
def test_a_record_comes_back_as_written(record):
    assert same(decode(encode(record)), record)


@given(st.lists(records().filter(lambda r: r.kind == HISTORY), max_size=6))
def test_many_histories_are_encoded_like_one_by_one(histories):
    ends = np.cumsum([0, *(len(r.items) for r in histories)])
    queries = {int(ends[i]) + at: q for i, r in enumerate(histories) for at, q in r.queries.items()}

    def joined(name, kind):
        return np.concatenate([np.zeros(0, kind), *(getattr(r, name) for r in histories)])

    blobs = encode_histories(
        np.array([r.row for r in histories], np.int64),
        ends,
        joined("items", np.int32),
        joined("times", np.int64),
        joined("kinds", np.uint8),
        np.array([r.targets for r in histories], np.int64),
        queries,
    )
    assert all(same(decode(b), r) for b, r in zip(blobs, histories, strict=True))


def test_a_record_is_readable_without_this_project():
    body = msgpack.unpackb(encode(Record(ITEM, 7, tokens=np.array([1, 2**20], np.int32))))
    assert body == {"kind": ITEM, "row": 7, "tokens": bytes([1, 0, 0, 0, 0, 0, 16, 0])}


@pytest.fixture
def shards(tmp_path):
    written = [Record(ITEM, row, tokens=np.arange(row + 1, dtype=np.int32)) for row in range(25)]
    with RecordWriter(tmp_path, "train", shard_records=10) as writer:
        for record in written:
            writer.write(record)
    assert [p.name for p in writer.paths] == [f"train-0000{i}.arrayrecord" for i in range(3)]
    return written, writer.paths


def test_random_access_over_shards(shards):
    written, paths = shards
    reader = RecordReader(paths)
    assert len(reader) == 25
    assert all(same(reader[i], written[i]) for i in range(25))
    order = [24, 0, 10, 9, 9, 19, 20]
    assert all(same(r, written[i]) for r, i in zip(reader.take(order), order, strict=True))
    assert [r.row for r in reader] == list(range(25))
    assert [r.row for r in pickle.loads(pickle.dumps(reader)).take([3, 22])] == [3, 22]
    assert len(RecordReader([])) == 0
    for wrong in (25, -1):
        with pytest.raises(IndexError):
            reader[wrong]


def test_a_flipped_bit_names_file_and_record(shards):
    written, paths = shards
    data = bytearray(paths[1].read_bytes())
    at = data.find(encode(written[14]))
    data[at + 3] ^= 1
    paths[1].write_bytes(data)
    reader = RecordReader(paths)
    good = [i for i in range(25) if i != 14]
    assert [r.row for r in reader.take(good)] == good
    for ask in (lambda: reader[14], lambda: reader.take(range(25)), lambda: list(reader)):
        with pytest.raises(InputError, match=r"train-00001\.arrayrecord: damaged at record 4 .*prepare"):
            ask()


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_cut_file_is_named(shards, keep):
    _, paths = shards
    paths[2].write_bytes(paths[2].read_bytes()[:keep])
    with pytest.raises(InputError, match=r"train-00002\.arrayrecord: damaged"):
        RecordReader(paths)


def test_a_missing_file_is_named(shards):
    _, paths = shards
    paths[0].unlink()
    with pytest.raises(InputError, match=r"train-00000\.arrayrecord"):
        RecordReader(paths)
