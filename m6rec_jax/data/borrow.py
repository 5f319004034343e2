"""Growing what is there: `--like` borrows what another dataset or run was fitted with, `--append` adds to a dataset."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import polars as pl

from m6rec_jax.artifacts.manifest import MANIFEST
from m6rec_jax.artifacts.run import RUN_FILE, domain_folder, folder_name, read_run_file
from m6rec_jax.data.arrays import read_arrays
from m6rec_jax.data.card import Card, Split
from m6rec_jax.data.card_types import Content
from m6rec_jax.data.codes import Codebooks, assign_codes, fit_codes
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.encoders import content_of
from m6rec_jax.data.features import Fields, TfidfEncoder
from m6rec_jax.data.privacy import key_mark, read_key
from m6rec_jax.data.records import DOCUMENT
from m6rec_jax.data.sources import EVENT_SCHEMA, Tables
from m6rec_jax.data.tokenizer import Tokenizer
from m6rec_jax.data.transitions import Transitions
from m6rec_jax.errors import InputError

EVENT_COLUMNS = ("user", "item", "time", "fraction", "kind", "value", "text")  # what `_events` reads
LENT = ("codes.npz", "items.parquet", "tokenizer.model")
BORROW = ("everything", "tokenizer")  # what `--like` may lend


@dataclass(frozen=True)
class Borrowed:
    """What an earlier dataset was fitted with; every dataset that a model is to read shares it with the model's own."""

    items: pl.DataFrame
    codes: np.ndarray
    books: Codebooks
    encoder: TfidfEncoder
    content: Content
    fields: Fields
    tokenizer: Tokenizer
    kinds: list[str]


def lender_folder(folder: Path, name: str) -> Path:
    """Where what `--like` lends lies: in the folder it names or, of a run on several datasets, where the run keeps that of
    this name; that of the first when there is none."""
    if not (folder / RUN_FILE).is_file():
        return folder
    names = [one["summary"].get("name") for one in read_run_file(folder)["datasets"]]
    return domain_folder(folder, name, names.index(name)) if name in names else folder


