"""Who a batch is for: ids alone, or with what they just did and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from m6rec_jax.data import values
from m6rec_jax.data.clean import PHRASE_LIMIT
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.formats import json_lines, record_columns, records_frame
from m6rec_jax.data.privacy import hide_id, key_mark
from m6rec_jax.data.text import clean_lists
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note

KINDS_OF_FILE = "a text file with one user id a line, or Parquet, CSV or JSON Lines with a column user_id"


@dataclass(frozen=True)
class Visitor:
    """One user to serve: the id to write; `place` among the dataset's users with events, -1 = unknown; else catalogue
    rows of the session, and attributes as in users.parquet."""

    user_id: str
    place: int
    session: tuple[int, ...] = ()
    attributes: tuple[str, ...] = ()


def read_users(path: Path | str) -> pl.DataFrame:
    """A file of users as `visitor_table`: .parquet, .csv, .jsonl or .ndjson; anything else has one user id a line.

    Raises InputError when it is missing, unreadable or empty, or names no user in some row.
    """
    return visitor_table(read_table(Path(path), "--users", "user_id", KINDS_OF_FILE, "or `all`"), f"--users {path}")


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


def visitor_table(frame: Any, origin: str = "users") -> pl.DataFrame:
    """`user_id`, `history` (item ids, oldest first) and `attributes` ("name: value") of a table of users, each user once.

    A history is a list, or text with spaces between ids; `attributes` a list as in users.parquet; every other column is
    an attribute of that name. Raises InputError without a column user_id, without a row, or with a row without an id.
    """
    frame = values.as_polars(frame)
    if "user_id" not in frame.columns:
        raise InputError(f"{origin}: no column user_id (there are {', '.join(frame.columns)}); name the users' column user_id, or give {KINDS_OF_FILE}")  # fmt: skip
    if not frame.height:
        raise InputError(f"{origin}: names no user; write one user id a line, or say `all`")
    ids = values.ids(frame["user_id"])
    if ids.null_count():
        raise InputError(f"{origin}: no user_id in row {int(ids.is_null().arg_true()[0]) + 1}; give every row one")
    nothing = pl.repeat(None, frame.height, dtype=pl.List(pl.String), eager=True)
    history = values.sequences(frame["history"], " ") if "history" in frame.columns else nothing
    about = [values.said(frame[name]) for name in frame.columns if name not in ("user_id", "history")]
    made = {
        "user_id": ids,
        "history": history.fill_null(pl.Series([[]], dtype=pl.List(pl.String))),
        "attributes": clean_lists(values.merged(about, frame.height).alias("attributes"), PHRASE_LIMIT, {}),
    }
    return pl.DataFrame(made).unique("user_id", keep="first", maintain_order=True)


def visitors(
    table: pl.DataFrame, at: Mapping[str, int], dataset: Dataset, key: Path | str | None = None
) -> list[Visitor]:
    """The users of a `visitor_table` as the dataset knows them, `at` the places of those with events.

    With the key of a dataset with `privacy: hmac` ids may be raw ones and become hashes. Says how many are unknown and
    what is left out; raises InputError when nothing is known of any of them, or when a raw id would be written where
    the dataset hides them.
    """
    asked, names = hidden(table["user_id"].to_list(), at, dataset, key), dataset.users["user_id"]
    # Users that the dataset knows from its users table alone.
    silent = dict(dataset.users.filter(names.is_in([v for v in asked if v not in at])).select("user_id", "attributes").rows())  # fmt: skip
    made: dict[str, Visitor] = {}
    strange_items, passed_over = 0, 0
    for user, history, about in zip(asked, table["history"].to_list(), table["attributes"].to_list(), strict=True):
        if user in made:
            continue
        if user in at:
            passed_over += bool(history)
            made[user] = Visitor(user, at[user])
            continue
        rows = [row for row in map(dataset.row_of, history) if row is not None]
        strange_items += len(history) - len(rows)
        made[user] = Visitor(user, -1, tuple(rows), tuple(about or silent.get(user, ())))
    unknown = [v for v in made.values() if v.place < 0 and v.user_id not in silent]
    if made and len(unknown) == len(made) and not any(v.session or v.attributes for v in unknown):
        raise InputError(f"users: none of the {len(made):,} ids is in {dataset.path}; name ids of its users.parquet, or give a table with their history or attributes")  # fmt: skip
    if unknown:
        sessions = sum(bool(v.session) for v in unknown)
        about = sum(bool(v.attributes) and not v.session for v in unknown)
        note(f"{len(unknown):,} of {len(made):,} ids are not in {dataset.path}: {sessions:,} get lists by their session, {about:,} by their attributes, {len(unknown) - sessions - about:,} by popularity")  # fmt: skip
    if strange_items:
        note(f"{strange_items:,} items of their histories are not in the catalogue of {dataset.path}; left out")
    if passed_over:
        note(f"{passed_over:,} users with a history are in {dataset.path}: its events count, theirs in the file do not")
    return list(made.values())


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
