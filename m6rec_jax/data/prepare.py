"""From a data card to a dataset folder: read, clean, split, then everything that training and serving read.

Order matters for leakage: events are split first, and whatever is learnt (transitions, codes, tokenizer, counts) is
given training events and training text only. Content vectors see the text of every item, and no behaviour.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import m6rec_jax
from m6rec_jax import progress
from m6rec_jax.artifacts.atomic import atomic_path
from m6rec_jax.artifacts.manifest import MANIFEST, file_digest, read_manifest, write_manifest
from m6rec_jax.artifacts.schemas import DATASET
from m6rec_jax.data import catalogue
from m6rec_jax.data.card import Card, load_card
from m6rec_jax.data.card_checks import is_frame
from m6rec_jax.data.clean import Cleaned, clean
from m6rec_jax.data.codes import Codebooks, assign_codes, fit_codebooks
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.data.features import Encoder, Fields, TfidfEncoder, fit_encoder, fit_fields, item_texts
from m6rec_jax.data.history import history_lengths
from m6rec_jax.data.records import DOCUMENT, HISTORY, ITEM, Record, RecordWriter, encode_histories
from m6rec_jax.data.sources import read_tables
from m6rec_jax.data.splits import LEAST_EVENTS, SPLITS, TRAIN, VALID, records_of, split_events
from m6rec_jax.data.tokenizer import Tokenizer, train_tokenizer
from m6rec_jax.data.transitions import Transitions, count_transitions
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import Vocab


@dataclass(frozen=True)
class Events:
    """Cleaned events as arrays `[n]`, by user, then time: rows of user and item (-1 = query), and the rest."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    kinds: np.ndarray
    values: pl.Series
    texts: pl.Series
    kind_names: list[str]
    weights: np.ndarray  # [n] float32: weight of each event as a target

    @property
    def is_target(self) -> np.ndarray:
        return (self.items >= 0) & (self.weights > 0)


def prepare(
    card: Card | Path | str | dict[str, Any],
    out: Path | str,
    *,
    like: Path | str | None = None,
    append: bool = False,
    levels: int = 1,
    codebook: int = 256,
    vocab_size: int = 4096,
) -> Dataset:
    """Write the dataset of `card` into folder `out` and open it; quick when the same was prepared there before.

    `like`, a run or dataset, lends its tokenizer, features and codes: old items keep theirs. `append` adds the card's
    events to the dataset in `out`. Raises InputError on bad input, and rather than overwrite anything else in `out`.
    """
    card, out = load_card(card), Path(out)
    options = {"levels": levels, "codebook": codebook, "vocab_size": vocab_size}
    inputs = _inputs_digest(card, options, like)
    if (done := _already(out, inputs, append)) is not None:
        return done
    seconds: dict[str, float] = {}
    with _timed(seconds, "read"):
        tables = read_tables(card)
    with _timed(seconds, "clean"):
        cleaned = clean(tables, card)
    with atomic_path(out) as folder:
        folder.mkdir()
        body = _write(card, cleaned, folder, Path(like) if like else None, options, seconds)
        body |= {"inputs": inputs, "seconds": {name: round(value, 3) for name, value in seconds.items()}}
        files = [p for p in folder.iterdir() if p.name != MANIFEST]
        write_manifest(folder, DATASET.name, DATASET.version, body, files)
    return open_dataset(out)