def borrowed(folder: Path) -> Borrowed:
    """Read it from a dataset or a run folder. Raises InputError when the folder is neither."""
    missing = [name for name in LENT if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: neither a dataset nor a run ({missing[0]} is missing); name a folder that prepare or train wrote")  # fmt: skip
    arrays = read_arrays(folder / "codes.npz")
    try:
        return Borrowed(
            items=pl.read_parquet(folder / "items.parquet"),
            codes=arrays["codes"],
            books=Codebooks.from_arrays(arrays),
            encoder=TfidfEncoder.from_arrays(arrays),
            content=content_of(arrays),
            fields=Fields.from_arrays(arrays),
            tokenizer=Tokenizer.load(folder / "tokenizer.model"),
            kinds=_kinds(folder),
        )
    except (OSError, KeyError, ValueError, IndexError, pl.exceptions.PolarsError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: damaged ({reason}); prepare or train it again") from None


def _kinds(folder: Path) -> list[str]:
    if (folder / MANIFEST).is_file():
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["kinds"]
    if (folder / RUN_FILE).is_file():
        return read_run_file(folder)["datasets"][0]["summary"]["kinds"]
    others = [one["summary"] for one in read_run_file(folder.parents[1])["datasets"]]  # a further domain's own folder
    return next(one["kinds"] for one in others if folder_name(one["name"]) == folder.name)


def code_items(content: np.ndarray, transitions: Transitions, item_ids: pl.Series, levels: int, size: int,
               borrowed: Borrowed | None) -> tuple[np.ndarray, Codebooks]:  # fmt: skip
    """(codes [C, L], codebooks): fitted afresh, or the borrowed ones, with codes for the items that have none yet."""
    if borrowed is None:
        return fit_codes(content, transitions, levels, size)
    old = borrowed.items["item_id"]
    kept = borrowed.codes if item_ids[: len(old)].equals(old) else borrowed.codes[:0]
    codes = np.concatenate([kept, assign_codes(content[len(kept) :], borrowed.books, kept)])
    return codes, borrowed.books if borrowed.books.levels > 1 else Codebooks(1, len(codes))


def joined_tables(dataset: Dataset, new: Tables, card: Card) -> Tables:
    """The tables of a dataset with new ones behind them, still to be cleaned; what is new of an item or user counts.

    Without an items table in the card the catalogue there is stays the catalogue. Events that have only an order come
    after all that their user did before.
    """
    old_events = _events(dataset)
    events = new.events
    if not dataset.timed:
        last = old_events.group_by("user_id").agg(shift=pl.col("time").max() + 1)
        shifted = events.join(last, on="user_id", how="left", maintain_order="left")
        events = shifted.with_columns(pl.col("time") + pl.col("shift").fill_null(0)).drop("shift")
    old_items = dataset.items.drop("row", strict=False)
    items = old_items if new.items is None else _new_first(new.items, old_items, "item_id")
    if new.items is None and "items" not in dataset.manifest["card"]:
        items = None  # the catalogue was, and is, whatever events name
    users = dataset.users.select("user_id", "attributes")
    shown, path = new.impressions, dataset.path / "impressions.parquet"
    if path.is_file():
        shown = _numbered(pl.concat([pl.read_parquet(path), *([shown] if shown is not None else [])], how="diagonal"))
    documents = pl.DataFrame({"text": _documents(dataset)}, schema={"text": pl.String})
    corpus = documents if new.corpus is None else pl.concat([documents, new.corpus.select("text")])
    return replace(
        new,
        events=_numbered(pl.concat([old_events, events.select(list(EVENT_SCHEMA))])),
        items=None if items is None else _numbered(items),
        users=_numbered(users if new.users is None else _new_first(new.users, users, "user_id")),
        corpus=_numbered(corpus) if corpus.height else None,
        impressions=shown,
    )


def continued(dataset: Dataset, card: Card) -> Card:
    """The card of events to append: what it leaves out is as in the dataset.

    Raises InputError naming the key, the dataset's value and the card's, where the two contradict each other: clock,
    split, repeat, kinds and their weights, hidden ids and the key that hid them; and where the dataset is of an earlier
    make that lacks what appending reads.
    """
    was = dataset.manifest
    _check_make(dataset)

    def refuse(key: str, value: Any, old: Any, way_out: str) -> NoReturn:
        raise InputError(f"{card.origin}: {key}: {value}: the dataset {dataset.path} has {old}; {way_out}")

    unit = card.events.time_unit
    if dataset.timed != (unit != "order"):
        refuse("events.time_unit", unit, "seconds" if dataset.timed else "an order", "append events of the same clock")
    split, old_split = card.split, Split(**was["split"])
    if "split" not in card.given:
        split = old_split
    elif _split_said(split) != _split_said(old_split):
        refuse("split", _split_said(split), _split_said(old_split), "leave `split` out, or prepare everything anew")
    if "repeat" in card.given and card.repeat != was["repeat"]:
        refuse("repeat", _yaml(card.repeat), _yaml(was["repeat"]), "leave `repeat` out, or prepare everything anew")
    hidden = was["privacy"]["ids"]
    if card.privacy.ids != hidden:
        way_out = "name the same key file" if hidden == "hmac" else "leave `privacy` out, or prepare everything anew"
        refuse("privacy.ids", card.privacy.ids, hidden, way_out)
    if (key := read_key(card)) is not None and key_mark(key) != was["privacy"]["key_mark"]:
        refuse("privacy.key", card.privacy.key, "ids hidden with another key", "name the key it was prepared with")
    # A dataset without kinds may have had `kinds:` in its card: they said nothing there, and say nothing now.
    kinds = card.kinds
    if card.events.kind or dataset.kinds:
        listed = was["card"].get("kinds", {}) if dataset.kinds else {}
        if card.kinds and not listed:
            old = f"kinds {', '.join(dataset.kinds)}, all of weight 1" if dataset.kinds else "events without a kind"
            refuse("kinds", card.kinds, old, "leave `kinds` out, or prepare everything anew")
        for kind in listed.keys() & card.kinds.keys():
            if card.kinds[kind] != listed[kind]:
                refuse(
                    f"kinds.{kind}", card.kinds[kind], listed[kind], "a weight cannot change; prepare everything anew"
                )
        kinds = {**listed, **card.kinds}
    return replace(card, split=split, repeat=was["repeat"], kinds=kinds)


def _check_make(dataset: Dataset) -> None:
    """Refuse a dataset from before its manifest said how ids are hidden or its events held fractions of a second."""
    missing = [f"{MANIFEST}: privacy"] if "privacy" not in dataset.manifest else []
    try:
        columns = pl.read_parquet_schema(dataset.path / "events.parquet")
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{dataset.path / 'events.parquet'}: not readable ({reason}); prepare the dataset again"
        ) from None
    missing += [f"events.parquet: {name}" for name in EVENT_COLUMNS if name not in columns]
    if missing:
        raise InputError(f"{dataset.path}: prepared by an earlier version ({', '.join(missing)} missing), which nothing can be appended to; prepare it again from all of its tables")  # fmt: skip


def check_options(lent: Borrowed, folder: Path, asked: dict[str, int | None]) -> None:
    """Refuse options of `prepare` that contradict what is borrowed from `folder`; None asks for nothing."""
    several = lent.books.levels > 1
    there = {
        "levels": lent.books.levels,
        "codebook": lent.books.size if several else asked.get("codebook"),  # one level has no codebook to speak of
        "vocab_size": lent.tokenizer.size,
        "content_width": lent.encoder.components.shape[1],
    }
    for name, wanted in asked.items():
        if wanted is not None and wanted != there[name]:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} {wanted}: {folder} has {there[name]}, and what follows it has to be the same; leave {flag} out")  # fmt: skip


