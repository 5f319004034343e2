"""`prepare` where no process holds all events: the launcher drives one Beam pipeline after another over files.

What grows with events is worked on by piece, by partition of users, then by range of users in their final order
(`rows`, `ranges`); what grows with the catalogue is learnt here, once, by the functions of the Polars path.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import scipy.sparse as sp

from m6rec_jax import progress
from m6rec_jax.artifacts.atomic import atomic_path
from m6rec_jax.artifacts.manifest import MANIFEST, write_manifest
from m6rec_jax.artifacts.schemas import DATASET
from m6rec_jax.data import catalogue
from m6rec_jax.data.beam import figures, ranges, rows
from m6rec_jax.data.beam.accepted import check_accepted
from m6rec_jax.data.beam.workers import Workers, check_beam, write_frame
from m6rec_jax.data.card import Card, load_card
from m6rec_jax.data.card_checks import paths_of
from m6rec_jax.data.clean import (
    RULES,
    Cleaned,
    check_kinds,
    clean_corpus,
    clean_items,
    count_items,
    nothing_left,
    with_event_items,
)
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.data.events import kind_names
from m6rec_jax.data.histories import Histories, add_index
from m6rec_jax.data.prepare import (
    GROUP_ROWS,
    Clock,
    Options,
    dataset_before,
    inputs_digest,
    learn_items,
    learn_words,
    manifest_body,
)
from m6rec_jax.data.privacy import check_key_place
from m6rec_jax.data.quality import check_thresholds, write_page
from m6rec_jax.data.records import SHARD_RECORDS, encode
from m6rec_jax.data.said import Said, texts_by_split
from m6rec_jax.data.sources import REJECTED_SCHEMA, Tables, read_table, rejected_rows
from m6rec_jax.data.splits import SPLITS, check_cuts, cut_places
from m6rec_jax.data.transitions import Transitions, lightened, of_pairs
from m6rec_jax.errors import InputError

STAGES = ("read", "clean", "minimums", "order", "catalogue", "split", "quality", "features", "transitions", "codes",
          "tokenizer", "records", "tables")  # fmt: skip
PARTITION_ROWS = 2_000_000  # events that a worker holds at once, about
EVENT_RULES = ("missing_user", "missing_item", "missing_time", "future_time", "missing_kind", "unknown_kind", *rows.LATER_RULES)  # fmt: skip


def prepare_on_beam(card: Card | Path | str, out: Path, *, runner_options: str = "", partition_rows: int = PARTITION_ROWS,
                    shard_records: int = SHARD_RECORDS, **sizes: int | None) -> Dataset:  # fmt: skip
    """`prepare` on Apache Beam; the dataset in `out` is the same, byte for byte but for the seconds in its manifest.

    `runner_options` are those of a Beam command line (none: the embedded runner); `sizes` as for `prepare`. About
    `partition_rows` events are held at once by a worker; `shard_records` is for tests. Raises InputError where Beam is
    missing and for what is not done there (docs/prepare-beam.md), besides what `prepare` refuses.
    """
    check_beam()
    card = load_card(Path(card).absolute() if isinstance(card, str | Path) else card)
    check_accepted(card)
    check_key_place(card, out)
    before = dataset_before(out, False)
    options = Options(**{name: value for name, value in sizes.items() if value is not None})
    inputs = inputs_digest(card, options, None, ())
    if before is not None:
        if before.manifest["inputs"] != [inputs]:
            raise InputError(f"{out}: holds a dataset made from other input; name another --out or remove it")
        progress.note(f"{out}: prepared before from the same input")
        return before
    with progress.stage(f"prepare {card.name}", total=len(STAGES), unit="steps") as bar, atomic_path(out) as folder:
        folder.mkdir()
        clock = Clock(bar)
        workers = Workers(folder.resolve() / "work", runner_options)
        workers.work.mkdir()
        job = rows.Job(card, workers.work, int(time.time()), partition_rows)
        body = _Launch(card, folder, out, workers, job, clock, options, shard_records).run()
        shutil.rmtree(workers.work)
        body["inputs"] = [inputs]
        body["seconds"] = {name: round(value, 3) for name, value in clock.seconds.items()}
        write_manifest(folder, DATASET.name, DATASET.version, body, [p for p in folder.iterdir() if p.name != MANIFEST])
    return open_dataset(out)


@dataclass
class _Launch:
    """One run of the launcher; `run` is the order of its pipelines."""

    card: Card
    folder: Path
    out: Path
    workers: Workers
    job: rows.Job
    clock: Clock
    options: Options
    shard_records: int

    def run(self) -> dict[str, Any]:
        clock, card = self.clock, self.card
        counts = dict.fromkeys(RULES, 0)
        with clock("read"):
            pieces, read = self._read()
            counts |= {"bad_value": read["bad_value"]}
            tables, items, corpus, rejected = self._small_tables(counts)
        with clock("clean"):
            present = self._clean(pieces, items)
        with clock("minimums"):
            turn = self._minimums(present)
        with clock("order"):
            numbers, first_users, n = self._order(present, turn, read["rows"])
            self._add_counts(counts, present, pieces)
        with clock("catalogue"):
            if not n or not (bought := self._bought(present)).height:
                raise InputError(nothing_left(read["rows"], card, counts))
            items = with_event_items(items, bought, counts)
            count_items(items, counts)
            write_frame(items.select("item_id"), self.job.work / "catalogue.parquet")
        with clock("split"):
            labels, spans = self._labels(pieces, numbers)
            parts = [ranges.Range(number, first) for number, first in zip(numbers, first_users, strict=True)]
            sums = self.workers.each("label", partial(ranges.label_range, self.job, labels), parts)
            by_split = self._by_split(numbers)
            if labels.cuts is not None:
                check_cuts(labels.cuts, np.sum([one["targets"] for one in sums], axis=0), card.split)
        paths = self._rejected_files(rejected)
        cleaned = Cleaned(Tables(figures.no_events(), items), counts, _examples(paths))
        with clock("quality"):
            timed = card.events.time_unit != "order"
            n = sum(one["events"] for one in sums)
            by_rule = {rule: self._event_rule(rule) for rule in ("bad_time", *EVENT_RULES)}
            activity = figures.activity(self.workers, self.job, numbers, n, spans) if timed else None
            found = figures.figures(card, tables, cleaned, read, by_rule, sums, by_split, partial(_name, self.job, parts), activity)  # fmt: skip
            write_page(found, card, self.folder / "quality.html")
            check_thresholds(found, card, self.folder / "quality.html", self.out.with_name(f"{self.out.name}.quality.html"))  # fmt: skip
        items = catalogue.lay_out(items)
        items = items.with_columns(events=by_split[0], seen=by_split[0] > 0)
        learnt = learn_items(card, items, partial(self._transitions, numbers, by_split[0]), self.folder, None, self.options, clock)  # fmt: skip
        said = Said.of(learnt.items, corpus)
        nothing, queries = _Silent(sum(len(one["by_user"]) for one in sums)), _Queries(self.job, numbers)
        tokenizer = learn_words(said, nothing, queries, self.folder, None, self.options, clock)
        shutil.copy(self.folder / "tokenizer.model", self.job.work / "tokenizer.model")
        with clock("records"):
            sizes = self._records(parts, said.records(tokenizer), learnt.books.levels, labels.kinds)
        with clock("tables"):
            learnt.items.write_parquet(self.folder / "items.parquet", row_group_size=GROUP_ROWS)
            for name in ("users", "events"):
                _joined([self.job.file(name, number) for number in numbers], self.folder / f"{name}.parquet")
            _joined(paths, self.folder / "rejected.parquet")
        weights = [float(card.kinds.get(name, 1.0)) for name in labels.kinds]
        counted = np.sum([one["labels"] for one in sums], axis=0)
        body = manifest_body(
            card,
            counts,
            learnt,
            tokenizer,
            {
                "seen_items": int((by_split[0] > 0).sum()),
                "users": nothing.users,
                "short_users": sum(one["short"] for one in sums),
                "events": n,
                **{f"{name}_events": int(counted[i]) for i, name in enumerate(SPLITS)},
                "documents": len(said.documents),
                "transitions": learnt.transitions,
                **sizes,
            },
            list(labels.kinds),
            weights,
        )
        return body | {"quality": found["limits"]}

    def _read(self) -> tuple[list[rows.Piece], dict[str, Any]]:
        """Pieces with the numbers of their first rows, and what was read."""
        pieces = rows.pieces_of(self.card, paths_of(self.card.events), self.job.partition_rows)
        met = self.workers.each("read-events", partial(rows.read_piece, self.job), pieces)
        ends = np.cumsum([0, *(one["rows"] for one in met)]).tolist()
        if not ends[-1]:
            raise InputError(f"{self.card.origin}: events.path: holds no row; give a table with at least one")
        pieces = [replace(piece, first=first) for piece, first in zip(pieces, ends[:-1], strict=True)]
        self.job = replace(self.job, partitions=max(1, -(-ends[-1] // self.job.partition_rows)))
        missing = {c: sum(one["missing"][c] for one in met) for c in met[0]["missing"]}
        return pieces, {"rows": ends[-1], "missing": missing, "bad_value": 0}

    def _small_tables(self, counts: dict[str, int]) -> tuple[Tables, pl.DataFrame | None, pl.DataFrame | None, dict[str, list]]:  # fmt: skip
        """Items and corpus as read (in tables without events) and as cleaned, and their rejected rows."""
        numbers = {"bad_number": 0}
        found = {name: read_table(self.card, name, numbers) for name in ("items", "corpus")}
        counts |= numbers
        rejected: dict[str, list[pl.DataFrame]] = {"items": [], "corpus": []}

        def reject(table: str, rule: str, frame: pl.DataFrame, mask: pl.Series) -> pl.DataFrame:
            counts[rule] += int(mask.sum())
            rejected[table].append(rejected_rows(table, rule, frame.filter(mask)))
            return frame.filter(~mask)

        items, corpus = (found[name][0] if found[name] else None for name in ("items", "corpus"))  # type: ignore[index]
        tables = Tables(figures.no_events(), items, corpus=corpus)
        items = clean_items(items, self.card, counts, reject) if items is not None else None
        if items is not None and self.card.clean.unknown_items == "drop":
            write_frame(items.select("item_id"), self.job.work / "item_ids.parquet")
        return tables, items, clean_corpus(corpus, self.card, counts, reject), rejected

    def _clean(self, pieces: list[rows.Piece], items: pl.DataFrame | None) -> list[int]:
        """The partitions that have events."""
        part, gather = partial(rows.clean_piece, self.job), partial(rows.clean_partition, self.job)
        present = list(self.workers.exchange("clean", part, pieces, gather))
        kinds = pl.concat([pl.read_parquet(self.job.file("kinds", p.number)) for p in pieces])["kind"]
        check_kinds(kinds.n_unique(), self.card)
        return present

    def _minimums(self, present: list[int]) -> int:
        """Turns of dropping rare items and short users, until neither is left; the last one's number."""
        clean, turn = self.card.clean, 0
        if clean.min_user_events <= 1 and clean.min_item_events <= 1:
            return 0
        (self.job.work / "rare").mkdir()
        while present:
            rare = pl.DataFrame(schema={"item_id": pl.String})
            if clean.min_item_events > 1:
                files = [self.job.file("item_counts", turn, number) for number in present]
                whole = pl.scan_parquet(files).group_by("item_id").agg(pl.col("len").sum())
                rare = whole.filter(pl.col("len") < clean.min_item_events).select("item_id").collect()
            turn += 1
            rare.write_parquet(self.job.work / "rare" / f"{turn}.parquet")
            if not any(self.workers.each(f"prune-{turn}", partial(rows.prune_partition, self.job, turn), present)):
                break
        return turn

    def _order(self, present: list[int], turn: int, total: int) -> tuple[list[int], list[int], int]:
        """Ranges in order, the row of the first user of each, and the events of all."""
        task = partial(rows.finish_partition, self.job, turn, total)
        bins = np.sum([np.zeros(rows.BINS, np.int64), *self.workers.each("finish", task, present)], axis=0)
        self.workers.exchange("reject", partial(rows.spread_rejected, self.job), present, partial(rows.gather_rejected, self.job))  # fmt: skip
        bounds = np.flatnonzero(np.diff((np.cumsum(bins) - bins) // self.job.partition_rows, prepend=-1))
        part = partial(rows.spread_kept, self.job, bounds, total)
        users = self.workers.exchange("order", part, present, partial(rows.gather_range, self.job))
        numbers = list(users)
        return numbers, np.cumsum([0, *(users[number] for number in numbers)])[:-1].tolist(), int(bins.sum())

    def _add_counts(self, counts: dict[str, int], present: list[int], pieces: list[rows.Piece]) -> None:
        for piece in pieces:
            for rule, n in pl.read_parquet(self.job.file("counts", piece.number)).iter_rows():
                counts[rule] += n
        for rule in rows.LATER_RULES:
            counts[rule] += self._event_rule(rule)

    def _event_rule(self, rule: str) -> int:
        files = self._rule_files(rule)
        return pl.scan_parquet(files).select(pl.len()).collect().item() if files else 0

    def _rule_files(self, rule: str) -> list[Path]:
        return sorted((self.job.work / "rejected" / rule).glob("[0-9]*.parquet"))

    def _bought(self, present: list[int]) -> pl.DataFrame:
        """item_id, row: each item of an event with the first row that has it."""
        scan = pl.scan_parquet([self.job.file("bought", number) for number in present])
        return scan.group_by("item_id").agg(pl.col("row").min()).collect()

    def _labels(self, pieces: list[rows.Piece], numbers: list[int]) -> tuple[ranges.Labels, tuple[int, int]]:
        scan = pl.scan_parquet([self.job.file("range", number) for number in numbers])
        kinds = scan.select(pl.col("kind").unique()).collect(engine="streaming")["kind"]
        span = scan.select(pl.col("time").min().alias("a"), pl.col("time").max().alias("b")).collect(engine="streaming")
        low, high = span.row(0)
        cuts = None
        if self.card.split.rule == "global-time":
            n = sum(self.workers.each("targets", partial(_targets, self.job), numbers))
            if n:
                places = cut_places(n, self.card.split)
                cuts = np.array(figures.nth_times(self.workers, self.job, numbers, True, (low, high), places))
        return ranges.Labels(tuple(kind_names(kinds, self.card)), cuts), (low, high)

    def _by_split(self, numbers: list[int]) -> np.ndarray:
        total: Any = 0
        for number in numbers:
            total = total + np.load(self.job.work / "sums" / f"{number}.npz")["by_split"]
        return total

    def _transitions(self, numbers: list[int], degree: np.ndarray, size: int) -> Transitions:
        total = [sp.csr_array((size, size), dtype=np.float64) for _ in range(2)]
        for number in numbers:
            with np.load(self.job.work / "sums" / f"{number}.npz") as kept:
                for side in range(2):
                    arrays = (kept[f"{side}_{name}"] for name in ("data", "indices", "indptr"))
                    total[side] = lightened(total[side] + sp.csr_array(tuple(arrays), shape=(size, size)))
        return of_pairs(total, degree)

    def _rejected_files(self, small: dict[str, list[pl.DataFrame]]) -> list[Path]:
        """Files of rejected rows in the order of rejected.parquet."""
        found = self._rule_files("bad_time")
        for name in ("items", *EVENT_RULES, "corpus"):
            if name not in small:
                found += self._rule_files(name)
            for i, frame in enumerate(small.get(name, ())):
                write_frame(frame, path := self.job.work / f"rejected-{name}-{i}.parquet")
                found.append(path)
        if not found:
            write_frame(pl.DataFrame(schema=REJECTED_SCHEMA), path := self.job.work / "rejected-none.parquet")
            found.append(path)
        return found

    def _records(self, parts: list[ranges.Range], texts: dict, levels: int, kinds: tuple[str, ...]) -> dict[str, int]:
        """Shards of every split, and index.npz."""
        met = self.workers.each("histories", partial(ranges.write_histories, self.job, levels, kinds), parts)
        index: dict[str, np.ndarray] = {}
        sizes: dict[str, int] = {}
        shards = []
        for split, others in zip(SPLITS, texts_by_split(texts), strict=True):
            mine = [one[split] for one in met]
            tokens, events = (np.concatenate([one[name] for one in mine]) for name in ("tokens", "events"))
            held = Histories(iter(()), tokens, events, sum(one["targets"] for one in mine))
            add_index(index, sizes, split, held, others)
            last = ranges.history_file(self.job, split, 99_999)
            ranges.write_blobs(last, map(encode, others))
            files = [(ranges.history_file(self.job, split, part.number), len(one["tokens"])) for part, one in zip(parts, mine, strict=True)]  # fmt: skip
            shards += ranges.shards_of(self.job.work, split, [*files, (last, len(others))], self.shard_records)
        self.workers.each("shards", ranges.write_shard, shards)
        for shard in shards:
            os.replace(shard.path, self.folder / shard.path.name)
        np.savez(self.folder / "index.npz", **index)
        return sizes


@dataclass(frozen=True)
class _Silent:
    """What is known of users, where there is no table of them."""

    users: int

    def __iter__(self) -> Iterator[str]:
        return ("" for _ in range(self.users))


@dataclass(frozen=True)
class _Queries:
    """Texts of training events, read again by whoever asks."""

    job: rows.Job
    numbers: list[int]

    def __iter__(self) -> Iterator[str]:
        return ranges.queries_of(self.job, self.numbers)


def _targets(job: rows.Job, number: int) -> int:
    return len(ranges.target_times(job, number))


def _examples(paths: list[Path]) -> pl.DataFrame:
    """The first few rejected rows of each rule, which are those that the report shows."""
    scan = pl.scan_parquet(paths)
    found = [scan.filter(pl.col("rule") == rule).head(3).collect() for rule in RULES]
    return pl.concat(found)


def _name(job: rows.Job, parts: list[ranges.Range], user: int) -> str:
    part = next(part for part in reversed(parts) if part.first_user <= user)
    return pl.read_parquet(job.file("users", part.number))["user_id"][user - part.first_user]


def _joined(paths: list[Path], target: Path) -> None:
    """Parquet files end to end as one, a few row groups in memory."""
    pl.scan_parquet(paths).sink_parquet(target, row_group_size=GROUP_ROWS, maintain_order=True)
