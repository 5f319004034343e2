"""Ranges of users in their final order: labels, tables, sums, records. A range is written as the Polars path would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from m6rec_jax.data.beam.rows import Job
from m6rec_jax.data.beam.workers import with_own_name, write_frame
from m6rec_jax.data.events import NO_STRINGS, Events, event_arrays
from m6rec_jax.data.histories import histories
from m6rec_jax.data.quality_figures import BOT_EVENTS, busy_users
from m6rec_jax.data.records import READ_OPTIONS, SUFFIX, WRITE_OPTIONS
from m6rec_jax.data.splits import LEAST_EVENTS, SPLITS, TRAIN, label_by_cuts, split_events
from m6rec_jax.data.tokenizer import Tokenizer
from m6rec_jax.data.transitions import pair_weights

AT_ONCE = 1024  # records between reading and writing


@dataclass(frozen=True)
class Range:
    """A range of users: its number, and the row of its first user."""

    number: int
    first_user: int


@dataclass(frozen=True)
class Labels:
    """What labelling takes from all events: names of kinds, and the times that part global-time (none: by user)."""

    kinds: tuple[str, ...]
    cuts: np.ndarray | None = None


def target_times(job: Job, number: int) -> np.ndarray:
    """Times of the events of a range that may be predicted."""
    events = pl.read_parquet(job.file("range", number), columns=["item_id", "kind", "time"])
    silent = [kind for kind, weight in job.card.kinds.items() if weight == 0] if job.card.events.kind else []
    asked = pl.col("item_id").is_not_null() & ~pl.col("kind").is_in(silent).fill_null(False)
    return events.filter(asked)["time"].to_numpy()


def all_times(job: Job, number: int) -> np.ndarray:
    """Times of the events of a range."""
    return pl.read_parquet(job.file("range", number), columns=["time"])["time"].to_numpy()


def label_range(job: Job, labels: Labels, part: Range) -> dict[str, Any]:
    """Write the range's share of events.parquet and users.parquet, and its sums over the catalogue; return the others."""
    frame = pl.read_parquet(job.file("range", part.number))
    item_ids = pl.read_parquet(job.work / "catalogue.parquet")["item_id"]
    users = frame.select(pl.col("user_id").unique(maintain_order=True))
    events = event_arrays(frame, users["user_id"], item_ids, job.card, labels.kinds)
    targets = events.is_target
    if labels.cuts is not None:
        label = label_by_cuts(events.times, labels.cuts)
    elif job.card.split.rule == "global-time":  # no target anywhere
        label = np.zeros(len(events.times), np.uint8)
    else:
        label = split_events(events.users, events.times, targets, job.card.split)
    real = events.items >= 0
    train = (label == TRAIN) & real
    table = events.table(label).with_columns(pl.col("user") + pl.lit(part.first_user, pl.Int32))
    write_frame(table, job.file("events", part.number))
    heard = np.bincount(events.users[train], minlength=users.height)
    write_frame(users.with_columns(attributes=NO_STRINGS, events=heard), job.file("users", part.number))
    by_split = np.stack([np.bincount(events.items[real & (label == n)], minlength=len(item_ids)) for n in range(3)])
    weights = events.weights[train]
    pairs = pair_weights(events.users[train], events.items[train], events.times[train], weights, catalogue=len(item_ids))  # fmt: skip
    arrays = {f"{side}_{name}": getattr(csr, name) for side, csr in enumerate(pairs) for name in ("data", "indices", "indptr")}  # fmt: skip
    path = job.work / "sums" / f"{part.number}.npz"
    path.parent.mkdir(exist_ok=True)
    with_own_name(path, lambda own: _save(own, by_split=by_split, **arrays))
    return _sums(job, part, events, label, users.height)


