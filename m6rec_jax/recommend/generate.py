"""Lists for the users of a dataset, as one Parquet table (DESIGN section 3)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xxhash

from m6rec_jax.artifacts.atomic import remove
from m6rec_jax.artifacts.checkpoints import manifest
from m6rec_jax.artifacts.manifest import MANIFEST
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.decoding.batch import JOB
from m6rec_jax.decoding.batch import generate as write_lists
from m6rec_jax.recommend.evaluate import dataset_of, with_gate
from m6rec_jax.recommend.histories import Histories, everything
from m6rec_jax.recommend.recommender import Recommender


def generate(run: Path | str, dataset: Dataset | Path | str | None = None, users: Sequence[str] | None = None,
             limit: int | None = None, k: int = 10, out: Path | str = "recs.parquet", *,
             step: int | str = "best", engine: str = "auto") -> int:  # fmt: skip
    """Write the k best next items of each user, after all of the user's events, to `out`; returns how many lines.

    `users`: ids, None = every user of the dataset; an id it does not know gets the list by popularity. Columns:
    user_id, item_id, rank (from 1), score, source, route, reason, model_version. Interrupted, it goes on where it
    stopped (see `decoding.batch`).
    """
    data = dataset_of(run, dataset)
    recommender = with_gate(Recommender.load(run, step, data, engine=engine), run, data)
    known = everything(data)
    ids = data.users["user_id"].gather(known.users).to_list()
    at = {user: place for place, user in enumerate(ids)}
    wanted = (ids if users is None else list(dict.fromkeys(map(str, users))))[:limit]

    def recommend(names: list[str]) -> pl.DataFrame:
        asked = _pick(known, [at.get(user, -1) for user in names])
        return recommender.table(names, asked.items, recommender.recommend_histories(asked, k, engine=engine))

    job = {"k": k, "engine": engine, "users": _digest(wanted), "dataset": data.digest, **_state(recommender, run)}
    _clear(Path(out), job)
    return write_lists(recommend, wanted, out, job=job, total=len(wanted))


def _clear(out: Path, job: dict[str, Any]) -> None:
    """Remove the parts of an earlier, finished job behind the same file; those of an unfinished one are left to say so."""
    folder = out.with_name(f"{out.name}.parts")
    if (folder / MANIFEST).is_file():
        before = json.loads((folder / JOB).read_text(encoding="utf-8"))
        if any(before.get(key) != value for key, value in json.loads(json.dumps(job)).items()):
            remove(folder)


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
