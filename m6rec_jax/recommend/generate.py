"""Lists for the users of a dataset, and for others, as one Parquet table (DESIGN section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import xxhash

from m6rec_jax.artifacts.checkpoints import manifest
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.decoding.batch import CHUNK, COLUMNS
from m6rec_jax.decoding.batch import generate as write_lists
from m6rec_jax.errors import InputError
from m6rec_jax.model.quantised import check_weights
from m6rec_jax.progress import note
from m6rec_jax.recommend.candidates import Candidates, candidate_table, candidates_of
from m6rec_jax.recommend.code import code_of_lists
from m6rec_jax.recommend.coldstart import ENGINES
from m6rec_jax.recommend.explain import explained, more_columns
from m6rec_jax.recommend.gate import Gate
from m6rec_jax.recommend.gating import with_gate
from m6rec_jax.recommend.histories import Histories, Past
from m6rec_jax.recommend.opening import dataset_of
from m6rec_jax.recommend.recommender import Recommender
from m6rec_jax.recommend.reranking import check_rules
from m6rec_jax.recommend.visitors import Everybody, Users, Visitor, Visitors, hidden, sessions_of


def generate(run: Path | str, dataset: Dataset | Path | str | None = None, users: Sequence[str] | pl.DataFrame | Users | None = None,
             limit: int | None = None, k: int = 10, out: Path | str = "recs.parquet", *,
             step: int | str = "best", engine: str = "auto", key: Path | str | None = None, filter: str | None = None,
             candidates: Sequence[str] | pl.DataFrame | None = None, per: str | None = None, cap: int | None = None,
             diversity: float = 0.0, new_items: float = 0.0, explain: bool = False, show_steps: bool = False,
             chunk: int = CHUNK, shard: int | None = None, shards: int | None = None, weights: str = "full") -> int:  # fmt: skip
    """Write the k best next items of each user, after all of the user's events, to `out`; returns how many lines.

    `users`: ids, or a table of them (see `visitors.Users`), None = every user of the dataset; who the dataset
    does not know gets a list by the session or the attributes in the table, else by popularity (`coldstart.TABLE`).
    Columns: user_id, item_id, rank (from 1), score, source, route, reason, model_version. `out` is a file, or a folder
    of parts of `chunk` users; interrupted, it goes on where it stopped, and `shards` processes share the work (see
    `decoding.batch`; None: those that jax knows of). `key`: the file that hid the ids of a dataset with `privacy: hmac`;
    with it `users` may be raw ids, and what is written holds their hashes. `filter` (see `filters`) and `candidates` (item ids,
    or a table with a column item_id and, where each user has their own, user_id) say what may be listed; `per`, `cap`,
    `diversity` and `new_items` are those of `Recommender.recommend_rows`. `explain` and `show_steps` add the columns of
    `explain.explained`. `weights`: full or int8, see `Recommender.load`. All of it belongs to the job. Raises InputError
    when nothing is known of `users` or `candidates`, and for a rule that makes no sense.
    """
    if engine not in ENGINES:
        raise InputError(f"engine={engine}: unknown; one of {', '.join(ENGINES)}")
    check_rules(per, cap, diversity, new_items)
    check_weights(weights)
    data = dataset_of(run, dataset)
    recommender = Recommender.load(run, step, data, engine=engine, weights=weights)
    known = Past(data)
    ids = data.users["user_id"].gather(known.users).to_list()
    at = {user: place for place, user in enumerate(ids)}
    wanted = Everybody(ids, limit) if users is None else Visitors(Users.of(users), at, data, key, limit)
    given = None if candidates is None else _candidates(candidates, data, at, key)
    allowed = recommender.allowed(filter)
    own = None if given is None or given.users is None else given  # each user's own candidates
    if given is not None and own is None:
        listed = given.mask(data.catalogue)
        allowed = listed if allowed is None else allowed & listed
    recommender.tell_short(allowed, k)
    if own is not None and (none := sum(not len(own.of(user)) for user in wanted.ids)):
        note(f"candidates: {none:,} of {len(wanted):,} users have none, and their lists are empty")
    kind = kind_of_sessions(data)

    extra = more_columns(explain, show_steps)

    def recommend(some: list[Visitor]) -> pl.DataFrame:
        asked = histories_of(known, some, kind)
        own_rows = None if own is None or given is None else [given.of(visitor.user_id) for visitor in some]
        lists = recommender.recommend_histories(
            asked, k, engine=engine, sessions=np.array([visitor.place < 0 for visitor in some]),
            attributes=[visitor.attributes for visitor in some], allowed=allowed,
            candidates=own_rows, per=per, cap=cap, diversity=diversity, new_items=new_items,
        )  # fmt: skip
        table = recommender.table([visitor.user_id for visitor in some], asked.items, lists)
        if extra:
            request = recommender.request(
                asked.items, asked.times, k, kinds=asked.kinds, queries=asked.queries, allowed=allowed, candidates=own_rows,
            )  # fmt: skip
            table = table.hstack(explained(recommender, request, lists, explain, show_steps))
        return table

    rules = {
        "filter": filter, "candidates": None if given is None else given.digest, "per": per, "cap": cap,
        "diversity": diversity or None, "new_items": new_items or None, "explain": explain or None, "show_steps": show_steps or None,
    }  # fmt: skip
    job = {"k": k, "engine": engine, "users": wanted.digest, "dataset": data.digest, **state_of(recommender, run)}
    job |= {name: value for name, value in rules.items() if value is not None}  # without rules, the job it always was
    of_jax = shard is None or shards is None
    return write_lists(
        recommend, wanted, out, job=job, settle=lambda kept: one_gate(recommender, run, data, kept), total=len(wanted), chunk=chunk, columns=COLUMNS | extra,
        shard=jax.process_index() if of_jax else shard, shards=jax.process_count() if of_jax else shards,
    )  # fmt: skip


def _candidates(given: Sequence[str] | pl.DataFrame, data: Dataset, at: Mapping[str, int], key: Path | str | None) -> Candidates:  # fmt: skip
    """Candidates in the rows of a dataset and under its user ids, hashed ones where it holds these."""
    table = candidate_table(given if isinstance(given, pl.DataFrame) else {"item_id": pl.Series(map(str, given), dtype=pl.String)})  # fmt: skip
    if "user_id" in table.columns and data.manifest.get("privacy", {}).get("ids") == "hmac":
        names = hidden(table["user_id"].to_list(), at, data, key)
        table = table.with_columns(user_id=pl.Series(names, dtype=pl.String))
    return candidates_of(table, data.items["item_id"])


def kind_of_sessions(data: Dataset) -> int:
    """The kind of session events, which do not say theirs: the one that weighs most."""
    return int(np.argmax(data.manifest["kind_weights"])) if data.kinds else 0


def histories_of(past: Past, some: Sequence[Visitor], kind: int) -> Histories:
    """The histories of known users and the sessions of others (user -1), whose events have one time and are all of one kind."""
    strange = np.array([visitor.place < 0 for visitor in some], bool)
    sessions = sessions_of([visitor for visitor in some if visitor.place < 0])
    known, n = past.take([visitor.place for visitor in some if visitor.place >= 0]), len(sessions)
    both = Histories(
        users=np.concatenate([known.users, np.full(n, -1, np.int64)]),
        items=known.items + sessions,
        times=known.times + [np.zeros(len(one), np.int64) for one in sessions],
        kinds=known.kinds + [np.full(len(one), kind, np.uint8) for one in sessions],
        queries=known.queries + [{} for _ in sessions],
        targets=np.concatenate([known.targets, np.full(n, -1, np.int64)]),
        target_times=np.concatenate([known.target_times, np.zeros(n, np.int64)]),
    )
    return both.take(np.argsort(np.argsort(strange, kind="stable"), kind="stable"))  # back in their order


def one_gate(recommender: Recommender, run: Path | str, data: Dataset, kept: dict[str, Any] | None) -> dict[str, Any]:
    """One gate for all parts: fitted again, elsewhere, it may have other last digits, and so may the lists."""
    if kept is None:
        with_gate(recommender, run, data)
    else:
        recommender.gate = None if kept["gate"] is None else Gate(**kept["gate"])
    return {"gate": None if recommender.gate is None else asdict(recommender.gate)}


def state_of(recommender: Recommender, run: Path | str) -> dict[str, Any]:
    """What the answers depend on: the parameters by the digests of their files, the parts there are (item-kNN needs a
    library), and the code."""
    files = manifest(run, recommender.step)["files"] if recommender.engine is not None else {}
    params = sorted((name, facts["xxh3"]) for name, facts in files.items() if name.startswith("params/"))
    parts = sorted(recommender.parts)
    return {"model": recommender.model_version, "params": _digest(params), "parts": parts, "code": code_of_lists()}


def _digest(value: Sequence[Any]) -> str:
    return xxhash.xxh3_128_hexdigest(repr(list(value)).encode())
