"""Items that nobody has met: the coldest tenth of the catalogue held out of training, and who finds them afterwards.

    python -m benchmarks.cold [--datasets beauty ml-100k office] [--share 0.1] [--seed 0] [--config quality]
                              [--tables ../shared/data] [--work build/quality] [--source WHEEL]

The items with the fewest events (ties drawn by the seed) keep their text and lose every event but those that are a
user's held-out ones. Asked are the users whose held-out item is such an item: Recall@100 over the whole catalogue of the
model with memory, the same with half of the places given to new items (`--new-items 0.5`), of the model alone, and of
the items nearest to the last item of the history by TF-IDF. What the given places cost the others stands beside:
Recall@100 of the users whose held-out item is not new. Scores the
validation split; with FINAL=1 in the environment the test split. Writes benchmarks/results/cold.json; rows of earlier
calls stay until measured anew.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import polars as pl
import scipy.sparse as sp
from rich.console import Console
from rich.table import Table

from benchmarks.quality import Case, dataset_of, prepared_again, quality_parser
from benchmarks.record import commit, kept_rows, timed_training, write_results
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.features import fit_encoder, item_texts
from m6rec_jax.data.splits import TRAIN
from m6rec_jax.progress import note
from m6rec_jax.recommend.evaluate import looked
from m6rec_jax.recommend.gating import with_gate
from m6rec_jax.recommend.histories import Histories, held_out
from m6rec_jax.recommend.metrics import per_user
from m6rec_jax.recommend.recommender import Recommender
from m6rec_jax.settings import load_config

K = 100
NEW = 0.5
KEY = ("dataset", "split", "seed", "system")


def main() -> None:
    parser = quality_parser(__doc__)
    parser.add_argument("--share", type=float, default=0.1, help="of the items that have events")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    split = "test" if os.environ.get("FINAL") == "1" else "valid"
    options.commit = commit()
    rows = []
    for name in options.datasets:
        whole = dataset_of(Case(name, "leave-one-out", 0), options)
        if whole is None:
            note(f"{name}: no tables under {options.tables}; left out")
            continue
        cold = coldest(whole, options.share, options.seed)
        data = without(whole, cold, options.work / "datasets" / f"{name}-cold-{options.seed}")
        rows += score(data, cold, split, options)
        path = write_results("cold", kept_rows("cold", rows, KEY) + rows)
        show(rows)
    if rows:
        note(f"wrote {path}")


def coldest(data: Dataset, share: float, seed: int) -> np.ndarray:
    """Ids of the items with the fewest events of any split, a `share` of those that have any."""
    events = pl.read_parquet(data.path / "events.parquet", columns=["item"]).filter(pl.col("item") >= 0)
    counts = np.bincount(events["item"].to_numpy(), minlength=data.catalogue)
    met = np.flatnonzero(counts)
    order = np.lexsort((np.random.default_rng(seed).random(len(met)), counts[met]))
    return np.array(data.item_ids)[met[order[: round(share * len(met))]]]


def without(data: Dataset, cold: np.ndarray, out: Path) -> Dataset:
    """The dataset whose training knows nothing of the cold items: the same items, users and held-out events."""
    met = (pl.col("split") != TRAIN) | ~pl.col("item_id").is_in(pl.Series(cold).implode())
    return prepared_again(data, out, met)


def score(data: Dataset, cold: np.ndarray, split: str, options: argparse.Namespace) -> list[dict]:
    """Train (or take up) one run and ask it for the cold items: one row a system."""
    run = options.work / "runs" / data.path.name
    seconds = timed_training(load_config([options.config], [f"--train.seed={options.seed}"]), data, run)
    recommender = with_gate(Recommender.load(run, dataset=data), run, data)
    everybody = held_out(data, split)
    hidden = np.isin(np.array(data.item_ids)[everybody.targets], cold)
    asked = everybody.take(np.flatnonzero(hidden))
    if data.seen[asked.targets].any():
        raise AssertionError("a cold item has training events")
    others = everybody.take(np.flatnonzero(~hidden))
    words = fit_encoder(texts := item_texts(data.items))[0].weigh(texts)
    lists = {
        system: tuple(make(part) for part in (asked, others))
        for system, make in {
            "model with memory": lambda part: recommender.recommend_histories(part, K).rows,
            f"and {NEW:.0%} of places for new items": lambda part: recommender.recommend_histories(part, K, new_items=NEW).rows,
            "model alone": lambda part: recommender.recommend_histories(part, K, memory=False).rows,
            "nearest to the last item": lambda part: nearest(words, part),
        }.items()
    }  # fmt: skip
    head = {
        "dataset": data.name.split("-cold-")[0], "split": split, "seed": options.seed, "users": len(asked),
        "cold_items": len(cold), "catalogue": data.catalogue, "looks": looked(run, split, recommender.step, data),
        "seconds": seconds, "commit": options.commit,
    }  # fmt: skip
    name = f"recall@{K}"
    recall = lambda rows, part: float(per_user(rows, part.targets, (K,))[name].mean())  # noqa: E731
    return [
        head
        | {"system": system, "metrics": {name: recall(cold_rows, asked), f"{name} of the others": recall(rows, others)}}
        for system, (cold_rows, rows) in lists.items()
    ]


def nearest(words: sp.csr_array, asked: Histories) -> np.ndarray:
    """The K items nearest to the last item of each history by cosine of TF-IDF `[C, t]`, `[U,K]`; history left out."""
    rows, turned = np.full((len(asked), K), -1, np.int32), sp.csr_array(words.T)
    for user, history in enumerate(asked.known):
        if not len(history):
            continue
        near = (words[[history[-1]]] @ turned).toarray()[0]
        near[history] = -np.inf
        rows[user] = np.argsort(-near, kind="stable")[:K]
    return rows


def show(rows: list[dict]) -> None:
    """A line a dataset and system."""
    table = Table(
        "data set", "split", "users", "system", f"Recall@{K} on cold items", "of the nearest", "on the others"
    )
    for row in rows:
        same = [r for r in rows if r["dataset"] == row["dataset"]]
        value, base = row["metrics"][f"recall@{K}"], same[-1]["metrics"][f"recall@{K}"]
        table.add_row(row["dataset"], row["split"], f"{row['users']:,}", row["system"], f"{value:.4f}", f"{value / max(base, 1e-9):.2f}x", f"{row['metrics'][f'recall@{K} of the others']:.4f}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
