"""Records on disk: one msgpack map each, in ArrayRecord files that allow random access.

A record is readable without this project: integers are integers, arrays are little-endian bytes
(items, tokens, queries and those of an instance int32; times int64; kinds, past uint8), and empty fields are left out.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from m6rec_jax.errors import InputError

HISTORY, ITEM, DOCUMENT, INSTANCE = 0, 1, 2, 3
SUFFIX = ".arrayrecord"
SHARD_RECORDS = 1 << 17
WRITE_OPTIONS = "group_size:1,uncompressed"
READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
INSTANCE_ARRAYS = {"segments": "<i4", "past": "u1", "opening": "<i4", "answer": "<i4", "rows": "<i4"}
_NO_ITEMS = np.zeros(0, np.int32)
_NO_TIMES = np.zeros(0, np.int64)
_NO_KINDS = np.zeros(0, np.uint8)


@dataclass(frozen=True)
class Record:
    """One user's history, one item's text, one document, or one instance of a task.

    HISTORY: catalogue rows `items` [n] in time order (-1 where the event is a query), `times` [n] in seconds (or the
    order), `kinds` [n]; the last `targets` of them are to be predicted. ITEM and DOCUMENT: text `tokens`.
    INSTANCE: row `row` of task `task` of the manifest, no control symbol in it: `tokens`, the segments of its source end to
    end, of `segments` [s] tokens each; `past` [s] is 1 for an event of a history, oldest first; `opening` and `answer`
    tokens; `label`, the option that is right (-1: none). `rows`: catalogue row where a token completes a spelling, else -1,
    along tokens, opening and answer; empty where nothing is spelled.
    """

    kind: int
    row: int
    items: np.ndarray = field(default_factory=lambda: _NO_ITEMS)
    times: np.ndarray = field(default_factory=lambda: _NO_TIMES)
    kinds: np.ndarray = field(default_factory=lambda: _NO_KINDS)
    targets: int = 0
    tokens: np.ndarray = field(default_factory=lambda: _NO_ITEMS)
    queries: dict[int, np.ndarray] = field(default_factory=dict)
    task: int = -1
    segments: np.ndarray = field(default_factory=lambda: _NO_ITEMS)
    past: np.ndarray = field(default_factory=lambda: _NO_KINDS)
    opening: np.ndarray = field(default_factory=lambda: _NO_ITEMS)
    answer: np.ndarray = field(default_factory=lambda: _NO_ITEMS)
    label: int = -1
    rows: np.ndarray = field(default_factory=lambda: _NO_ITEMS)


def encode(record: Record) -> bytes:
    """A record as a msgpack map."""
    body: dict[str, object] = {"kind": int(record.kind), "row": int(record.row)}
    if len(record.items):
        body["items"] = np.asarray(record.items, "<i4").tobytes()
        body["times"] = np.asarray(record.times, "<i8").tobytes()
        body["kinds"] = np.asarray(record.kinds, "u1").tobytes()
    if record.targets:
        body["targets"] = int(record.targets)
    if len(record.tokens):
        body["tokens"] = np.asarray(record.tokens, "<i4").tobytes()
    if record.queries:
        body["queries"] = {int(i): np.asarray(q, "<i4").tobytes() for i, q in record.queries.items()}
    if record.kind == INSTANCE:
        body |= {"task": int(record.task), "label": int(record.label)}
        for name, kind in INSTANCE_ARRAYS.items():
            if len(values := getattr(record, name)):
                body[name] = np.asarray(values, kind).tobytes()
    return bytes(msgpack.packb(body))


def encode_histories(
    rows: np.ndarray,
    starts: np.ndarray,
    items: np.ndarray,
    times: np.ndarray,
    kinds: np.ndarray,
    targets: np.ndarray,
    queries: Mapping[int, np.ndarray],
) -> Iterator[bytes]:
    """`encode` for many histories laid end to end: record i of user `rows[i]` holds events `starts[i]:starts[i + 1]`.

    `queries` maps places among all events to text tokens.
    """
    blobs = [(width, np.ascontiguousarray(a, t).tobytes()) for a, t, width in ((items, "<i4", 4), (times, "<i8", 8), (kinds, "u1", 1))]  # fmt: skip
    asked: dict[int, dict[int, bytes]] = {}
    for place, tokens in sorted(queries.items()):
        record = int(np.searchsorted(starts, place, side="right")) - 1
        asked.setdefault(record, {})[place - int(starts[record])] = np.asarray(tokens, "<i4").tobytes()
    pack = msgpack.Packer().pack
    bounds = zip(rows.tolist(), starts[:-1].tolist(), starts[1:].tolist(), targets.tolist(), strict=True)
    for record, (row, start, end, wanted) in enumerate(bounds):
        body: dict[str, object] = {"kind": HISTORY, "row": row}
        for name, (width, blob) in zip(("items", "times", "kinds"), blobs, strict=True):
            body[name] = blob[width * start : width * end]
        if wanted:
            body["targets"] = wanted
        if record in asked:
            body["queries"] = asked[record]
        yield bytes(pack(body))


def decode(data: bytes) -> Record:
    """The record that `encode` wrote; its arrays are read-only views. Raises ValueError on other bytes."""
    body = msgpack.unpackb(data, strict_map_key=False)
    if not isinstance(body, dict) or "kind" not in body or "row" not in body:
        raise ValueError("not a record")
    return Record(
        kind=body["kind"],
        row=body["row"],
        items=np.frombuffer(body.get("items", b""), "<i4"),
        times=np.frombuffer(body.get("times", b""), "<i8"),
        kinds=np.frombuffer(body.get("kinds", b""), "u1"),
        targets=body.get("targets", 0),
        tokens=np.frombuffer(body.get("tokens", b""), "<i4"),
        queries={i: np.frombuffer(q, "<i4") for i, q in body.get("queries", {}).items()},
        task=body.get("task", -1),
        label=body.get("label", -1),
        **{name: np.frombuffer(body.get(name, b""), kind) for name, kind in INSTANCE_ARRAYS.items()},
    )


class RecordWriter:
    """Writes the records of one split into `folder/<split>-00000.arrayrecord`, ... in order."""

    def __init__(self, folder: Path | str, split: str, shard_records: int = SHARD_RECORDS):
        self.folder, self.split, self.shard_records = Path(folder), split, shard_records
        self.paths: list[Path] = []
        self.count = 0
        self._writer: ArrayRecordWriter | None = None

    def write(self, record: Record | bytes) -> None:
        """Append a record (or one already encoded)."""
        if self.count % self.shard_records == 0:
            self.close()
            self.paths.append(self.folder / f"{self.split}-{len(self.paths):05d}{SUFFIX}")
            self._writer = ArrayRecordWriter(str(self.paths[-1]), WRITE_OPTIONS)
        self._writer.write(record if isinstance(record, bytes) else encode(record))  # type: ignore[union-attr]
        self.count += 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BadRecords:
    """Counts damaged records that are left out: distinct ones, up to `most` of them."""

    def __init__(self, most: int):
        self.most = most
        self._found: set[tuple[Path, int]] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def add(self, path: Path, record: int, error: InputError) -> None:
        """Count a record; one line says which. Raises `error`, with the limit, when there are more than `most`."""
        with self._lock:
            if (path, record) in self._found:
                return
            if len(self._found) >= self.most:
                limit = f"; data.bad_records={self.most} are left out already" if self.most else "; data.bad_records=N leaves out up to N"  # fmt: skip
                raise InputError(f"{error}{limit}")
            self._found.add((path, record))
            # By every process: each reads other records.
            print(f"{path}: record {record} is damaged and left out ({len(self._found)} of at most {self.most})", file=sys.stderr, flush=True)  # fmt: skip

    def __reduce__(self) -> tuple[object, ...]:
        return BadRecords, (self.most,)


class RecordReader:
    """Random access to the records of shards in order: `len(reader)`, `reader[i]`, `reader.take([i, ...])`.

    Raises InputError that names the file (and record) when the bytes are not those that were written; with `bad`, which
    counts it then, a damaged record is None in what `take` gives.
    """

    def __init__(self, paths: Sequence[Path | str], bad: BadRecords | None = None):
        self.bad = bad
        self.paths = [Path(p) for p in paths]
        self._readers = [_open(path) for path in self.paths]
        self._ends = np.cumsum([r.num_records() for r in self._readers], dtype=np.int64)
        self._pid = os.getpid()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:
        return self.take([index])[0]

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), 1024):
            yield from self.take(range(start, min(start + 1024, len(self))))

    def __reduce__(self) -> tuple[object, ...]:
        return RecordReader, (self.paths, self.bad)

    def take(self, indices: Sequence[int] | np.ndarray) -> list[Record]:
        """The records at `indices`, in that order; one call for many is far quicker than many calls."""
        if self._pid != os.getpid():
            self.__init__(self.paths, self.bad)
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"record {wanted.min()}..{wanted.max()} of {len(self)}")
        shards = np.searchsorted(self._ends, wanted, side="right")
        found: list[Record | None] = [None] * len(wanted)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            first = self._ends[shard - 1] if shard else 0
            local = (wanted[places] - first).tolist()
            for place, record in zip(places, self._read(int(shard), local), strict=True):
                found[place] = record
        return found  # type: ignore[return-value]

    def _read(self, shard: int, local: list[int]) -> list[Record]:
        reader, path = self._readers[shard], self.paths[shard]
        try:
            blobs = reader.read(local)
        except Exception as error:
            if len(local) > 1:
                return [self._read(shard, [i])[0] for i in local]
            return [self._damaged(path, local[0], error)]
        records: list[Any] = []
        for i, blob in zip(local, blobs, strict=True):
            try:
                records.append(decode(blob))
            except Exception as error:
                records.append(self._damaged(path, i, error))
        return records

    def _damaged(self, path: Path, record: int, error: Exception) -> Any:
        """None, once it is counted; types say Record, for only who passes `bad` meets None."""
        corrupt = _corrupt(path, f"record {record}", error)
        if self.bad is None:
            raise corrupt from None
        self.bad.add(path, record, corrupt)
        return None


def _open(path: Path) -> ArrayRecordReader:
    try:
        reader = ArrayRecordReader(str(path), READ_OPTIONS)
        if not reader.ok():
            raise ValueError("no valid index at its end")
    except Exception as error:
        raise _corrupt(path, "its end", error) from None
    return reader


def _corrupt(path: Path, where: str, error: Exception) -> InputError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(f"{path}: damaged at {where} ({reason}); restore the file or prepare the dataset again")
