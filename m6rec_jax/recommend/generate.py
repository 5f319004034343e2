"""Lists for the users of a dataset, as one Parquet table (DESIGN section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xxhash

from m6rec_jax.artifacts.checkpoints import manifest
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.privacy import hide_id, key_mark
from m6rec_jax.decoding.batch import generate as write_lists
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.recommend.evaluate import with_gate
from m6rec_jax.recommend.histories import Histories, everything
from m6rec_jax.recommend.opening import dataset_of
from m6rec_jax.recommend.recommender import Recommender


def generate(run: Path | str, dataset: Dataset | Path | str | None = None, users: Sequence[str] | None = None,
             limit: int | None = None, k: int = 10, out: Path | str = "recs.parquet", *,
             step: int | str = "best", engine: str = "auto", key: Path | str | None = None) -> int:  # fmt: skip
    """Write the k best next items of each user, after all of the user's events, to `out`; returns how many lines.

    `users`: ids, None = every user of the dataset; an id it does not know gets the list by popularity. Columns:
    user_id, item_id, rank (from 1), score, source, route, reason, model_version. Interrupted, it goes on where it
    stopped (see `decoding.batch`). `key`: the file that hid the ids of a dataset with `privacy: hmac`; with it `users`
    may be raw ids, and what is written holds their hashes. Raises InputError when the dataset knows none of `users`.
    """
    data = dataset_of(run, dataset)
    recommender = with_gate(Recommender.load(run, step, data, engine=engine), run, data)
    known = everything(data)
    ids = data.users["user_id"].gather(known.users).to_list()
    at = {user: place for place, user in enumerate(ids)}
    wanted = (ids if users is None else _named(users, at, data, key))[:limit]

    def recommend(names: list[str]) -> pl.DataFrame:
        asked = _pick(known, [at.get(user, -1) for user in names])
        return recommender.table(names, asked.items, recommender.recommend_histories(asked, k, engine=engine))

    job = {"k": k, "engine": engine, "users": _digest(wanted), "dataset": data.digest, **_state(recommender, run)}
    return write_lists(recommend, wanted, out, job=job, total=len(wanted))


def _named(users: Sequence[str], at: Mapping[str, int], dataset: Dataset, key: Path | str | None) -> list[str]:
    """The ids to write for the users asked for, each once: as the dataset has them, hashed where it holds hashed ids.

    Says how many the dataset does not know; InputError when it knows none of them.
    """
    asked = list(dict.fromkeys(map(str, users)))
    privacy = dataset.manifest["privacy"]
    hashed = privacy["ids"] == "hmac"
    if key is not None:
        if not hashed:
            raise InputError(f"key={key}: {dataset.path} holds plain ids; leave the key out")
        secret = _secret(Path(key), privacy["key_mark"])
        asked = list(dict.fromkeys(user if user in at else hide_id(user, secret) for user in asked))
    unknown = sum(user not in at for user in asked)
    if asked and unknown == len(asked):
        way_out = "name ids of its users.parquet"
        if hashed:
            way_out += ", which are hashed" + (", or give the key" if key is None else "")
        raise InputError(f"users: none of the {unknown:,} ids is in {dataset.path}; {way_out}")
    if unknown and hashed and key is None:
        # An id that is not one of the dataset's may be a raw one, and output holds none of those.
        raise InputError(f"users: {unknown:,} of {len(asked):,} ids are not in {dataset.path}, which holds hashed ids; name ids of its users.parquet")  # fmt: skip
    if unknown:
        note(f"{unknown:,} of {len(asked):,} ids are not in {dataset.path}; they get the list by popularity")
    return asked


def _secret(path: Path, mark: str) -> bytes:
    if not path.is_file():
        raise InputError(f"key={path}: no such file; name the key that the dataset's card named")
    secret = path.read_bytes()
    if key_mark(secret) != mark:
        raise InputError(f"key={path}: not the key that the dataset was prepared with; name that one")
    return secret


def _pick(known: Histories, places: Sequence[int]) -> Histories:
    """Histories at these places; an empty one where a place is -1."""
    taken = known.take(np.maximum(places, 0))
    for i in np.flatnonzero(np.asarray(places) < 0):
        taken.items[i], taken.times[i], taken.kinds[i], taken.queries[i] = (
            np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.uint8), {},
        )  # fmt: skip
    return taken


def _state(recommender: Recommender, run: Path | str) -> dict[str, Any]:
    """What the answers depend on: the parameters by the digests of their files, and the gate."""
    files = manifest(run, recommender.step)["files"] if recommender.engine is not None else {}
    params = sorted((name, facts["xxh3"]) for name, facts in files.items() if name.startswith("params/"))
    gate = None if recommender.gate is None else asdict(recommender.gate)
    return {"model": recommender.model_version, "params": _digest(params), "gate": gate}


def _digest(value: Sequence[Any]) -> str:
    return xxhash.xxh3_128_hexdigest(repr(list(value)).encode())
