"""Who a batch is for: ids alone, or with what they just did and what is known of them.

Ids are held, once each; what a file says of its users (sessions, attributes) is read block by block, as often as asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xxhash

from m6rec_jax.data import values
from m6rec_jax.data.clean import PHRASE_LIMIT
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.formats import json_lines, record_columns, records_frame
from m6rec_jax.data.privacy import hide_id, key_mark
from m6rec_jax.data.text import clean_lists
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note

KINDS_OF_FILE = "a text file with one user id a line, or Parquet, CSV or JSON Lines with a column user_id"

BLOCK = 1 << 15  # rows of a table that are read at once


@dataclass(frozen=True)
class Visitor:
    """One user to serve: the id to write; `place` among the dataset's users with events, -1 = unknown; else catalogue
    rows of the session, and attributes as in users.parquet."""

    user_id: str
    place: int
    session: tuple[int, ...] = ()
    attributes: tuple[str, ...] = ()


class Users:
    """A table of users, each counted once: what its first row says. `ids` are those users, in order.

    Says how many rows name a user again. Raises InputError without a column user_id, without a row, with a row without
    an id, or when a column holds what it cannot mean.
    """

    def __init__(self, rows: pl.LazyFrame, origin: str = "users") -> None:
        self._rows, self._origin = rows, origin
        schema = self._read(rows.collect_schema)
        if "user_id" not in schema:
            raise InputError(f"{origin}: no column user_id (there are {', '.join(schema)}); name the users' column user_id, or give {KINDS_OF_FILE}")  # fmt: skip
        check_type(origin, "user_id", schema["user_id"], _is_id, "ids are texts or whole numbers")
        if "history" in schema:
            check_type(origin, "history", schema["history"], _is_history, "a history is a list of item ids, or text with spaces between them")  # fmt: skip
        ids = self._ids(self._read(lambda: rows.select("user_id").collect())["user_id"])
        if not len(ids):
            raise InputError(f"{origin}: names no user; write one user id a line, or say `all`")
        if ids.null_count():
            raise InputError(f"{origin}: no user_id in row {int(ids.is_null().arg_true()[0]) + 1}; give every row one")
        self._first = ids.is_first_distinct()
        self.ids = ids.filter(self._first)
        if again := len(ids) - len(self.ids):
            note(f"{origin}: {again:,} rows name a user again; the first of each counts")

    @classmethod
    def of(cls, users: Any) -> Users:
        """Ids, a table of users (polars, pandas or Arrow), or what `read_users` read."""
        if isinstance(users, cls):
            return users
        if isinstance(users, Sequence) and not isinstance(users, str):
            users = pl.DataFrame({"user_id": pl.Series(list(map(str, users)), dtype=pl.String)})
        return cls(values.as_polars(users).lazy())

    def blocks(self) -> Iterator[pl.DataFrame]:
        """`user_id`, `history` (item ids, oldest first) and `attributes` ("name: value") of the users, in order.

        A history is a list, or text with spaces between ids; `attributes` a list as in users.parquet; every other column
        is an attribute of that name.
        """
        for start in range(0, len(self._first), BLOCK):
            frame = self._read(lambda start=start: self._rows.slice(start, BLOCK).collect())
            frame = frame.filter(self._first.slice(start, BLOCK))
            nothing = pl.repeat(None, frame.height, dtype=pl.List(pl.String), eager=True)
            history = values.sequences(frame["history"], " ") if "history" in frame.columns else nothing
            about = [values.said(frame[name]) for name in frame.columns if name not in ("user_id", "history")]
            made = {
                "user_id": self._ids(frame["user_id"]),
                "history": history.fill_null(pl.Series([[]], dtype=pl.List(pl.String))),
                "attributes": clean_lists(values.merged(about, frame.height).alias("attributes"), PHRASE_LIMIT, {}),
            }
            yield pl.DataFrame(made)

    @staticmethod
    def _ids(series: pl.Series) -> pl.Series:
        return values.ids(series.cast(pl.String) if isinstance(series.dtype, pl.Categorical | pl.Enum) else series)

    def _read(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (pl.exceptions.PolarsError, OSError) as error:  # a file that is damaged further on, or gone
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self._origin}: not readable as parquet ({reason}); name {KINDS_OF_FILE}") from None


def check_type(origin: str, name: str, kind: pl.DataType, fits: Callable[[pl.DataType], bool], says: str) -> None:
    """Raise InputError that names the column and its type unless that is one of those which `says` names."""
    if not fits(kind):
        raise InputError(f"{origin}: column {name} is of type {kind}; {says}, so write it as these")


def _is_id(kind: pl.DataType) -> bool:
    """Floats are none: a number beyond 2^53 has lost its last digits, and nothing shows it."""
    return kind.is_integer() or isinstance(kind, pl.String | pl.Categorical | pl.Enum | pl.Null)


def _is_history(kind: pl.DataType) -> bool:
    inner = kind.inner if isinstance(kind, pl.List | pl.Array) else kind
    return _is_id(inner)


def read_users(path: Path | str) -> Users:
    """The users of a file: .parquet, .csv, .jsonl or .ndjson; anything else has one user id a line.

    Raises InputError when it is missing or unreadable, and as `Users` does.
    """
    path, origin = Path(path), f"--users {path}"
    if path.suffix.lower() == ".parquet" and path.is_file():
        return Users(pl.scan_parquet(path, glob=False), origin)
    return Users(read_table(path, "--users", "user_id", KINDS_OF_FILE, "or `all`").lazy(), origin)


def read_table(path: Path, option: str, column: str, kinds: str, otherwise: str = "") -> pl.DataFrame:
    """A table of ids from Parquet, CSV or JSON Lines; another file's lines are the `column`.

    Raises InputError that names the option when the file is missing or unreadable; `kinds` says what it may be.
    """
    if not path.is_file():
        raise InputError(f"{option} {path}: no such file; name {', '.join(filter(None, (kinds, otherwise)))}")
    try:
        return _READERS[path.suffix.lower()](path) if path.suffix.lower() in _READERS else _lines(path, column)
    except UnicodeDecodeError:
        raise InputError(f"{option} {path}: not UTF-8 text; name {kinds}") from None
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        if "utf-8" in reason.lower() or "utf8" in reason.lower():
            raise InputError(f"{option} {path}: not UTF-8 text; name {kinds}") from None
        raise InputError(f"{option} {path}: not readable as {path.suffix[1:] or 'text'} ({reason}); name {kinds}") from None  # fmt: skip


class Visitors:
    """The users of a table as the dataset knows them, `at` the places of those with events; the first `limit` of them.

    With the key of a dataset with `privacy: hmac` ids may be raw ones and become hashes. Says how many are unknown and
    what is left out; raises InputError when nothing is known of any of them, or when a raw id would be written where
    the dataset hides them. `digest` is that of all that is asked.
    """

    def __init__(self, users: Users, at: Mapping[str, int], dataset: Dataset, key: Path | str | None = None, limit: int | None = None) -> None:  # fmt: skip
        self._users, self._at, self._dataset = users, at, dataset
        names = pl.Series(hidden(users.ids.to_list(), at, dataset, key), dtype=pl.String)
        self._first = names.is_first_distinct()  # a raw id and its hash are one user
        if limit is not None:
            self._first &= self._first.cum_sum() <= limit
        self._names = names
        self.ids = names.filter(self._first)
        # Users that the dataset knows from its users table alone.
        strange = self.ids.filter(~self.ids.is_in(pl.Series(list(at), dtype=pl.String).implode()))
        about = dataset.users.filter(pl.col("user_id").is_in(strange.implode()))
        self._silent = dict(about.select("user_id", "attributes").rows())
        self.digest = self._look_through()

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Visitor]:
        for visitor, _, _ in self._all():
            yield visitor

    def _all(self) -> Iterator[tuple[Visitor, int, bool]]:
        """Each, with the number of items of the session that no catalogue has, and whether the file's words are passed over."""
        start = 0
        for block in self._users.blocks():
            first, names = self._first.slice(start, block.height), self._names.slice(start, block.height)
            start += block.height
            if not first.any():
                continue
            block = block.with_columns(user_id=names).filter(first)
            for user, history, about in zip(*(block[name].to_list() for name in block.columns), strict=True):
                if (place := self._at.get(user)) is not None:
                    yield Visitor(user, place), 0, bool(history)
                    continue
                rows = [row for row in map(self._dataset.row_of, history) if row is not None]
                yield Visitor(user, -1, tuple(rows), tuple(about or self._silent.get(user, ()))), len(history) - len(rows), False  # fmt: skip

    def _look_through(self) -> str:
        """Count and say who is there, once, before any work."""
        sessions = about = unknown = strange_items = passed_over = 0
        whole = xxhash.xxh3_128()
        for visitor, strange, passed in self._all():
            whole.update(repr(visitor).encode())
            strange_items += strange
            passed_over += passed
            if visitor.place < 0 and visitor.user_id not in self._silent:
                unknown += 1
                sessions += bool(visitor.session)
                about += bool(visitor.attributes) and not visitor.session
        data = self._dataset.path
        if unknown == len(self) and not sessions + about:
            raise InputError(f"users: none of the {len(self):,} ids is in {data}; name ids of its users.parquet, or give a table with their history or attributes")  # fmt: skip
        if unknown:
            note(f"{unknown:,} of {len(self):,} ids are not in {data}: {sessions:,} get lists by their session, {about:,} by their attributes, {unknown - sessions - about:,} by popularity")  # fmt: skip
        if strange_items:
            note(f"{strange_items:,} items of their histories are not in the catalogue of {data}; left out")
        if passed_over:
            note(f"{passed_over:,} users with a history are in {data}: its events count, theirs in the file do not")
        return whole.hexdigest()