def _write(card: Card, cleaned: Cleaned, folder: Path, like: Path | None, options: dict[str, int],
           seconds: dict[str, float]) -> dict[str, Any]:  # fmt: skip
    """Everything but the manifest, whose body is returned."""
    borrowed = _borrow(like) if like else None
    items = catalogue.lay_out(cleaned.tables.items, borrowed["items"] if borrowed else None)
    users = _user_table(cleaned.tables)
    events = _event_arrays(cleaned.tables.events, users["user_id"], items["item_id"], card)
    timed, n_kinds = card.events.time_unit != "order", len(events.kind_names)
    with _timed(seconds, "split"):
        label = split_events(events.users, events.times, events.is_target, card.split)
        train = (label == TRAIN) & (events.items >= 0)
        item_counts = np.bincount(events.items[train], minlength=items.height)
        items = items.with_columns(events=item_counts, seen=item_counts > 0)
        users = users.with_columns(events=np.bincount(events.users[train], minlength=users.height))
    with _timed(seconds, "features"):
        fields = borrowed["fields"] if borrowed else fit_fields(items)
        items = fields.apply(items)
        texts = item_texts(items)
        encoder = borrowed["encoder"] if borrowed else fit_encoder(texts)
        content = encoder.encode(texts)
    with _timed(seconds, "transitions"):
        transitions = count_transitions(events.users[train], events.items[train], events.times[train],
                                        events.weights[train], catalogue=items.height)  # fmt: skip
        transitions.save(folder / "transitions.npz")
    with _timed(seconds, "codes"):
        codes, books = _codes(content, transitions, items, options, borrowed)
        np.savez(
            folder / "codes.npz", codes=codes, content=content, **books.arrays(), **encoder.arrays(), **fields.arrays()
        )
    spoken = catalogue.item_fields(items)
    has_text = np.array([any(parts) for parts in zip(*spoken, strict=True)], bool)
    documents = cleaned.tables.corpus["text"].to_list() if cleaned.tables.corpus is not None else []
    quiet_items = catalogue.held_out(items["item_id"].to_list(), has_text)
    quiet_documents = catalogue.held_out(documents, np.ones(len(documents), bool))
    with _timed(seconds, "tokenizer"):
        if borrowed:
            tokenizer = borrowed["tokenizer"]
            tokenizer.save(folder / "tokenizer.model")
        else:
            heard = _training_texts(spoken, quiet_items, documents, quiet_documents, users, events, label)
            tokenizer = train_tokenizer(heard, folder / "tokenizer.model", options["vocab_size"])
            if tokenizer.size < options["vocab_size"]:
                progress.note(
                    f"tokenizer: {tokenizer.size} pieces, the text supports no more (vocab_size {options['vocab_size']})"
                )
    vocab = Vocab(tokenizer.size, (books.size,) * books.levels if books.levels > 1 else (items.height,))
    with _timed(seconds, "records"):
        tokens = catalogue.item_tokens(spoken, tokenizer)
        coded = [np.array(t, np.int32) for t in tokenizer.encode_batch(documents)]
        texts_of = {
            split: [
                *(Record(ITEM, r, tokens=tokens[r]) for r in np.flatnonzero(has_text & (quiet_items == held)).tolist()),
                *(Record(DOCUMENT, r, tokens=coded[r]) for r in np.flatnonzero(quiet_documents == held).tolist()),
            ]
            for split, held in (("train", False), ("valid", True))
        }
        index, sizes = _write_records(folder, events, label, texts_of, tokenizer, books.levels, timed, n_kinds)
        np.savez(folder / "index.npz", **index)
    with _timed(seconds, "tables"):
        items.write_parquet(folder / "items.parquet")
        users.write_parquet(folder / "users.parquet")
        cleaned.rejected.write_parquet(folder / "rejected.parquet")
        _event_table(events, label).write_parquet(folder / "events.parquet")
        if cleaned.tables.impressions is not None:
            cleaned.tables.impressions.write_parquet(folder / "impressions.parquet")
    return {
        "name": card.name,
        "card": card.to_dict(),
        "counts": cleaned.counts,
        "split": {"rule": card.split.rule, "valid": card.split.valid, "test": card.split.test},
        "sizes": {
            "items": items.height,
            "seen_items": int((item_counts > 0).sum()),
            "users": users.height,
            "short_users": int(
                (np.bincount(events.users[events.is_target], minlength=users.height) < LEAST_EVENTS).sum()
            ),
            "events": len(events.users),
            **{f"{name}_events": int((label == i).sum()) for i, name in enumerate(SPLITS)},
            "documents": len(documents),
            "transitions": len(transitions.forward.weights),
            **sizes,
        },
        "vocab": vocab.as_dict(),
        "levels": books.levels,
        "content_width": content.shape[1],
        "timed": timed,
        "repeat": card.repeat,
        "kinds": events.kind_names,
        "kind_weights": [float(card.kinds.get(k, 1.0)) for k in events.kind_names],
        "made_by": f"m6rec_jax {m6rec_jax.__version__}",
    }


