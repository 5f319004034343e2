"""What pretraining on other domains brings to one with few events: a model of Office and ML-100K, taken to Beauty.

    python -m benchmarks.transfer [--shares 0.01 0.1 1.0] [--seed 0] [--config quality]
                                  [--tables ../shared/data] [--work build/quality] [--source WHEEL]

Of Beauty the events of a share of its users are known, of the others none; the texts of all items are. A model starts
from nothing or from the one trained on the other two domains (`--init-from`: layers and the reading of item features; no
item is common). Asked are the validation users of the whole dataset, whose histories nothing has learned from but
those of the share. Test targets are never looked at. Writes benchmarks/results/transfer.json after every row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from benchmarks.quality import Case, dataset_of, prepared_again, quality_parser
from benchmarks.record import commit, kept_rows, timed_training, write_results
from m6rec_jax.cli.train import run_training
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.progress import note
from m6rec_jax.recommend.gating import with_gate
from m6rec_jax.recommend.histories import held_out
from m6rec_jax.recommend.memory import Memory
from m6rec_jax.recommend.metrics import per_user
from m6rec_jax.recommend.recommender import Recommender
from m6rec_jax.settings import load_config

K = 10
TARGET, OTHERS = "beauty", ("office", "ml-100k")
KEY = ("dataset", "share", "start", "seed")


def main() -> None:
    parser = quality_parser(__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.1, 1.0], help="of the users of Beauty")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    options.commit = commit()
    whole = dataset_of(Case(TARGET, "leave-one-out", 0), options)
    others = [dataset_of(Case(name, "leave-one-out", 0), options) for name in OTHERS]
    if whole is None or None in others:
        note(f"no tables under {options.tables}: nothing to measure")
        return
    folder = options.work / "datasets"
    lenders = [
        prepared_again(o, folder / f"{o.name}-like-{TARGET}", pl.lit(True), like=whole.path, prefix=f"{o.name}:")
        for o in others
        if o
    ]
    config = load_config([options.config], [f"--train.seed={options.seed}"])
    before = options.work / "runs" / f"{'+'.join(OTHERS)}-{options.seed}"
    run_training(config, [one.path for one in lenders], before)

    rows: list[dict] = []
    for share in options.shares:
        part = some_users(whole, share, options.seed, folder / f"{TARGET}-{share:g}-{options.seed}")
        for start, lender in (("nothing", None), (" + ".join(OTHERS), str(before))):
            run = options.work / "runs" / f"{part.path.name}-from-{start.replace(' ', '')}"
            seconds = timed_training(config, part, run, lender)
            figures = score(run, part, whole)
            head = {"dataset": TARGET, "split": "valid", "share": share, "start": start, "seed": options.seed}
            counts = {
                "users": len(held_out(whole, "valid")),
                "known_users": part.users.height,
                "commit": options.commit,
            }
            rows.append(head | counts | {"metrics": figures, "seconds": seconds})
            path = write_results("transfer", kept_rows("transfer", rows, KEY) + rows)
            show(rows)
    if rows:
        note(f"wrote {path}")


def some_users(whole: Dataset, share: float, seed: int, out: Path) -> Dataset:
    """The dataset of a share of the users, over the same items, tokenizer and features."""
    count = whole.users.height
    drawn = np.random.default_rng(seed).permutation(count)[: max(1, round(share * count))]
    return prepared_again(whole, out, pl.col("user").is_in(pl.Series(drawn).implode()), like=whole.path)


def score(run: Path, part: Dataset, whole: Dataset) -> dict[str, float]:
    """NDCG@10 and Recall@10 of all users of `whole`, for the model beside the memory of `part`, and alone."""
    recommender = Recommender.load(run, dataset=whole)
    recommender.memory = Memory(part.transitions, neighbours=part.neighbours)
    recommender.gate = with_gate(Recommender.load(run, dataset=part), run, part).gate  # fitted on the share alone
    asked, found = held_out(whole, "valid"), {}
    for name, memory in (("with memory", True), ("alone", False)):
        vectors = per_user(recommender.recommend_histories(asked, K, memory=memory).rows, asked.targets, (K,))
        found |= {f"{metric} {name}": float(vectors[metric].mean()) for metric in (f"ndcg@{K}", f"recall@{K}")}
    return found


def show(rows: list[dict]) -> None:
    """A line a share and start."""
    table = Table("share of users", "model starts from", "NDCG@10 alone", "Recall@10 alone", "NDCG@10 with memory", "s")
    for row in rows:
        figures = [f"{row['metrics'][f'{metric}@{K} {name}']:.4f}" for metric, name in (("ndcg", "alone"), ("recall", "alone"), ("ndcg", "with memory"))]  # fmt: skip
        table.add_row(f"{row['share']:.0%}", row["start"], *figures, f"{row['seconds'] or np.nan:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