def check_content(lent: Borrowed, folder: Path, card: Card) -> None:
    """Refuse a card whose content vectors would be made in another way than those borrowed from `folder`."""
    for key in ("fields", "encoder"):
        wanted, there = getattr(card.content, key), getattr(lent.content, key)
        if "content" in card.given and wanted != there:
            said = [", ".join(value) if key == "fields" else value for value in (wanted, there)]
            raise InputError(f"{card.origin}: content.{key}: {said[0]}: {folder} has {said[1]}, and what follows it has to be the same; leave `content` out")  # fmt: skip


def _split_said(split: Split) -> str:
    """A rule, with the shares where it has any."""
    return split.rule if split.rule == "leave-one-out" else f"{split.rule} (valid {split.valid}, test {split.test})"


def _yaml(value: bool) -> str:
    return "true" if value else "false"


def _events(dataset: Dataset) -> pl.DataFrame:
    events = pl.read_parquet(dataset.path / "events.parquet")
    names = pl.Series(dataset.kinds or [""], dtype=pl.String)
    known = events["item"] >= 0
    return pl.DataFrame(
        {
            "user_id": dataset.users["user_id"].gather(events["user"]),
            "item_id": dataset.items["item_id"].gather(events["item"].clip(0)).to_frame("x").select(pl.when(known).then("x")).to_series(),
            "time": events["time"],
            "fraction": events["fraction"],
            "kind": names.gather(events["kind"]).replace("", None),
            "value": events["value"],
            "text": events["text"],
            "row": pl.int_range(events.height, eager=True),
        },
        schema=EVENT_SCHEMA,
    )  # fmt: skip


def _documents(dataset: Dataset) -> list[str]:
    """The documents of a dataset, from the tokens in its records (normalised text round-trips exactly)."""
    found: dict[int, str] = {}
    for split in ("train", "valid"):
        for at in np.flatnonzero(dataset.index[f"{split}_kind"] == DOCUMENT).tolist():
            record = dataset.records(split)[at]
            found[record.row] = dataset.tokenizer.decode(record.tokens)
    return [found[row] for row in sorted(found)]


def _new_first(new: pl.DataFrame, old: pl.DataFrame, key: str) -> pl.DataFrame:
    """All of `new`, then the rows of `old` whose key is not in it."""
    rest = old.filter(~pl.col(key).is_in(new[key].implode())).select([c for c in old.columns if c in new.columns])
    return pl.concat([new, rest], how="diagonal_relaxed")


def _numbered(frame: Any) -> pl.DataFrame:
    return frame.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("row"))
