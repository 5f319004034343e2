"""From a data card to a dataset folder: read, clean, split, then everything that training and serving read.

Order matters for leakage: events are split first, and whatever is learnt (transitions, codes, tokenizer, counts) is
given training events and training text only. Content vectors see the text of every item, and no behaviour.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl

import m6rec_jax
from m6rec_jax import progress
from m6rec_jax.artifacts.atomic import atomic_path
from m6rec_jax.artifacts.manifest import MANIFEST, file_digest, write_manifest
from m6rec_jax.artifacts.schemas import DATASET
from m6rec_jax.data import catalogue
from m6rec_jax.data.borrow import (
    BORROW,
    LENT,
    Borrowed,
    borrowed,
    check_content,
    check_options,
    code_items,
    continued,
    joined_tables,
    lender_folder,
)
from m6rec_jax.data.card import Card, load_card
from m6rec_jax.data.card_checks import is_frame, paths_of
from m6rec_jax.data.clean import Cleaned, clean
from m6rec_jax.data.codes import Codebooks
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.data.encoders import TFIDF, content_arrays, encode
from m6rec_jax.data.events import Events, event_arrays, user_table
from m6rec_jax.data.features import WIDTH, fit_encoder, fit_fields, item_texts
from m6rec_jax.data.histories import add_index, histories
from m6rec_jax.data.instances.gather import Asked, asked_tasks, tell_tasks
from m6rec_jax.data.instances.read import options_of
from m6rec_jax.data.instances.told import Encoded, Told, add_instances, encode_told, write_told
from m6rec_jax.data.instances.world import World
from m6rec_jax.data.neighbours import find_neighbours
from m6rec_jax.data.privacy import check_key_place, key_mark, read_key
from m6rec_jax.data.quality import check_thresholds, quality_report
from m6rec_jax.data.records import RecordWriter
from m6rec_jax.data.said import Said, texts_by_split
from m6rec_jax.data.sources import read_tables
from m6rec_jax.data.splits import LEAST_EVENTS, SPLITS, TRAIN, split_events
from m6rec_jax.data.tokenizer import Tokenizer, train_tokenizer
from m6rec_jax.data.transitions import Transitions, count_transitions
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import Vocab

T = TypeVar("T")
GROUP_ROWS = 100_000  # rows of a row group, said so that the same rows give the same bytes however they come together
AT_ONCE = 1000  # texts or records between two looks at the bar
STAGES = ("read", "clean", "quality", "split", "features", "transitions", "codes", "tokenizer", "records", "tables")


@dataclass(frozen=True)
class Options:
    """What a caller of `prepare` may choose, where nothing is borrowed."""

    levels: int = 1
    codebook: int = 256
    vocab_size: int = 4096
    content_width: int = WIDTH


def prepare(
    card: Card | Path | str | dict[str, Any],
    out: Path | str | None = None,
    *,
    like: Path | str | None = None,
    borrow: str = "everything",
    append: bool = False,
    levels: int | None = None,
    codebook: int | None = None,
    vocab_size: int | None = None,
    content_width: int | None = None,
) -> Dataset:
    """Write the dataset of `card` into folder `out` and open it; quick when the same was prepared there before.

    `out` left out is `<name of the card>-dataset` in the current folder. `like`, a run or dataset, lends its tokenizer,
    features and codes: old items keep theirs; with `borrow="tokenizer"` the tokenizer alone, for another catalogue that is
    to be trained together with that one. `append` adds the card's events to the dataset in `out`; what the card
    leaves out is as there. Sizes left out are those of `Options`, or of what is borrowed.

    Everything is held in memory at once, the events several times over while they are cleaned and joined: a million
    events of 50,000 titled items took 0.7 GB, with three levels 0.9 GB (benchmarks/results/prepare.json), and it grows
    with events and text. Nothing works out of core; `append` reads the whole dataset again, so it is no way round this;
    `data.beam.prepare` is.

    Raises InputError on bad input, and rather than overwrite anything in `out`.
    """
    card = load_card(card)
    out = Path(out) if out is not None else Path(re.sub(r"[^\w.-]+", "-", card.name).strip(".-") + "-dataset")
    check_key_place(card, out)
    before = dataset_before(out, append)
    grown = before if append else None
    if grown is not None:
        card = continued(grown, card)
    asked = {"levels": levels, "codebook": codebook, "vocab_size": vocab_size, "content_width": content_width}
    if borrow not in BORROW:
        raise InputError(f"--borrow {borrow}: choose one of {', '.join(BORROW)}")
    if borrow != BORROW[0] and (append or not like):
        raise InputError(f"--borrow {borrow}: says what --like lends{' and goes not with --append' if append else ''}; name a run or dataset with --like")  # fmt: skip
    lender = lender_folder(Path(like), card.name) if like else out if grown is not None else None
    lent = borrowed(lender) if lender else None
    tokenizer = lent.tokenizer if lent else None
    if lent and lender:
        only_text = borrow == "tokenizer"
        check_options(lent, lender, {"vocab_size": vocab_size} if only_text else asked)
        lent = None if only_text else lent
        if lent:
            check_content(lent, lender, card)
    options = Options(**{name: value for name, value in asked.items() if value is not None})
    lends = () if not like else ("tokenizer.model",) if borrow == "tokenizer" else LENT
    asked_for = asked_tasks(card, grown)
    inputs = inputs_digest(card, None if lent else options, lender, lends, asked_for)
    if before is not None:
        known = before.manifest["inputs"]
        if not append and known != [inputs]:
            raise InputError(f"{out}: holds a dataset made from other input; name another --out, remove it, or add to it with --append")  # fmt: skip
        if inputs in known:
            progress.note(f"{out}: prepared before from the same input")
            return before
    with progress.stage(f"prepare {card.name}", total=len(STAGES) + bool(asked_for), unit="steps") as bar:
        clock = Clock(bar)
        with clock("read"):
            tables = read_tables(card)
        if grown is not None:
            tables = joined_tables(grown, tables, card)
        with clock("clean", tables.events.height, "rows"):
            cleaned = clean(tables, card)
        with atomic_path(out) as folder:
            folder.mkdir()
            with clock("quality"):
                found = quality_report(tables, cleaned, card, folder / "quality.html")
                check_thresholds(found, card, folder / "quality.html", out.with_name(f"{out.name}.quality.html"))
            body = _write(card, cleaned, folder, lent, tokenizer, options, clock, asked_for)
            if grown is not None:
                body["card"] = grown.manifest["card"] | body["card"]
            body["quality"] = found["limits"]
            body["inputs"] = [*(grown.manifest["inputs"] if grown is not None else ()), inputs]
            body["seconds"] = {name: round(value, 3) for name, value in clock.seconds.items()}
            write_manifest(
                folder,
                DATASET.name,
                DATASET.version,
                body,
                [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST],
            )
    events, spent = body["sizes"]["events"], sum(clock.seconds.values())
    progress.note(f"prepare {card.name}: {events:,} events in {spent:.1f} s, {events / spent:,.0f} a second")
    return open_dataset(out)


def _write(card: Card, cleaned: Cleaned, folder: Path, lent: Borrowed | None, tokenizer: Tokenizer | None,
           options: Options, clock: Clock, asked_for: list[Asked]) -> dict:  # fmt: skip
    """Everything but the manifest, whose body is returned."""
    tables = cleaned.tables
    timed = card.events.time_unit != "order"
    with clock("split"):
        items = catalogue.lay_out(tables.items, lent.items if lent else None)
        users = user_table(tables)
        events = event_arrays(tables.events, users["user_id"], items["item_id"], card, lent.kinds if lent else ())
        label = split_events(events.users, events.times, events.is_target, card.split)
        train = (label == TRAIN) & (events.items >= 0)
        counts = np.bincount(events.items[train], minlength=items.height)
        items = items.with_columns(events=counts, seen=counts > 0)
        users = users.with_columns(events=np.bincount(events.users[train], minlength=users.height))

    def transitions_of(catalogue: int) -> Transitions:
        return count_transitions(events.users[train], events.items[train], events.times[train],
                                 events.weights[train], catalogue=catalogue)  # fmt: skip

    learnt = learn_items(card, items, transitions_of, folder, lent, options, clock)
    items, books = learnt.items, learnt.books
    queries = events.texts.filter(pl.Series((label == TRAIN) & (events.items < 0)))
    attributes, asked = users["attributes"].list.join("; ").to_list(), queries.drop_nulls().to_list()
    told: list[Told] = []
    quiet = None
    if asked_for:
        with clock("instances"):
            derived = [one.template.task for one in asked_for if not one.table]
            world = World(items, users, events, label, tables.impressions, timed, derived)
            quiet = world.item_splits > TRAIN
            told = tell_tasks(card, asked_for, world)
            asked += dict.fromkeys(text for one in told for text in one.texts("train"))
    said = Said.of(items, tables.corpus, quiet)
    tokenizer = learn_words(said, attributes, asked, folder, tokenizer, options, clock)
    with clock("records"):
        instances = encode_told(told, tokenizer, Vocab(tokenizer.size, (books.size,) * books.levels), learnt.codes)
        index, sizes = _write_records(folder, events, label, said, tokenizer, books.levels, timed, instances)
        np.savez(folder / "index.npz", **index)
    with clock("tables"):
        items.write_parquet(folder / "items.parquet", row_group_size=GROUP_ROWS)
        users.write_parquet(folder / "users.parquet", row_group_size=GROUP_ROWS)
        write_told(told, folder)
        events.table(label).write_parquet(folder / "events.parquet", row_group_size=GROUP_ROWS)
        cleaned.rejected.write_parquet(folder / "rejected.parquet", row_group_size=GROUP_ROWS)
        if tables.impressions is not None:
            tables.impressions.write_parquet(folder / "impressions.parquet")
    targets = np.bincount(events.users[events.is_target], minlength=users.height)
    part = {
        "seen_items": int((counts > 0).sum()),
        "users": users.height,
        "short_users": int((targets < LEAST_EVENTS).sum()),
        "events": len(events.users),
        **{f"{name}_events": int((label == i).sum()) for i, name in enumerate(SPLITS)},
        "documents": len(said.documents),
        "transitions": learnt.transitions,
        **sizes,
    }
    return manifest_body(card, cleaned.counts, learnt, tokenizer, part, events.kind_names, events.kind_weights, instances.entries)  # fmt: skip


@dataclass(frozen=True)
class Learnt:
    """What was learnt of the catalogue: its table with said numbers, its codebooks and codes [C, L], the width of content,
    pairs counted."""

    items: pl.DataFrame
    books: Codebooks
    codes: np.ndarray
    content_width: int
    transitions: int


def learn_items(card: Card, items: pl.DataFrame, transitions_of: Callable[[int], Transitions], folder: Path,
                lent: Borrowed | None, options: Options, clock: Clock) -> Learnt:  # fmt: skip
    """Features, transitions and codes of the catalogue, written to transitions.npz and codes.npz."""
    with clock("features", items.height, "items"):
        fields = lent.fields if lent else fit_fields(items)
        items = fields.apply(items)
        said_how = lent.content if lent else card.content
        texts = item_texts(items, said_how.fields)
        encoder, content = (lent.encoder, None) if lent else fit_encoder(texts, options.content_width)
        if said_how.encoder != TFIDF:  # the topics of a profile read TF-IDF all the same
            content = encode(said_how.encoder, texts)
        elif content is None:
            content = encoder.encode(texts)
    with clock("transitions"):
        transitions = transitions_of(items.height)
        transitions.save(folder / "transitions.npz")
    with clock("codes", items.height, "items"):
        codes, books = code_items(content, transitions, items["item_id"], options.levels, options.codebook, lent)
        alike = find_neighbours(content, encoder.weigh(texts) if said_how.encoder == TFIDF else None)
        np.savez(folder / "codes.npz", codes=codes, content=content, **alike.arrays(), **books.arrays(), **encoder.arrays(), **content_arrays(said_how), **fields.arrays())  # fmt: skip
    return Learnt(items, books, codes, content.shape[1], len(transitions.forward.weights))


def learn_words(said: Said, attributes: Iterable[str], queries: Iterable[str], folder: Path,
                tokenizer: Tokenizer | None, options: Options, clock: Clock) -> Tokenizer:  # fmt: skip
    """The tokenizer, lent or trained on what is said, of items, documents and users; both iterables are read twice."""
    with clock("tokenizer", 0 if tokenizer else sum(1 for _ in said.heard(attributes, queries)), "texts") as bar:
        if tokenizer:
            tokenizer.save(folder / "tokenizer.model")
            return tokenizer
        heard = counted(said.heard(attributes, queries), bar)
        tokenizer = train_tokenizer(heard, folder / "tokenizer.model", options.vocab_size)
        if tokenizer.size < options.vocab_size:
            progress.note(f"tokenizer: {tokenizer.size} pieces; the texts support no more of vocab_size {options.vocab_size}")  # fmt: skip
    return tokenizer


def manifest_body(card: Card, counts: dict[str, int], learnt: Learnt, tokenizer: Tokenizer, sizes: dict[str, int],
                  kind_names: list[str], kind_weights: list[float],
                  tasks: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:  # fmt: skip
    """The manifest of a dataset, but for its inputs and how long it took."""
    books = learnt.books
    return {
        "name": card.name,
        "card": card.to_dict(),
        "counts": counts,
        "split": {"rule": card.split.rule, "valid": card.split.valid, "test": card.split.test},
        "sizes": {"items": learnt.items.height, **sizes},
        "vocab": Vocab(tokenizer.size, (books.size,) * books.levels, options=options_of(tasks)).as_dict(),
        "levels": books.levels,
        "content_width": learnt.content_width,
        "timed": card.events.time_unit != "order",
        "repeat": card.repeat,
        "privacy": {"ids": card.privacy.ids} | ({"key_mark": key_mark(key)} if (key := read_key(card)) else {}),
        "kinds": kind_names,
        "kind_weights": kind_weights,
        "made_by": f"m6rec_jax {m6rec_jax.__version__}",
    } | ({"tasks": list(tasks)} if tasks else {})


def _write_records(folder: Path, events: Events, label: np.ndarray, said: Said, tokenizer: Tokenizer, levels: int,
                   timed: bool, instances: Encoded) -> tuple[dict[str, np.ndarray], dict[str, int]]:  # fmt: skip
    """Records of every split: histories by user row, then items and documents, then instances. Returns (index arrays,
    sizes)."""
    texts = said.records(tokenizer)
    index: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    for (split, held), others in zip(
        histories(events, label, tokenizer, levels, timed), texts_by_split(texts), strict=True
    ):
        more, lengths = instances.records[split], instances.lengths[split]
        with (
            progress.stage(f"{split} records", total=len(held.events) + len(others) + len(more), unit="records") as bar,
            RecordWriter(folder, split) as writer,
        ):
            for record in counted(chain(held.encoded, others, more), bar):
                writer.write(record)
        add_index(index, sizes, split, held, others)
        if instances.entries:
            add_instances(index, sizes, split, more, lengths)
    return index, sizes


def inputs_digest(card: Card, options: Options | None, lender: Path | None, lends: Iterable[str],
                  asked_for: Sequence[Asked] = ()) -> str:  # fmt: skip
    """Digest of all that decides the result: the card, its tables, the options, what is borrowed, the code's version."""
    found: dict[str, Any] = {
        "card": card.to_dict(),
        "options": vars(options) if options else {},
        "version": m6rec_jax.__version__,
    }
    tables = {name: getattr(card, name) for name in ("events", "items", "users", "corpus", "impressions")}
    for name, table in (tables | {f"tasks.{one.name}": one.task for one in asked_for}).items():
        if table is not None and table.path is not None:
            found[name] = (
                [_frame_digest(table.path)] if is_frame(table.path) else [file_digest(p) for p in paths_of(table)]
            )
    if asked_for:
        found["templates"] = {one.name: one.template.body for one in asked_for}
    if card.privacy.key:
        found["key"] = hashlib.sha256(Path(card.privacy.key).read_bytes()).hexdigest()
    if lends and lender:
        found["like"] = {n: file_digest(lender / n) for n in lends if (lender / n).is_file()}
    return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()


