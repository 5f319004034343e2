"""Whether runs differ: paired tests over the same users, corrected for how many tests there are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from m6rec_jax.artifacts.checkpoints import best_step
from m6rec_jax.artifacts.run import code_version, read_run
from m6rec_jax.artifacts.schemas import COMPARISON, EVALUATION
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.recommend import metrics
from m6rec_jax.recommend.evaluate import evaluate
from m6rec_jax.recommend.opening import dataset_of, domain_of

LEVEL = 0.05
METHOD = (
    "Paired randomisation over users (10,000 sign flips), p-values corrected for {tests} tests by Holm; differences are "
    "A - B with 95 % bootstrap intervals, which are not corrected. A winner is named where the corrected p is below 0.05."
)


@dataclass(frozen=True)
class Measured:
    """One side of a comparison: the report and the per-user table beside it, sorted by user."""

    name: str
    report: dict[str, Any]
    users: pl.DataFrame


def compare(sides: Sequence[Path | str], split: str = "test", measures: Sequence[str] = ("ndcg@10", "recall@10"),
            dataset: Path | str | None = None, *, seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """Compare the served lists of runs (folders) or reports (JSON of `evaluate`) on the same users, every pair on every measure.

    A run without a report of its best step for `split` and `dataset` (else the one it was trained on) is evaluated
    into `run/reports/`, which on test is a look. Raises InputError when there are fewer than two, or they do not share
    split, protocol, dataset and users, or lack a measure.
    """
    if len(sides) < 2:
        raise InputError(f"{len(sides)} to compare; name at least two runs or reports")
    paths = [Path(side) for side in sides]
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError(f"{', '.join(map(str, paths))}: one is named twice; name each run or report once")
    opened = [_open(path, split, dataset) for path in paths]
    for other in opened[1:]:
        _check_alike(opened[0], other)
    if len({one.report["dataset"]["digest"] for one in opened}) > 1:
        note("the datasets were prepared differently (other codes or texts); users and targets are the same")
    for one in opened:
        for measure in measures:
            if f"model/{measure}" not in one.users.columns:
                there = ", ".join(c.removeprefix("model/") for c in one.users.columns if c.startswith("model/"))
                raise InputError(f"--metric {measure}: {one.name} does not have it; it has {there}")
    rows = []
    for a, b in combinations(opened, 2):
        ours, theirs = ({m: one.users[f"model/{m}"].to_numpy() for m in measures} for one in (a, b))
        for measure in measures:
            found = metrics.paired(ours, theirs, measure, seed=seed)
            means = {f"mean_{side}": float(v[measure].mean(dtype=np.float64)) for side, v in (("a", ours), ("b", theirs))}  # fmt: skip
            rows.append({"a": a.name, "b": b.name, **found, **means})
    for row, corrected in zip(rows, metrics.holm([row["p"] for row in rows]), strict=True):
        winner = row["a"] if row["difference"] > 0 else row["b"]
        row |= {"p_holm": corrected, "winner": winner if corrected < LEVEL else None}
    first = opened[0].report
    return {
        "schema": COMPARISON.name,
        "version": COMPARISON.version,
        "split": split,
        "users": opened[0].users.height,
        "protocol": first["protocol"],
        "method": METHOD.format(tests=len(rows)),
        "bootstrap_seed": seed,
        "code": code_version(),
        "compared": [
            {"name": one.name, **{key: one.report[key] for key in ("run", "step", "seed", "looks", "dataset")}} for one in opened
        ],
        "rows": rows,
    }  # fmt: skip


def _open(path: Path, split: str, dataset: Path | str | None) -> Measured:
    if not path.exists():
        raise InputError(f"{path}: no such run or report; name a folder of `m6rec train` or a JSON of `m6rec evaluate`")
    file, report = _of_run(path, split, dataset) if path.is_dir() else (path, _read(path))
    if report["split"] != split:
        raise InputError(f"{path}: a report on {report['split']}, not on {split}; say --split {report['split']} or name another report")  # fmt: skip
    table = file.with_name(f"{file.stem}.users.parquet")
    try:
        users = pl.read_parquet(table).sort("user_id")
    except (OSError, pl.exceptions.PolarsError):
        raise InputError(f"{table}: missing or not readable; it belongs to {file}: evaluate again") from None
    if users.height != report["users"]:
        raise InputError(f"{table}: {users.height:,} users where {file} speaks of {report['users']:,}; evaluate again")
    return Measured(str(path), report, users)


def _of_run(run: Path, split: str, dataset: Path | str | None) -> tuple[Path, dict[str, Any]]:
    """The run's own report for its best step and this dataset, made now unless it is there."""
    data, record = dataset_of(run, dataset), read_run(run)
    file = record.folder(domain_of(record, data)) / "reports" / f"{split}.json"
    if file.is_file() and file.with_name(f"{split}.users.parquet").is_file():
        report = _read(file)
        if (report["step"], report["dataset"]["digest"]) == (best_step(run), data.digest):
            return file, report
    note(f"{run}: no report of its best step on {split}; evaluating" + (", a look at its test targets" if split == "test" else ""))  # fmt: skip
    file.parent.mkdir(exist_ok=True)
    return file, evaluate(run, split, file, data)


def _read(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if (report["schema"], report["version"]) != EVALUATION:
            raise InputError(f"{file}: schema {report['schema']} {report['version']}, not {EVALUATION.name} {EVALUATION.version}; name a report of `m6rec evaluate`")  # fmt: skip
        for key in ("split", "users", "protocol", "run", "step", "seed", "looks", "dataset"):
            report[key]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: no report of `m6rec evaluate` ({type(error).__name__}: {error}); name one, or a run") from None  # fmt: skip
    return report


def _check_alike(a: Measured, b: Measured) -> None:
    facts = [{"dataset": one.report["dataset"]["name"], "split rule": one.report["dataset"]["split"], "protocol": one.report["protocol"]} for one in (a, b)]  # fmt: skip
    for what, value in facts[0].items():
        if value != facts[1][what]:
            raise InputError(f"{a.name} and {b.name} cannot be compared: {what} is {value!r} in one, {facts[1][what]!r} in the other; compare what was measured alike")  # fmt: skip
    if not a.users.select("user_id", "target").equals(b.users.select("user_id", "target")):
        raise InputError(f"{a.name} and {b.name} cannot be compared: their users or targets differ; evaluate both on one dataset with --dataset")  # fmt: skip