class Everybody:
    """Every user of the dataset who has events, `ids` in their order; the first `limit` of them."""

    def __init__(self, ids: Sequence[str], limit: int | None = None) -> None:
        self.ids = ids[:limit]
        whole = xxhash.xxh3_128()
        for user in self.ids:
            whole.update(repr(user).encode())
        self.digest = whole.hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Visitor]:
        return (Visitor(user, place) for place, user in enumerate(self.ids))


def hidden(asked: Sequence[str], at: Mapping[str, int], dataset: Dataset, key: Path | str | None) -> list[str]:
    """User ids as the dataset has them: hashed where it holds hashed ids and the key is given."""
    privacy = dataset.manifest.get("privacy")
    if privacy is None:  # hashed or not, nothing in it says
        raise InputError(f"{dataset.path}: prepared by an earlier version, which did not say how user ids are hidden; prepare it again")  # fmt: skip
    known = set(dataset.users["user_id"]) | set(at)
    if key is None:
        strange = sum(user not in known for user in asked)
        if privacy["ids"] == "hmac" and strange:
            # An id that is not one of the dataset's may be a raw one, and output holds none of those.
            raise InputError(f"users: {strange:,} of {len(asked):,} ids are not in {dataset.path}, which holds hashed ids; name ids of its users.parquet, or give the key")  # fmt: skip
        return list(asked)
    if privacy["ids"] != "hmac":
        raise InputError(f"key={key}: {dataset.path} holds plain ids; leave the key out")
    secret = _secret(Path(key), privacy["key_mark"])
    return [user if user in known else hide_id(user, secret) for user in asked]


def _secret(path: Path, mark: str) -> bytes:
    if not path.is_file():
        raise InputError(f"key={path}: no such file; name the key that the dataset's card named")
    secret = path.read_bytes()
    if key_mark(secret) != mark:
        raise InputError(f"key={path}: not the key that the dataset was prepared with; name that one")
    return secret


def sessions_of(some: Sequence[Visitor]) -> list[np.ndarray]:
    """Catalogue rows of each session, int32."""
    return [np.array(visitor.session, np.int32) for visitor in some]


def _lines(path: Path, column: str) -> pl.DataFrame:
    ids = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return pl.DataFrame({column: ids}, schema={column: pl.String})


def _csv(path: Path) -> pl.DataFrame:
    return pl.read_csv(path, infer_schema=False)


def _jsonl(path: Path) -> pl.DataFrame:
    records = json_lines(path.read_text(encoding="utf-8-sig").split("\n"))
    return records_frame(records, record_columns(records))


_READERS: dict[str, Callable[[Path], pl.DataFrame]] = {
    ".parquet": pl.read_parquet, ".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl,
}  # fmt: skip
