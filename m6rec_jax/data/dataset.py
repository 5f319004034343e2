"""A prepared data set, opened."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xxhash

from m6rec_jax.artifacts.manifest import read_manifest
from m6rec_jax.artifacts.schemas import DATASET
from m6rec_jax.data.arrays import read_arrays
from m6rec_jax.data.neighbours import Neighbours
from m6rec_jax.data.records import SUFFIX, RecordReader
from m6rec_jax.data.splits import SPLITS
from m6rec_jax.data.tokenizer import Tokenizer
from m6rec_jax.data.transitions import Transitions, load_transitions
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import Vocab


@dataclass(frozen=True)
class Dataset:
    """What `prepare` wrote: C items, codes [C, L] int32, content [C, Dc] float32; records and the rest on demand.

    `neighbours`: items alike by content; None in a dataset of an earlier version, which has none.
    """

    path: Path
    manifest: dict[str, Any]
    vocab: Vocab
    tokenizer: Tokenizer
    items: pl.DataFrame
    users: pl.DataFrame
    codes: np.ndarray
    content: np.ndarray
    neighbours: Neighbours | None = None

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def catalogue(self) -> int:
        """C: items in the catalogue."""
        return len(self.codes)

    @property
    def levels(self) -> int:
        """L: codes an item."""
        return self.codes.shape[1]

    @property
    def timed(self) -> bool:
        """Whether times are seconds, so that pauses are written into histories."""
        return self.manifest["timed"]

    @property
    def repeat(self) -> bool:
        """Whether an item may be recommended to who had it before."""
        return self.manifest["repeat"]

    @property
    def kinds(self) -> list[str]:
        """Names of the kinds of event, in the order of their numbers; empty where there is one kind only."""
        return self.manifest["kinds"]

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """The dataset's own tasks (name, template, language, objective, metric, options, sizes), in the order of their
        numbers; none in a dataset of a card without `tasks:`."""
        return self.manifest.get("tasks", [])

    @cached_property
    def seen(self) -> np.ndarray:
        """[C] bool: the item has a training event."""
        return self.items["seen"].to_numpy()

    @cached_property
    def item_ids(self) -> list[str]:
        """Item ids by catalogue row."""
        return self.items["item_id"].to_list()

    @cached_property
    def index(self) -> dict[str, np.ndarray]:
        """`{split}_kind`, `{split}_tokens`, `{split}_events` [records]: what a plan needs without reading records.
        `{split}_task`, where there are tasks: the number of an instance's, else -1."""
        return read_arrays(self._file("index.npz"))

    @cached_property
    def transitions(self) -> Transitions:
        return load_transitions(self._file("transitions.npz"))

    @cached_property
    def digest(self) -> str:
        """xxh3 of the digests of all files but the page for people: what a run remembers and resume compares."""
        files = {name: facts for name, facts in self.manifest["files"].items() if not name.endswith(".html")}
        return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {item: row for row, item in enumerate(self.item_ids)}

    def row_of(self, item_id: str) -> int | None:
        """Catalogue row of an item id; None when there is no such item."""
        return self._rows.get(item_id)

    def records(self, split: str) -> RecordReader:
        """Random access to the records of `train`, `valid` or `test`; `index` is in the same order."""
        if split not in SPLITS:
            raise InputError(f"split={split}: choose one of {', '.join(SPLITS)}")
        names = sorted(n for n in self.manifest["files"] if n.startswith(f"{split}-") and n.endswith(SUFFIX))
        reader = RecordReader([self._file(n) for n in names])
        wanted = self.manifest["sizes"][f"{split}_records"]
        if len(reader) != wanted:
            raise InputError(
                f"{self.path}: {len(reader)} {split} records where {wanted} were written; prepare it again"
            )
        return reader

    def _file(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise InputError(f"{path}: missing; prepare the dataset again")
        return path


def open_dataset(path: Path | str) -> Dataset:
    """Open a dataset folder. Raises InputError when it is none, or when a file of it is missing or unreadable.

    Digests are not checked here; `m6rec verify` does.
    """
    path = Path(path)
    manifest = read_manifest(path, DATASET.name, DATASET.version)
    for name in manifest["files"]:
        if not (path / name).is_file():
            raise InputError(f"{path / name}: missing; prepare the dataset again")
    try:
        items, users = pl.read_parquet(path / "items.parquet"), pl.read_parquet(path / "users.parquet")
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: its items or users are not readable ({reason}); prepare the dataset again") from None
    arrays = read_arrays(path / "codes.npz")
    return Dataset(
        path=path,
        manifest=manifest,
        vocab=Vocab.from_dict(manifest["vocab"]),
        tokenizer=Tokenizer.load(path / "tokenizer.model"),
        items=items,
        users=users,
        codes=arrays["codes"],
        content=arrays["content"],
        neighbours=Neighbours.from_arrays(arrays) if "neighbours" in arrays else None,
    )
