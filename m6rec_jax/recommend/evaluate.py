"""Evaluation of a run: full ranking of held-out events, beside the baselines on the same users (EVALUATION.md)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
from flax import nnx

from m6rec_jax.artifacts.atomic import atomic_path, write_json
from m6rec_jax.artifacts.run import code_version, read_run
from m6rec_jax.artifacts.schemas import EVALUATION
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.decoding.instances import InstanceScorer
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.quantised import check_weights
from m6rec_jax.progress import stage
from m6rec_jax.recommend import metrics
from m6rec_jax.recommend.baselines import CountingFloor, ItemKNN, Popularity, Ranker, listed_of
from m6rec_jax.recommend.coldstart import SOURCES
from m6rec_jax.recommend.curves import calibration, coverage_curves, popularity_tiers
from m6rec_jax.recommend.facts import facts_of, target_values
from m6rec_jax.recommend.gating import with_gate
from m6rec_jax.recommend.histories import Histories, held_out, interactions
from m6rec_jax.recommend.lists import Lists
from m6rec_jax.recommend.opening import dataset_of, domain_of
from m6rec_jax.recommend.recommender import Recommender
from m6rec_jax.recommend.tasks import asked_tasks, measure_tasks
from m6rec_jax.recommend.weights import cost_of
from m6rec_jax.recommend.wording import CONVENTIONS, protocol, ties, verdict

K = 10
KS = (1, 5, 10)
LOOKS_FILE = "looks.jsonl"


def evaluate(
    run: Path | str,
    split: str = "test",
    out: Path | str | None = None,
    dataset: Dataset | Path | str | None = None,
    *,
    step: int | str = "best",
    bootstrap_seed: int = 0,
    batch: int = 512,
    weights: str = "full",
    tasks: str = "all",
) -> dict[str, Any]:
    """Measure a run on the users of `split` and return the report; with `out` write it there as JSON.

    `tasks`: which of the dataset's own are measured as well (`recommend/tasks`): `all` that the run has learnt, `none`, or
    names with commas between; the report then has a part `tasks`.

    Per-user vectors go to `<out stem>.users.parquet` beside it. `bootstrap_seed` is that of intervals and
    randomisation; the report's `seed` is the run's. Each look at test targets is noted in `run/looks.jsonl`. With
    `weights` int8 the same users are asked of them as well, under the same gate, and the report has a part `weights`
    (`weights.cost_of`); all else in it is of full weights. Raises InputError when the split is unknown or holds no user.
    """
    if split not in ("test", "valid"):
        raise InputError(f"split={split}: choose test or valid")
    check_weights(weights)
    data = dataset_of(run, dataset)
    recommender = with_gate(Recommender.load(run, step, data, batch=batch), run, data)
    if weights != "full" and recommender.engine is None:
        raise InputError(f"weights={weights}: {run} has no parameters yet; train it first")
    asked = held_out(data, split)
    if not len(asked):
        raise InputError(
            f"{data.path}: no user has an event in the {split} split; choose another split rule in its card"
        )
    looks = looked(run, split, recommender.step, data)
    count = interactions(data)
    facts, recent = facts_of(data, count)
    popularity = Popularity.of(data.items)

    lists, seconds = _ranked(recommender, asked, "recommend")
    alone, seconds_alone = _ranked(recommender, asked, "model alone", memory=False)
    ranked = {"model": lists.rows, "model_alone": alone.rows}
    kept: Recommender | None = None
    others: dict[str, np.ndarray] = {}  # lists by weights that are not kept in full
    if weights != "full":
        kept = Recommender.load(run, recommender.step, data, batch=batch, weights=weights)
        kept.gate = recommender.gate
        others["model"] = _ranked(kept, asked, weights)[0].rows
        others["model_alone"] = _ranked(kept, asked, f"{weights}, model alone", memory=False)[0].rows
    rankers: dict[str, Callable[[], Ranker]] = {
        "popularity": lambda: popularity,
        "item_knn": lambda: ItemKNN(count, popularity),
        "counting_floor": lambda: CountingFloor.of(data.transitions, popularity),
    }
    with stage("baselines", len(rankers)) as bar:
        for name, make in rankers.items():
            ranked[name] = make().rank([h[h >= 0] for h in asked.items], K, data.repeat)
            bar.advance(1)

    known, values = asked.known, target_values(data, asked, split)
    vectors = {
        name: metrics.per_user(rows, asked.targets, KS) | metrics.beyond_per_user(rows, facts, K, asked.targets)
        for name, rows in ranked.items()
    }
    scores = {
        name: _means(vectors[name]) | metrics.beyond(rows, facts, K) | {"valid_id_rate": metrics.valid_id_rate(rows, known, data.catalogue, repeat=data.repeat, allowed=popularity.listed)}
        for name, rows in ranked.items()
    }  # fmt: skip
    lift = f"popularity_lift@{K}"
    more = {  # what is no fraction
        name: {lift: metrics.popularity_lift(rows[:, :K], known, facts)} | metrics.satisfaction(rows, asked.targets, values, K)
        for name, rows in ranked.items()
    }  # fmt: skip
    other_vectors = {name: metrics.per_user(rows, asked.targets, KS) for name, rows in others.items()}
    groups = metrics.user_groups(np.array([len(h) for h in known]), asked.targets, facts)
    carried = lists.sources != SOURCES.index("popularity")  # these scores are probabilities
    intervals = {name: metrics.bootstrap_ci(v, seed=bootstrap_seed) for name, v in vectors.items()}
    comparison = {
        other: metrics.paired(vectors["model"], vectors[other], seed=bootstrap_seed)
        for other in ("counting_floor", "model_alone")
    }
    report = {
        "schema": EVALUATION.name,
        "version": EVALUATION.version,
        "protocol": protocol(data, split, len(asked)),
        "ties": ties(data, asked),
        "split": split,
        "users": len(asked),
        "catalogue": data.catalogue,
        "seed": read_run(run).config.train.seed,
        "bootstrap_seed": bootstrap_seed,
        "looks": looks,
        "run": str(run),
        "step": recommender.step,
        "code": code_version(),
        "dataset": {"name": data.name, "digest": data.digest, "split": data.manifest["split"]},
        "metrics": scores["model"],
        "ci95": intervals["model"],
        "model_alone": scores["model_alone"],
        "baselines": {name: scores[name] for name in rankers},
        "beyond": more,
        "recent": recent,
        "groups": by_group(vectors, groups, bootstrap_seed),
        "curves": {"coverage": coverage_curves(ranked, facts), "popularity": popularity_tiers(ranked, known, facts)},
        "calibration": calibration(lists.rows, lists.scores, carried, asked.targets, seed=bootstrap_seed),
        "intervals": {name: intervals[name] for name in ("model_alone", *rankers)},
        "comparison": comparison,
        **verdict(scores, comparison["counting_floor"]),
        "gate": None if recommender.gate is None else asdict(recommender.gate),
        "sources": _shares(SOURCES, lists.sources[lists.rows >= 0]),
        "routes": {route: int(n) for route, n in zip(*np.unique(lists.routes, return_counts=True), strict=True)},
        "exact": float(lists.exact.mean()),
        "timing": {
            "recommend_seconds": round(seconds, 3),
            "model_alone_seconds": round(seconds_alone, 3),
            "users_per_second": round(len(asked) / max(seconds, 1e-9), 1),
        },
        "conventions": CONVENTIONS,
    }
    if data.tasks and recommender.engine is not None:
        record = read_run(run)
        scorer = InstanceScorer.load(run, recommender.step, domain_of(record, data), jax.local_devices())
        report["tasks"] = measure_tasks(scorer, data, split, asked_tasks(scorer, data, tasks), seed=bootstrap_seed)
    if kept is not None:
        report["weights"] = cost_of(recommender, kept, ranked, others, vectors, other_vectors, seed=bootstrap_seed)
    if out is not None:
        ranked |= {f"{name}_{weights}": rows for name, rows in others.items()}
        vectors |= {f"{name}_{weights}": found for name, found in other_vectors.items()}
        write_users(Path(out).with_name(f"{Path(out).stem}.users.parquet"), data, asked, ranked, vectors)
        write_json(out, report)
    return report


def looked(run: Path | str, split: str, step: int, dataset: Dataset) -> int:
    """How often the test targets of this run (of this domain, among several) have been looked at, this time included;
    each look adds a line to `run/looks.jsonl`. A look at validation targets only counts."""
    file, record = Path(run) / LOOKS_FILE, read_run(run)
    of = {"domain": record.names[domain_of(record, dataset)]} if len(record.names) > 1 else {}
    if split == "test":
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"time": now, "code": code_version(), "split": split, "step": step, "dataset": dataset.digest} | of
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
    told = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return sum(json.loads(line).get("domain") == of.get("domain") for line in told) if of else len(told)


class ValidationEvaluator:
    """What training asks at each validation: `evaluator(params) -> {"ndcg@10", "recall@10"}` of the model alone, nothing
    where there is no validation user (`names` says which).

    Ranks the whole catalogue for the validation users, or for a fixed sample of `users` of them drawn by `seed`.
    `params` is the nested dict of host arrays that checkpoints hold; programs are compiled once.
    """

    def __init__(self, blueprint: Blueprint, dataset: Dataset, *, length: int = 256, users: int | None = None, seed: int = 0) -> None:  # fmt: skip
        self.blueprint, self.dataset, self.length = blueprint, dataset, length
        self.asked = held_out(dataset, "valid")
        if users is not None and users < len(self.asked):
            self.asked = self.asked.take(np.sort(np.random.default_rng(seed).choice(len(self.asked), users, replace=False)))  # fmt: skip
        self.engine: Engine | None = None
        self.names = (f"ndcg@{K}", f"recall@{K}") if len(self.asked) else ()

    def __call__(self, params: Any) -> dict[str, float]:
        model = self.blueprint.domain(0).bind(self.blueprint.domain_params(params, 0))
        if self.engine is None:
            data = self.dataset
            self.engine = Engine(model, data.codes, data.content, data.seen, timed=data.timed, n_kinds=len(data.kinds), length=self.length)  # fmt: skip
        self.engine.params = nnx.state(model)
        asked = self.asked
        lists = self.engine.recommend(
            asked.items, times=asked.times, kinds=asked.kinds, queries=asked.queries, k=K,
            exclude=None if self.dataset.repeat else asked.known, allowed=listed_of(self.dataset.items),
        )  # fmt: skip
        found = metrics.per_user(lists.rows, asked.targets, (K,))
        return {name: float(found[name].mean()) for name in self.names}


def by_group(vectors: Mapping[str, Mapping[str, np.ndarray]], groups: Sequence[metrics.Group], seed: int) -> dict[str, Any]:  # fmt: skip
    """Means of every measure among the users of each group, for each system, with 95 % intervals of the served lists."""
    made = {}
    for group in groups:
        there = {name: {m: v[group.users] for m, v in measured.items()} for name, measured in vectors.items()}
        scores = {name: _means(measured) for name, measured in there.items()} if group.users.any() else {}
        ci95 = metrics.bootstrap_ci(there["model"], seed=seed) if group.users.any() else {}
        made[group.name] = {"says": group.says, "users": int(group.users.sum()), "metrics": scores, "ci95": ci95}
    return made


def write_users(path: Path, dataset: Dataset, asked: Histories, ranked: Mapping[str, np.ndarray],
                vectors: Mapping[str, Mapping[str, np.ndarray]]) -> None:  # fmt: skip
    """Per-user vectors as Parquet: user_id, target, history length, and for each system rank and measures."""
    columns: dict[str, Any] = {
        "user_id": dataset.users["user_id"].gather(asked.users),
        "target": dataset.items["item_id"].gather(asked.targets),
        "history": np.array([int((h >= 0).sum()) for h in asked.items], np.int32),
    }
    for name, rows in ranked.items():
        columns[f"{name}/rank"] = metrics.ranks(rows, asked.targets).astype(np.int32)
        columns |= {f"{name}/{measure}": vector for measure, vector in vectors[name].items()}
    with atomic_path(path) as partial:
        pl.DataFrame(columns).write_parquet(partial)


def _means(vectors: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(v.mean(dtype=np.float64)) for name, v in vectors.items()}


def _shares(names: Sequence[str], codes: np.ndarray) -> dict[str, float]:
    counts = np.bincount(codes, minlength=len(names))
    return {name: float(n / max(counts.sum(), 1)) for name, n in zip(names, counts, strict=True) if n}


def _ranked(recommender: Recommender, asked: Histories, name: str, **options: Any) -> tuple[Lists, float]:
    """Lists for all histories and the seconds they took, compilation included."""
    start = time.perf_counter()
    with stage(name, len(asked), "users") as bar:
        lists = recommender.recommend_histories(asked, K, advance=bar.advance, **options)
    return lists, time.perf_counter() - start