def _frame_digest(frame: Any) -> str:
    frame = frame.collect() if isinstance(frame, pl.LazyFrame) else pl.DataFrame(frame)
    digest = hashlib.sha256(str(frame.schema).encode())
    digest.update(frame.hash_rows().to_numpy().tobytes())
    return digest.hexdigest()


def dataset_before(out: Path, append: bool) -> Dataset | None:
    """The dataset that lies in `out`; None when the place is free. InputError when it may not be touched."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file, not a folder; name another --out")
    if not out.exists() or not any(out.iterdir()):
        if append:
            raise InputError(f"{out}: no dataset there to append to; prepare one first, without --append")
        return None
    if not (out / MANIFEST).is_file():
        raise InputError(f"{out}: not empty and not a dataset; name another --out")
    return open_dataset(out)


def counted(things: Iterable[T], bar: progress.Stage) -> Iterator[T]:
    """`things`, counted on a bar every `AT_ONCE`."""
    n = 0
    for n, thing in enumerate(things, 1):
        if n % AT_ONCE == 0:
            bar.advance(AT_ONCE)
        yield thing
    bar.advance(n % AT_ONCE)


@dataclass
class Clock:
    """Seconds of each stage; a bar of all stages, and one of its own for a stage that works on `total` of something."""

    bar: progress.Stage
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str, total: int = 0, unit: str = "") -> Iterator[progress.Stage]:
        start = time.perf_counter()
        self.bar.advance(0, at=name)
        if total:
            with progress.stage(name, total=total, unit=unit) as own:
                yield own
                own.advance(total - own.done)  # of what a single call works through nothing is known before its end
        else:
            yield self.bar
        self.seconds[name] = time.perf_counter() - start
        self.bar.advance(1)
