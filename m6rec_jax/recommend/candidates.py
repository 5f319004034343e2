"""A given list of items to rank: the same for everybody, or for each user their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xxhash

from m6rec_jax.data import values
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.recommend.visitors import check_type, read_table

KINDS_OF_FILE = "a text file with one item id a line, or Parquet, CSV or JSON Lines with a column item_id and, where each user has their own, user_id"  # fmt: skip


@dataclass(frozen=True)
class Candidates:
    """Catalogue rows, each once: of everybody, or of user i of `users` those from `starts[i]` to `starts[i + 1]`."""

    rows: np.ndarray
    users: Mapping[str, int] | None = None
    starts: np.ndarray | None = None

    def mask(self, catalogue: int) -> np.ndarray:
        """The items of everybody as a filter, bool `[catalogue]`."""
        made = np.zeros(catalogue, bool)
        made[self.rows] = True
        return made

    def of(self, user_id: str) -> np.ndarray:
        """The rows of one user, empty for one without."""
        if self.users is None or self.starts is None or user_id not in self.users:
            return self.rows[:0]
        at = self.users[user_id]
        return self.rows[self.starts[at] : self.starts[at + 1]]

    @property
    def digest(self) -> str:
        """Of what they say: the identity of a job."""
        whole = xxhash.xxh3_128(self.rows.tobytes())
        whole.update(b"" if self.starts is None else self.starts.tobytes())
        whole.update(repr(None if self.users is None else list(self.users)).encode())
        return whole.hexdigest()


def read_candidates(path: Path | str) -> pl.DataFrame:
    """A file of candidates as `candidate_table`: .parquet, .csv, .jsonl or .ndjson; else one item id a line.

    Raises InputError when it is missing, unreadable or empty, or an id is missing in some row.
    """
    frame = read_table(Path(path), "--candidates", "item_id", KINDS_OF_FILE)
    return candidate_table(frame, f"--candidates {path}")


def candidate_table(frame: Any, origin: str = "candidates") -> pl.DataFrame:
    """`item_id`, and `user_id` where there is such a column, as ids: 1, 1.0 and "1" are the same one."""
    frame = values.as_polars(frame)
    if "item_id" not in frame.columns:
        raise InputError(f"{origin}: no column item_id (there are {', '.join(frame.columns)}); give {KINDS_OF_FILE}")
    if not frame.height:
        raise InputError(f"{origin}: names no item; write one item id a line")
    names = [name for name in ("user_id", "item_id") if name in frame.columns]
    for name in names:
        check_type(origin, name, frame.schema[name], _is_id, "ids are texts or numbers, one a row")
    made = pl.DataFrame({name: values.ids(frame[name].cast(pl.String) if isinstance(frame.schema[name], pl.Categorical | pl.Enum) else frame[name]) for name in names})  # fmt: skip
    for name in names:
        if made[name].null_count():
            raise InputError(f"{origin}: no {name} in row {int(made[name].is_null().arg_true()[0]) + 1}; give every row one")  # fmt: skip
    return made


def _is_id(kind: pl.DataType) -> bool:
    return kind.is_numeric() or isinstance(kind, pl.String | pl.Categorical | pl.Enum | pl.Null)


def candidates_of(table: pl.DataFrame, item_ids: pl.Series) -> Candidates:
    """The candidates of a `candidate_table` in a catalogue; says how many are not in it.

    Raises InputError when none is.
    """
    catalogue = pl.DataFrame({"item_id": item_ids, "row": np.arange(len(item_ids), dtype=np.int32)})
    found = table.join(catalogue, on="item_id", how="left", maintain_order="left")
    strange = found.filter(pl.col("row").is_null())["item_id"].n_unique()
    found = found.drop_nulls("row")
    if not found.height:
        raise InputError(f"candidates: none of the {strange:,} item ids is in the catalogue; name ids of its items.parquet")  # fmt: skip
    if strange:
        note(f"candidates: {strange:,} item ids are not in the catalogue; left out")
    if "user_id" not in found.columns:
        return Candidates(found["row"].unique(maintain_order=True).to_numpy())
    found = found.select("user_id", "row").unique().sort("user_id", "row")
    runs = found["user_id"].rle().struct.unnest()
    at = {user: place for place, user in enumerate(runs["value"].to_list())}
    return Candidates(found["row"].to_numpy(), at, np.cumsum([0, *runs["len"].to_list()]))
