"""How well a model does a dataset's own tasks: the measures of each on held-out instances (docs/scoring.md)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.instances.pairs import Catalogue, catalogue_of
from m6rec_jax.data.instances.read import FOLDER, Instances, read_instances
from m6rec_jax.decoding.instances import InstanceScorer
from m6rec_jax.decoding.nearest import nearest
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.progress import note
from m6rec_jax.recommend import metrics

KS = (1, 10, 100)  # of retrieval
VALIDATED = 2000  # instances of a task that a validation looks at, the same each time


def measure(scorer: InstanceScorer, instances: Instances, catalogue: Catalogue | None = None, *, repeat: bool = True,
            seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """The measures of one task: `{objective, instances, metrics, ci95, notes}`, 95 % intervals by Poisson bootstrap.

    scoring: AUC, log-loss, ECE and, where there are users, GAUC of the last option; classify: accuracy, macro F1, log-loss;
    plausibility: AUC and GAUC of the mean log-likelihood; retrieval, of `catalogue`: recall and MRR, without what the user
    has in training unless `repeat`, and the same over items that training never asks for (`unseen`); text: mean
    log-likelihood a token. What cannot be told is left out, and a note says why.
    """
    kind, notes = instances.objective, list[str]()
    if kind in ("scoring", "classify", "plausibility"):
        known = np.flatnonzero(instances.labels >= 0)
        if len(known) < len(instances):
            notes.append(
                f"{len(instances) - len(known):,} of {len(instances):,} instances have no label and are left out"
            )
            instances = instances.take(known)
    made: dict[str, Any] = {"metrics": {}, "ci95": {}}
    if not len(instances):
        notes.append("no instance to measure")
    elif kind == "retrieval":
        if catalogue is None:
            raise ValueError("a retrieval is measured on a catalogue")
        made = _retrieved(scorer, instances, catalogue, repeat, seed)
    elif kind == "text":
        mean, many = scorer.likelihood(instances.laid_out(scorer.length))
        made = _mean_log_likelihood(mean, many, seed)
    elif kind == "classify" or len(instances.about["options"]) > 2:
        made = metrics.classes(instances.labels, scorer.chances(instances), seed=seed)
    else:
        made = _scored(scorer, instances, notes, seed)
    return {"objective": kind, "instances": len(instances), **made, "notes": notes}


def _scored(scorer: InstanceScorer, instances: Instances, notes: list[str], seed: int) -> dict[str, Any]:
    """Two sides, told apart by a chance or by a likelihood."""
    positive, of_chance = instances.labels > 0, instances.objective == "scoring"
    laid = instances.laid_out(scorer.length)
    scores = scorer.option_chances(instances.about["name"], laid)[:, -1] if of_chance else scorer.likelihood(laid)[0]
    if positive.all() or not positive.any():
        names = instances.about["options"] or ["implausible", "plausible"]
        notes.append(
            f"all {len(positive):,} instances are of one class ({names[int(positive[0])]}), so no AUC is defined"
        )
    users = instances.fields["user_id"]
    owner = users.fill_null("").to_numpy() if users.null_count() < len(users) else None
    made = metrics.scoring(positive, scores, owner, seed=seed)
    kept = None if of_chance else ("auc", "gauc")  # a likelihood is no chance of a label
    return {part: {n: v for n, v in found.items() if kept is None or n in kept} for part, found in made.items()}


def _retrieved(scorer: InstanceScorer, instances: Instances, catalogue: Catalogue, repeat: bool, seed: int) -> dict[str, Any]:  # fmt: skip
    pairs = catalogue.pairs
    rows = np.array([record.row for record in instances.records], np.int64)
    targets = pairs.items[rows]
    own = [np.array([i for i in pairs.own.get(user, ()) if i != t], np.int64) for user, t in zip(pairs.users[rows].tolist(), targets.tolist(), strict=True)]  # fmt: skip
    items = scorer.item_vectors(catalogue.laid_out(scorer.length))
    queries = scorer.queries(instances.laid_out(scorer.length))
    found, _ = nearest(queries, items, max(KS), None if repeat else own)
    place = np.where((found == targets[:, None]).any(1), (found == targets[:, None]).argmax(1) + 1, 0)
    vectors = {f"recall@{k}": ((place > 0) & (place <= k)).astype(np.float32) for k in KS}
    vectors[f"mrr@{max(KS)}"] = np.where(place > 0, 1 / np.maximum(place, 1), 0).astype(np.float32)
    new = pairs.times[targets] == 0
    mean = lambda some: {name: float(v[some].mean(dtype=np.float64)) for name, v in vectors.items()}  # noqa: E731
    of_new = {"unseen": {"instances": int(new.sum()), "metrics": mean(new)}} if new.any() else {}
    whole = np.ones(len(rows), bool)
    return {"metrics": mean(whole), "ci95": metrics.bootstrap_ci(vectors, seed=seed), "catalogue": len(items), **of_new}


def _mean_log_likelihood(mean: np.ndarray, many: np.ndarray, seed: int) -> dict[str, Any]:
    sums = np.stack([mean.astype(np.float64) * many, many.astype(np.float64)], 1)
    rng = np.random.default_rng(seed)
    drawn = [w @ sums for _ in range(500) if (w := rng.poisson(1.0, len(sums))).sum()]
    low, high = np.quantile([a / b for a, b in drawn], (0.025, 0.975))
    total = sums.sum(0)
    return {"metrics": {"log_likelihood": total[0] / total[1]}, "ci95": {"log_likelihood": (float(low), float(high))}}


def unseen_options(dataset: Dataset, task: str, options: Sequence[str]) -> list[str]:
    """Options that no training instance has: nothing can be known of them."""
    table = pl.scan_parquet(dataset.path / FOLDER / f"{task}.parquet", glob=False)
    found = table.filter(pl.col("split") == "train").select("label").unique().collect()["label"].to_list()
    return [option for i, option in enumerate(options) if i not in found]


def measure_tasks(scorer: InstanceScorer, dataset: Dataset, split: str, tasks: Collection[str], *, seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """`measure` of some tasks of a dataset, by name.

    Raises InputError for a task that the dataset has not, or that the run has not learnt.
    """
    made = {}
    for name in tasks:
        instances = read_instances(dataset, name, split)
        scorer.check(instances.about)
        catalogue = catalogue_of(dataset, name) if instances.objective == "retrieval" else None
        made[name] = measure(scorer, instances, catalogue, repeat=dataset.repeat, seed=seed)
        if unseen := unseen_options(dataset, name, instances.about["options"]):
            made[name]["notes"].append(f"no training instance has {', '.join(unseen)}")
        for line in made[name]["notes"]:
            note(f"task {name}: {line}")
    return made


def asked_tasks(scorer: InstanceScorer, dataset: Dataset, asked: str) -> list[str]:
    """The names in `asked`: `all` (that the run has learnt), `none`, or names with commas between.

    Raises InputError for a name that the dataset has not.
    """
    known = {task["name"]: task for task in dataset.tasks}
    if asked == "none":
        return []
    if asked == "all":
        return [name for name, about in known.items() if scorer.knows(about)]
    names = [name.strip() for name in asked.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(f"--tasks {name}: no task of {dataset.path}, which has {', '.join(known) or 'none'}")
    return names


def shown(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The measures of a task that a validation gives, the first of them before the others."""
    kind = about["objective"]
    if kind == "retrieval":
        return ("recall@10",)
    if kind == "classify" or len(about["options"]) > 2:
        return "accuracy", "macro_f1", "log_loss"
    return ("auc",) if kind == "plausibility" else ("auc", "log_loss")


