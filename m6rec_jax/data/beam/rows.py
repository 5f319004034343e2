"""Events by piece and by user: what workers do until clean events lie in their final order.

A piece is a file of events (a run of row groups of a Parquet file), a partition the users whose ids hash to it, a
range the users whose first rows lie next to each other. The functions of the Polars path do the work on each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xxhash

from m6rec_jax.data.beam.workers import write_frame
from m6rec_jax.data.card import Card
from m6rec_jax.data.card_checks import format_of
from m6rec_jax.data.clean import RULES, clean_rows, sort_events, without_repeats, without_unknown
from m6rec_jax.data.formats import read_file
from m6rec_jax.data.privacy import hide_ids, read_key
from m6rec_jax.data.sources import canonical_events, rejected_rows
from m6rec_jax.errors import InputError

BINS = 1 << 14  # first rows are counted in so many bins, to cut users into ranges of about equal events
LATER_RULES = ("duplicate_event", "unknown_item", "few_item_events", "few_user_events")  # need more than one row


@dataclass(frozen=True)
class Piece:
    """Rows `[start, start + rows)` of a Parquet file, or a whole text file; `first` is the number of its first row."""

    number: int
    path: Path
    start: int = 0
    rows: int = -1
    first: int = 0


@dataclass(frozen=True)
class Job:
    """What every task knows: the card, the shared folder, the clock's time and how finely events are cut."""

    card: Card
    work: Path
    now: int
    partition_rows: int
    partitions: int = 1

    def file(self, *names: Any) -> Path:
        return self.work.joinpath(*map(str, names[:-1]), f"{names[-1]:05d}.parquet")


def pieces_of(card: Card, paths: tuple[Path, ...], most: int) -> list[Piece]:
    """The pieces of the events' files in reading order, of at most about `most` rows where the format says how many."""
    found: list[Piece] = []
    for path in paths:
        if format_of(card.events) != "parquet":
            found.append(Piece(len(found), path))
            continue
        height = pl.scan_parquet(path).select(pl.len()).collect().item()
        for start in range(0, max(height, 1), most):
            found.append(Piece(len(found), path, start, min(most, height - start)))
    return found


def read_piece(job: Job, piece: Piece) -> dict[str, Any]:
    """Canonical events of a piece, numbered from 0, beside those whose time says nothing; what was met is returned."""
    table, key = job.card.events, read_key(job.card)
    counts = {"bad_value": 0}
    try:
        if piece.rows >= 0:
            columns = list(dict.fromkeys(c for c in (table.user, table.item, table.time, table.kind, table.text) if c))
            raw = pl.scan_parquet(piece.path).select(columns).slice(piece.start, piece.rows).collect()
        else:
            raw = read_file(job.card, "events", piece.path)
        events, bad = canonical_events(raw, table, counts)
    except pl.exceptions.PolarsError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{job.card.origin}: events: a column is of no usable type ({reason}); convert it") from None
    events, bad = hide_ids(events, key), hide_ids(bad, key)
    write_frame(events, job.file("read", piece.number))
    write_frame(bad, job.file("bad_time", piece.number))
    return {"rows": raw.height, "bad": bad.height, "missing": {c: events[c].null_count() for c in events.columns}}


def clean_piece(job: Job, piece: Piece) -> Iterator[tuple[int, pl.DataFrame]]:
    """The rules that judge a row by itself, then its rows by partition."""
    events = _numbered(job, piece, "read")
    bad = rejected_rows("events", "bad_time", _numbered(job, piece, "bad_time"))
    counts, rejected = dict.fromkeys(RULES, 0), [("bad_time", bad)]
    events = clean_rows(events, job.card, counts, _rejecting(counts, rejected), job.now)
    counts["bad_time"] += bad.height
    for rule, frame in rejected:
        if frame.height:
            write_frame(frame, job.file("rejected", rule, piece.number))
    kinds = events["kind"].unique().to_list()
    write_frame(pl.DataFrame({"kind": kinds}, schema={"kind": pl.String}), job.file("kinds", piece.number))
    write_frame(pl.DataFrame({"rule": list(counts), "n": list(counts.values())}), job.file("counts", piece.number))
    yield from _by_number(events, _partition(events["user_id"], job.partitions))


def clean_partition(job: Job, number: int, events: pl.DataFrame) -> None:
    """The rules that need all events of a user, or the catalogue."""
    counts, rejected = dict.fromkeys(RULES, 0), []
    reject = _rejecting(counts, rejected)
    events = without_repeats(events.sort("row"), reject)
    known = job.work / "item_ids.parquet"
    if known.exists():
        events = without_unknown(events, pl.read_parquet(known)["item_id"], reject)
    for rule, frame in rejected:
        write_frame(frame, job.file("later", rule, number))
    write_frame(events.with_columns(state=pl.lit(0, pl.Int8)), job.file("state", 0, number))
    _count_items(job, 0, number, events)