def _user_table(tables: Any) -> pl.DataFrame:
    """Users in the order of their first event, then those known from the users table alone."""
    users = tables.events.select(pl.col("user_id").unique(maintain_order=True))
    if tables.users is None:
        return users.with_columns(attributes=pl.lit([], dtype=pl.List(pl.String)))
    known = tables.users.select("user_id", "attributes")
    silent = known.filter(~pl.col("user_id").is_in(users["user_id"].implode())).select("user_id")
    return (
        pl.concat([users, silent])
        .join(known, on="user_id", how="left", maintain_order="left")
        .with_columns(pl.col("attributes").fill_null(pl.lit([], dtype=pl.List(pl.String))))
    )


def _event_arrays(events: pl.DataFrame, user_ids: pl.Series, item_ids: pl.Series, card: Card) -> Events:
    kinds = np.zeros(events.height, np.uint8)
    names: list[str] = []
    if card.events.kind:
        spelled = events["kind"].fill_null("")
        names = list(card.kinds) or spelled.unique().sort().to_list()
        kinds = rows_of_kinds(spelled, names)
    weights = np.array([card.kinds.get(k, 1.0) for k in names] or [1.0], np.float32)
    return Events(
        users=catalogue.rows_of(events["user_id"], user_ids),
        items=catalogue.rows_of(events["item_id"], item_ids),
        times=events["time"].to_numpy(),
        kinds=kinds,
        values=events["value"],
        texts=events["text"],
        kind_names=names,
        weights=weights[kinds],
    )


def rows_of_kinds(spelled: pl.Series, names: list[str]) -> np.ndarray:
    """Number of each kind `[n]` uint8."""
    return spelled.replace_strict(names, range(len(names)), return_dtype=pl.UInt8).to_numpy()


def _event_table(events: Events, label: np.ndarray) -> pl.DataFrame:
    """What `append` and evaluation need of the events: rows, time, kind, value, text, split (0 train, 1, 2)."""
    return pl.DataFrame(
        {
            "user": events.users,
            "item": events.items,
            "time": events.times,
            "kind": events.kinds,
            "value": events.values,
            "text": events.texts,
            "split": label,
        }
    )


def _codes(content: np.ndarray, transitions: Transitions, items: pl.DataFrame, options: dict[str, int],
           borrowed: dict[str, Any] | None) -> tuple[np.ndarray, Codebooks]:  # fmt: skip
    if borrowed is None:
        books = fit_codebooks(content, transitions, options["levels"], options["codebook"])
        return assign_codes(content, books), books
    books, old = borrowed["books"], borrowed["items"]["item_id"]
    kept = borrowed["codes"] if items.height >= len(old) and (items["item_id"][: len(old)] == old).all() else None
    n_kept = 0 if kept is None else len(kept)
    added = assign_codes(content[n_kept:], books, kept)
    codes = added if kept is None else np.concatenate([kept, added])
    return codes, books if books.levels > 1 else Codebooks(1, len(codes))


def _training_texts(spoken, quiet_items, documents, quiet_documents, users, events, label) -> Iterator[str]:
    """All that the tokenizer may learn from: training items, documents and queries, and what users say of themselves."""
    for parts in spoken:
        yield from (part for part, quiet in zip(parts, quiet_items, strict=True) if part and not quiet)
    yield from (text for text, quiet in zip(documents, quiet_documents, strict=True) if not quiet)
    yield from users["attributes"].list.join("; ").to_list()
    yield from events.texts.filter(pl.Series((label == TRAIN) & (events.items < 0))).drop_nulls().to_list()