class TaskEvaluator:
    """What training asks of tasks at each validation: `evaluator(params) -> {"<measure>/<task>": figure}`.

    The measures are those of `shown`, and `names` what is given. A fixed sample of `VALIDATED` instances is looked at; a retrieval
    searches all items that its instances name. Tasks without a held-out instance, or whose measure is not defined on
    them, are said once and left out.
    """

    def __init__(self, blueprint: Blueprint, dataset: Dataset, tasks: Collection[str], *, length: int = 256, seed: int = 0) -> None:  # fmt: skip
        self.blueprint, self.dataset, self.length = blueprint, dataset, length
        self.asked: dict[str, tuple[Instances, Catalogue | None]] = {}
        for about in dataset.tasks:
            name = about["name"]
            if name not in tasks or about["objective"] == "text":  # its loss says as much
                continue
            instances = read_instances(dataset, name, "valid")
            if len(instances) > VALIDATED:
                instances = instances.take(np.sort(np.random.default_rng(seed).choice(len(instances), VALIDATED, replace=False)))  # fmt: skip
            if about["objective"] != "retrieval" and len(set(instances.labels.tolist()) - {-1}) < 2:
                note(f"task {name}: its validation instances are of one class or none, so {', '.join(shown(about))} is not reported")  # fmt: skip
                continue
            if len(instances):
                catalogue = catalogue_of(dataset, name) if about["objective"] == "retrieval" else None
                self.asked[name] = instances, catalogue
        self.scorer: InstanceScorer | None = None

    def __call__(self, params: Any) -> dict[str, float]:
        if not self.asked:
            return {}
        if self.scorer is None:
            data = self.dataset
            facts = item_table(data.content, data.seen)
            self.scorer = InstanceScorer(self.blueprint, params, facts, data.tasks, length=self.length)
        self.scorer.params = params
        made = {}
        for name, (instances, catalogue) in self.asked.items():
            found = measure(self.scorer, instances, catalogue, repeat=self.dataset.repeat)["metrics"]
            made |= {f"{one}/{name}": float(found[one]) for one in shown(instances.about) if one in found}
        return made

    @property
    def names(self) -> list[str]:
        return [f"{one}/{name}" for name, (instances, _) in self.asked.items() for one in shown(instances.about)]