def prune_partition(job: Job, turn: int, number: int) -> int:
    """One turn of dropping events of rare items, then those of short users; how many events went."""
    events = pl.read_parquet(job.file("state", turn - 1, number))
    rare = pl.read_parquet(job.work / "rare" / f"{turn}.parquet")["item_id"]
    here, real = pl.col("state") == 0, pl.col("item_id").is_not_null()
    few_item = here & real & pl.col("item_id").is_in(rare.implode())
    made = events.with_columns(state=pl.when(few_item).then(pl.lit(1, pl.Int8)).otherwise("state"))
    short = here & ((here & real).sum().over("user_id") < job.card.clean.min_user_events)
    made = made.with_columns(state=pl.when(short).then(pl.lit(2, pl.Int8)).otherwise("state"))
    write_frame(made, job.file("state", turn, number))
    _count_items(job, turn, number, made.filter(here))
    return int((made["state"] != events["state"]).sum())


def finish_partition(job: Job, turn: int, total: int, number: int) -> np.ndarray:
    """Clean events with their user's first row, items with theirs; events by bin of the user's first row [BINS]."""
    events = pl.read_parquet(job.file("state", turn, number))
    for state, rule in ((1, "few_item_events"), (2, "few_user_events")):
        gone = events.filter(pl.col("state") == state).drop("state")
        if gone.height:
            write_frame(rejected_rows("events", rule, gone), job.file("later", rule, number))
    kept = events.filter(pl.col("state") == 0).drop("state")
    kept = kept.with_columns(first=pl.col("row").min().over("user_id"))
    write_frame(kept, job.file("kept", number))
    items = kept.drop_nulls("item_id").group_by("item_id").agg(pl.col("row").min())
    write_frame(items, job.file("bought", number))
    return np.bincount(_bins(kept["first"], total), minlength=BINS)


def spread_rejected(job: Job, number: int) -> Iterator[tuple[int, pl.DataFrame]]:
    """Rejected rows of a partition by rule and by block of rows."""
    for at, rule in enumerate(LATER_RULES):
        if (path := job.file("later", rule, number)).exists():
            frame = pl.read_parquet(path)
            blocks = (frame["row"] // job.partition_rows).to_numpy()
            yield from _by_number(frame, blocks * len(LATER_RULES) + at)


def gather_rejected(job: Job, number: int, frame: pl.DataFrame) -> None:
    block, at = divmod(number, len(LATER_RULES))
    write_frame(frame.sort("row"), job.file("rejected", LATER_RULES[at], block))


def spread_kept(job: Job, bounds: np.ndarray, total: int, number: int) -> Iterator[tuple[int, pl.DataFrame]]:
    """Clean events of a partition by range; `bounds` are the bins at which ranges begin."""
    kept = pl.read_parquet(job.file("kept", number))
    ranges = np.searchsorted(bounds, _bins(kept["first"], total), side="right") - 1
    yield from _by_number(kept.drop("first"), ranges)


def gather_range(job: Job, number: int, events: pl.DataFrame) -> int:
    """The events of a range in their final order; how many users they have."""
    events = sort_events(events)
    write_frame(events, job.file("range", number))
    return events["user_id"].n_unique()


def _numbered(job: Job, piece: Piece, name: str) -> pl.DataFrame:
    frame = pl.read_parquet(job.file(name, piece.number)).with_columns(pl.col("row") + piece.first)
    return frame if job.card.events.time else frame.with_columns(time=pl.col("row"))


def _rejecting(counts: dict[str, int], rejected: list[tuple[str, pl.DataFrame]]):
    """The `reject` that rules call: counts and keeps the rows of `mask`, returns the others."""

    def reject(table: str, rule: str, frame: pl.DataFrame, mask: pl.Series) -> pl.DataFrame:
        if not (n := int(mask.sum())):
            return frame
        counts[rule] += n
        rejected.append((rule, rejected_rows(table, rule, frame.filter(mask))))
        return frame.filter(~mask)

    return reject


def _count_items(job: Job, turn: int, number: int, events: pl.DataFrame) -> None:
    if job.card.clean.min_item_events > 1:
        counts = events.drop_nulls("item_id").group_by("item_id").len()
        write_frame(counts, job.file("item_counts", turn, number))


def _bins(first: pl.Series, total: int) -> np.ndarray:
    return first.to_numpy() * BINS // max(total, 1)


def _partition(users: pl.Series, partitions: int) -> np.ndarray:
    """A hash of the bytes alone: polars' own may differ between machines."""
    unique = users.unique()
    numbers = pl.Series([xxhash.xxh3_64_intdigest(u.encode()) % partitions for u in unique.to_list()], dtype=pl.Int64)
    return users.replace_strict(unique, numbers, return_dtype=pl.Int64).to_numpy() if len(users) else np.zeros(0, int)


def _by_number(frame: pl.DataFrame, numbers: np.ndarray) -> Iterator[tuple[int, pl.DataFrame]]:
    for number in np.unique(numbers).tolist():
        yield number, frame.filter(pl.Series(numbers == number))