def _write_records(folder: Path, events: Events, label: np.ndarray, texts: dict[str, list[Record]],
                   tokenizer: Tokenizer, levels: int, timed: bool, n_kinds: int) -> tuple[dict, dict]:  # fmt: skip
    """Records of every split: histories by user row, then items and documents. Returns (index arrays, sizes)."""
    queries = np.flatnonzero(events.items < 0)
    coded = dict(zip(queries.tolist(), tokenizer.encode_batch(events.texts[queries].to_list()), strict=True))
    lengths = np.full(len(events.items), -1, np.int64)
    lengths[queries] = [len(coded[i]) for i in queries.tolist()]
    index: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    for number, split in enumerate(SPLITS):
        held = records_of(label, events.users, events.is_target, number)
        at, starts = held.events, held.starts
        users, n = events.users[at], np.diff(held.starts)
        added = history_lengths(levels, users, events.times[at], timed, n_kinds, lengths[at])
        n_tokens = np.add.reduceat(added, starts[:-1]) if len(n) else n
        asked = {
            place: np.array(coded[int(at[place])], np.int32) for place in np.flatnonzero(events.items[at] < 0).tolist()
        }
        said = texts.get(split, [])
        with RecordWriter(folder, split) as writer:
            for blob in encode_histories(users[starts[:-1]], starts, events.items[at], events.times[at],
                                         events.kinds[at], held.targets, asked):  # fmt: skip
                writer.write(blob)
            for record in said:
                writer.write(record)
        index[f"{split}_kind"] = np.array([HISTORY] * len(n) + [r.kind for r in said], np.uint8)
        index[f"{split}_tokens"] = np.concatenate([n_tokens, [len(r.tokens) for r in said]]).astype(np.int32)
        index[f"{split}_events"] = np.concatenate([n, np.zeros(len(said))]).astype(np.int32)
        sizes[f"{split}_histories"], sizes[f"{split}_records"] = len(n), len(n) + len(said)
        if number >= VALID:
            sizes[f"{split}_targets"] = int(held.targets.sum())
    return index, sizes


def _borrow(like: Path) -> dict[str, Any]:
    """What another dataset or run lends: tokenizer, items, features, codes."""
    try:
        with np.load(like / "codes.npz", allow_pickle=False) as data:
            arrays = dict(data)
        items = pl.read_parquet(like / "items.parquet")
        encoder: Encoder = TfidfEncoder.from_arrays(arrays)
        return {
            "tokenizer": Tokenizer.load(like / "tokenizer.model"),
            "items": items,
            "codes": arrays["codes"],
            "books": Codebooks.from_arrays(arrays),
            "encoder": encoder,
            "fields": Fields.from_arrays(arrays),
        }
    except (OSError, KeyError, ValueError, pl.exceptions.PolarsError) as error:
        raise InputError(
            f"--like {like}: neither a dataset nor a run ({error}); name a folder that prepare or train wrote"
        ) from None


def _inputs_digest(card: Card, options: dict[str, Any], like: Path | str | None) -> str:
    """Digest of all that decides the result: the card, its tables, the options, what is borrowed, the code's version."""
    found: dict[str, Any] = {"card": card.to_dict(), "options": options, "version": m6rec_jax.__version__}
    for name in ("events", "items", "users", "corpus", "impressions"):
        if (table := getattr(card, name)) is not None:
            found[name] = _frame_digest(table.path) if is_frame(table.path) else file_digest(table.path)
    if card.privacy.key:
        found["key"] = hashlib.sha256(Path(card.privacy.key).read_bytes()).hexdigest()
    if like:
        names = ("codes.npz", "items.parquet", "tokenizer.model")
        found["like"] = {n: file_digest(Path(like) / n) for n in names if (Path(like) / n).is_file()}
    return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()


def _frame_digest(frame: Any) -> str:
    frame = frame.collect() if isinstance(frame, pl.LazyFrame) else pl.DataFrame(frame)
    digest = hashlib.sha256(str(frame.schema).encode())
    digest.update(frame.hash_rows().to_numpy().tobytes())
    return digest.hexdigest()


def _already(out: Path, inputs: str, append: bool) -> Dataset | None:
    """The dataset in `out` when it is the one asked for; None when `out` is free."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise InputError(f"{out}: a file, not a folder; name another --out")
    if not any(out.iterdir()):
        return None
    if not (out / MANIFEST).is_file():
        raise InputError(f"{out}: not empty and not a dataset; name another --out")
    if read_manifest(out, DATASET.name, DATASET.version).get("inputs") == inputs:
        progress.note(f"{out}: prepared before from the same input")
        return open_dataset(out)
    raise InputError(
        f"{out}: holds a dataset made from other input; name another --out, remove it, or add to it with --append"
    )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