def _save(path: Path, **arrays: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def _sums(job: Job, part: Range, events: Events, label: np.ndarray, n_users: int) -> dict[str, Any]:
    users, rows, times, real = events.users.astype(np.int64), events.items, events.times, events.items >= 0
    by_user = np.bincount(users, minlength=n_users)
    busy = np.flatnonzero(by_user >= BOT_EVENTS)
    found = busy_users(users, rows, times, by_user, job.card.events.time_unit != "order")
    known = np.bincount(users[label == TRAIN], minlength=n_users) > 0
    targets = np.bincount(users[events.is_target], minlength=n_users)
    parts = []
    for number in range(len(SPLITS)):
        mine = real & (label == number)
        parts.append(
            {
                "users": int((np.bincount(users[mine], minlength=n_users) > 0).sum()),
                "strangers": int((~known[users[mine]]).sum()),
                "from": int(times[mine].min()) if mine.any() else None,
                "to": int(times[mine].max()) if mine.any() else None,
            }
        )
    pairs = pl.DataFrame({"u": users[real], "r": rows[real]})
    return {
        "events": len(users),
        "labels": np.bincount(label, minlength=3),
        "targets": np.bincount(label[events.is_target], minlength=3),
        "short": int((targets < LEAST_EVENTS).sum()),
        "by_user": by_user,
        "busy": (busy + part.first_user, *(one[busy] for one in found)),
        "ties": int(((np.diff(times) == 0) & (np.diff(users) == 0)).sum()),
        "real": int(real.sum()),
        "pairs": pairs.n_unique() if pairs.height else 0,
        "from": int(times.min()),
        "to": int(times.max()),
        "parts": parts,
    }


def count_windows(job: Job, targets: bool, windows: list[tuple[int, int]], bins: int, number: int) -> np.ndarray:
    """Events of a range by time, in `bins` bins of each (low, width) of `windows`."""
    times = (target_times if targets else all_times)(job, number)
    made = np.zeros((len(windows), bins), np.int64)
    for i, (low, width) in enumerate(windows):
        at = (times - low) // width
        made[i] = np.bincount(at[(at >= 0) & (at < bins)], minlength=bins)
    return made


def activity_of(job: Job, edges: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Events of a range and its users' first ones between `edges`, and how many events lie outside."""
    frame = pl.read_parquet(job.file("range", number), columns=["user_id", "time"])
    times = frame["time"].to_numpy()
    first = times[np.flatnonzero(np.diff(frame["user_id"].rle_id().to_numpy().astype(np.int64), prepend=-1))]
    outside = int(((times < edges[0]) | (times > edges[-1])).sum())
    return np.histogram(times, edges)[0], np.histogram(first, edges)[0], outside


def queries_of(job: Job, numbers: list[int]) -> Iterator[str]:
    """Texts of training events without an item, a range at a time."""
    for number in numbers:
        frame = pl.read_parquet(job.file("events", number), columns=["item", "text", "split"])
        yield from frame.filter((pl.col("split") == TRAIN) & (pl.col("item") < 0))["text"].drop_nulls().to_list()


def write_histories(job: Job, levels: int, kinds: tuple[str, ...], part: Range) -> dict[str, dict[str, Any]]:
    """The range's records, a file a split; tokens and events of each, and targets of all."""
    table = pl.read_parquet(job.file("events", part.number))
    tokenizer = Tokenizer.load(job.work / "tokenizer.model")
    weights = [float(job.card.kinds.get(name, 1.0)) for name in kinds]
    events = Events(
        users=table["user"].to_numpy() - part.first_user,
        items=table["item"].to_numpy(),
        times=table["time"].to_numpy(),
        fractions=table["fraction"],
        kinds=table["kind"].to_numpy(),
        values=table["value"],
        texts=table["text"],
        kind_names=list(kinds),
        kind_weights=weights,
    )
    timed = job.card.events.time_unit != "order"
    found = {}
    for split, held in histories(events, table["split"].to_numpy(), tokenizer, levels, timed, part.first_user):
        write_blobs(history_file(job, split, part.number), held.encoded)
        found[split] = {"tokens": held.tokens, "events": held.events, "targets": held.targets}
    return found


def history_file(job: Job, split: str, number: int) -> Path:
    return job.work / "histories" / split / f"{number:05d}{SUFFIX}"


def write_blobs(path: Path, blobs: Iterator[bytes]) -> None:
    """Encoded records as one file."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(own: Path) -> None:
        writer = ArrayRecordWriter(str(own), WRITE_OPTIONS)
        for blob in blobs:
            writer.write(blob)
        writer.close()

    with_own_name(path, write)


@dataclass(frozen=True)
class Shard:
    """A shard of the dataset, and the records `start` to `stop` of each file that make it up."""

    path: Path
    parts: tuple[tuple[Path, int, int], ...]


def shards_of(folder: Path, split: str, files: list[tuple[Path, int]], size: int) -> list[Shard]:
    """Shards of `size` records of `files` (path, records) end to end."""
    total = sum(n for _, n in files)
    made = []
    for begin in range(0, total, size):
        parts, at = [], 0
        for path, n in files:
            low, high = max(begin, at), min(begin + size, at + n)
            if low < high:
                parts.append((path, low - at, high - at))
            at += n
        made.append(Shard(folder / f"{split}-{len(made):05d}{SUFFIX}", tuple(parts)))
    return made


def write_shard(shard: Shard) -> None:
    """One writer a shard."""
    write_blobs(shard.path, _blobs(shard))


def _blobs(shard: Shard) -> Iterator[bytes]:
    for path, start, stop in shard.parts:
        reader = ArrayRecordReader(str(path), READ_OPTIONS)
        for begin in range(start, stop, AT_ONCE):
            yield from reader.read(list(range(begin, min(begin + AT_ONCE, stop))))
