"""Texts for the users of a dataset, and about its items, as one Parquet table: a batch job in parts like that of lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import xxhash

from m6rec_jax.data.dataset import Dataset
from m6rec_jax.decoding.batch import generate as write_parts
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.generate import histories_of, kind_of_sessions, one_gate, state_of
from m6rec_jax.recommend.histories import Past
from m6rec_jax.recommend.opening import dataset_of
from m6rec_jax.recommend.recommender import Recommender
from m6rec_jax.recommend.say.asking import Setting
from m6rec_jax.recommend.visitors import Everybody, Users, Visitor, Visitors

CHUNK = 256  # users, or items, of a part: a text takes longer than a list


def say_all(run: Path | str, task: str, dataset: Dataset | Path | str | None = None, users: Sequence[str] | pl.DataFrame | Users | None = None,
            everybody: bool = True, limit: int | None = None, out: Path | str = "texts.parquet", *, items: Sequence[str] | None = None,
            language: str = "", setting: Setting | None = None, step: int | str = "best", engine: str = "auto",
            key: Path | str | None = None, chunk: int = CHUNK, shard: int | None = None, shards: int | None = None,
            weights: str = "full") -> int:  # fmt: skip
    """Write a text of the task for each user to `out`, and return how many lines. Columns: `speaker.COLUMNS` and what the
    task adds.

    `users` as `generate.generate` takes them (None: with `everybody` all, else nobody: a text an item). `items`: ids of what
    the texts are about. All of it belongs to the job, which goes on where it stopped. Raises InputError for an unknown task,
    language or item, and when the task needs what is not there.
    """
    setting = setting or Setting()
    data = dataset_of(run, dataset)
    recommender = Recommender.load(run, step, data, engine=engine, weights=weights)
    speaker = recommender.speaker
    nobody = users is None and not everybody
    asked_for = speaker.task(task, language, setting, users=not nobody, items=items is not None)
    rows = None if items is None else _rows(items, data)
    past = Past(data)
    ids = data.users["user_id"].gather(past.users).to_list()
    at = {user: place for place, user in enumerate(ids)}
    kind = kind_of_sessions(data)
    known = dict(zip(data.users["user_id"].to_list(), data.users["attributes"].to_list(), strict=True)) if "attributes" in data.users.columns else {}  # fmt: skip

    def of_users(some: list[Visitor]) -> pl.DataFrame:
        return speaker.speak(
            asked_for, histories_of(past, some, kind), [one.user_id for one in some], setting, items=rows,
            attributes=[one.attributes or known.get(one.user_id) or () for one in some],
            sessions=np.array([one.place < 0 for one in some]),
        )  # fmt: skip

    def of_items(some: list[int]) -> pl.DataFrame:
        return speaker.speak(asked_for, past.take([]), [], setting, items=some)

    job: dict[str, Any] = {
        "task": task, "language": asked_for.template.language, **asdict(setting), "engine": engine,
        "items": None if items is None else xxhash.xxh3_128_hexdigest("\n".join(map(str, items)).encode()),
        "dataset": data.digest, **state_of(recommender, run),
    }  # fmt: skip
    of_jax = shard is None or shards is None
    common: dict[str, Any] = {
        "settle": lambda kept: one_gate(recommender, run, data, kept), "chunk": chunk,
        "columns": speaker.columns(asked_for, setting),
        "shard": jax.process_index() if of_jax else shard, "shards": jax.process_count() if of_jax else shards,
    }  # fmt: skip
    if nobody:
        some = rows[:limit] if rows is not None else []
        return write_parts(of_items, some, out, job={"users": None, "limit": limit, **job}, total=len(some), unit="items", **common)  # fmt: skip
    wanted = Everybody(ids, limit) if users is None else Visitors(Users.of(users), at, data, key, limit)
    return write_parts(of_users, wanted, out, job={"users": wanted.digest, **job}, total=len(wanted), **common)


def _rows(items: Sequence[str], data: Dataset) -> list[int]:
    """Catalogue rows of item ids. Raises InputError that names the first which is in no catalogue."""
    if not items:
        raise InputError("items: none named; give at least one item id")
    rows = [data.row_of(str(item)) for item in items]
    for item, row in zip(items, rows, strict=True):
        if row is None:
            raise InputError(f"items: {item}: not in the catalogue of {data.path}; item ids are those of items.parquet")
    return [row for row in rows if row is not None]
