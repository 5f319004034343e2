"""The six methods of `m6rec tune` on one task, each under the same search: AUC, trained numbers, bytes, seconds.

    python -m benchmarks.tuning [--work build/tuning] [--methods option-adapter full ...] [--rates 0.3 1 3] [--seeds 0 1 2]
                                [--epochs 16] [--rows 1000] [--dataset DATASET --run RUN --task NAME]

Without a dataset of one's own a planted world is made and a backbone trained on it (`small` at 800 steps, once): users like
one or two of six topics, items are called by two words of their topic, and documents tell what users saw one after the other.
The task is whether a user clicks an item that is offered, told by titles alone; a tenth of the answers is turned round. It is
in no mixture, so that the backbone has met its words and not its question. Each method and seed tries every learning rate (a multiple of the
method's default) and keeps the one that is best on validation; the AUC is of the test split, with a 95 % interval by
bootstrap over instances, as served by `TunedServer` from the artefact. At the end all artefacts of the first seed score
the test split in one mixed batch: `mixed` is how far a log-probability lies from that of the task alone. Writes
benchmarks/results/tuning.json; rows of earlier calls stay until measured anew.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.record import kept_rows, write_results
from m6rec_jax.artifacts.checkpoints import steps
from m6rec_jax.artifacts.tuned import TENSORS, read_tuned
from m6rec_jax.cli import main as m6rec
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.data.instances import read_instances
from m6rec_jax.data.prepare import prepare
from m6rec_jax.decoding.shapes import Prompt
from m6rec_jax.decoding.tuned import TunedServer
from m6rec_jax.model.depth import Backbone
from m6rec_jax.model.tuning import METHODS
from m6rec_jax.recommend.metrics.scoring import auc
from m6rec_jax.recommend.tuned import open_backbone
from m6rec_jax.settings import load_config
from m6rec_jax.training.run import train
from m6rec_jax.training.tune.settings import LEARNING_RATES

TOPICS, WORDS, USERS, ITEMS, DOCUMENTS = 6, 8, 300, 120, 3000
STEPS = 800
TURNED = 0.1  # share of answers turned round
KEY = ("dataset", "task", "train", "method", "seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path("build/tuning"))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--rates", nargs="+", type=float, default=[1.0])
    add("--seeds", nargs="+", type=int, default=[0])
    add("--epochs", type=float, default=16.0)
    add("--rows", type=int, default=1000, help="instances to train on, of the planted world")
    add("--dropout", type=float, default=0.1)
    add("--dataset", type=Path)
    add("--run", type=Path)
    add("--task", default="click")
    add("--out", type=Path)
    options = parser.parse_args()
    if options.dataset is None:
        options.dataset, options.run = planted(options.work, options.rows)
    data = open_dataset(options.dataset)
    held_out = read_instances(data, options.task, "test")
    backbone = open_backbone(options.run, data)
    length = yaml.safe_load((options.run / "config.yaml").read_text())["data"]["length"]
    prompts = [(one.source, one.source_rows) for one in held_out.laid_out(length)]
    rows: list[dict[str, Any]] = []
    alone: dict[str, np.ndarray] = {}
    folders: dict[str, Path] = {}
    for seed in options.seeds:
        for method in options.methods:
            row, folder = searched(options, data, method, seed)
            server = TunedServer(backbone)
            server.add(read_tuned(folder))
            logp = np.stack(server.score([options.task] * len(prompts), prompts))
            score = logp[:, 1] - logp[:, 0]
            row |= {"auc": auc(held_out.labels == 1, score), "ci95": interval(held_out.labels == 1, score, seed)}
            rows.append(row)
            if seed == options.seeds[0]:
                alone[method], folders[method] = logp, folder
    far = mixed(backbone, folders, prompts, alone)
    for row in rows[: len(options.methods)]:
        row["mixed"] = far[row["method"]]
    show(rows)
    write_results("tuning", [*kept_rows("tuning", rows, KEY), *rows], options.out)


def planted(work: Path, rows: int) -> tuple[Path, Path]:
    """The dataset with `rows` training instances, and the run that all sizes share, made where they are not there yet."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = rng.permutation([a + b for a in syllables for b in syllables])[: TOPICS * WORDS].reshape(TOPICS, WORDS)
    topic = rng.integers(TOPICS, size=ITEMS)
    titles = [" ".join(rng.choice(words[t], 2, replace=False)) for t in topic]

    def seen(n: int) -> tuple[np.ndarray, np.ndarray]:
        """n items of a taste of one or two topics, and which items are of it."""
        inside = np.isin(topic, rng.choice(TOPICS, rng.integers(1, 3), replace=False))
        return rng.choice(np.flatnonzero(inside), n, replace=False), inside

    events = pl.DataFrame(
        [(f"u{u}", f"i{i}", at) for u in range(USERS) for at, i in enumerate(seen(int(rng.integers(5, 10)))[0])],
        schema=["user", "item", "time"], orient="row",
    )  # fmt: skip
    items = pl.DataFrame({"id": [f"i{i}" for i in range(ITEMS)], "title": titles})
    documents = pl.DataFrame({"text": [". ".join(titles[i] for i in seen(5)[0]) for _ in range(DOCUMENTS)]})
    many = {"train": rows, "valid": 600, "test": 1500}
    table: list[tuple[Any, ...]] = []
    for split, n in many.items():
        for _ in range(n):
            past, inside = seen(4)
            yes = bool(rng.random() < 0.5)
            offered = int(rng.choice(np.setdiff1d(np.flatnonzero(inside == yes), past)))
            said = yes != bool(rng.random() < TURNED)
            table.append((". ".join(titles[i] for i in past), titles[offered], "yes" if said else "no", split))
    own = pl.DataFrame(table, schema=["seen", "item", "clicked", "split"], orient="row")
    template = work / "click.yaml"
    work.mkdir(parents=True, exist_ok=True)
    template.write_text(
        'task: click\nlanguage: en\nobjective: scoring\nmetric: auc\nsource:\n  - "{seen}"\n'
        'opening:\n  - "{item}?"\noptions: ["no", "yes"]\n',
        encoding="utf-8",
    )
    fields = {"seen": "seen", "item": "item"}
    card = {
        "name": f"planted-{rows}",
        "events": {"path": events, "user": "user", "item": "item", "time": "time", "time_unit": "order"},
        "items": {"path": items, "id": "id", "title": "title"},
        "corpus": {"path": documents, "text": ["text"]},
        "split": "leave-one-out",
        "tasks": {"click": {"template": str(template.absolute()), "path": own, "fields": fields, "target": "clicked", "split": "split"}},
    }  # fmt: skip
    data, run = work / f"planted-{rows}", work / "run"
    if not (data / "manifest.json").is_file():
        prepare(card, data, levels=1, codebook=16, vocab_size=640)
    if max(steps(run), default=0) < STEPS:
        settings = [f"--train.steps={STEPS}", "--data.length=64", "--data.rows=16", "--optim.warmup=50", f"--train.eval_every={STEPS}"]  # fmt: skip
        mixture = "--mixture.tasks={next-item: 0.2, text-causal: 0.4, text-infill: 0.4}"
        train(
            load_config(["small"], [*settings, "--model.dropout=0.1", "--model.embed_dropout=0.1", mixture]),
            [data],
            run,
        )
    return data, run


def searched(options: argparse.Namespace, data: Dataset, method: str, seed: int) -> tuple[dict[str, Any], Path]:
    """The best artefact of a method over the learning rates, by validation AUC, and its row."""
    found: list[tuple[float, float, float, Path]] = []
    for rate in options.rates:
        folder = options.work / "tuned" / f"{data.name}-{options.task}-{method}-{seed}-{rate:g}"
        shutil.rmtree(folder, ignore_errors=True)
        start = time.monotonic()
        code = m6rec(
            ["tune", "--run", str(options.run), "--dataset", str(options.dataset), "--task", options.task, "--method", method,
             "--out", str(folder), f"--learning-rate={rate * LEARNING_RATES[method]}", f"--epochs={options.epochs}",
             f"--seed={seed}", f"--dropout={options.dropout}"]
        )  # fmt: skip
        if code:
            raise SystemExit(code)
        found.append((read_tuned(folder).metrics["auc"], rate, time.monotonic() - start, folder))
    valid, rate, _, folder = max(found)
    body = yaml.safe_load((folder / "manifest.json").read_text())
    row = {
        "dataset": data.name, "task": options.task, "train": len(read_instances(data, options.task, "train")),
        "method": method, "seed": seed, "rates": options.rates, "rate": rate,
        "learning_rate": rate * LEARNING_RATES[method], "epochs": options.epochs, "step": body["step"],
        "trained": body["trained"], "parameters": body["parameters"], "share": body["trained"] / body["parameters"],
        "bytes": (folder / TENSORS).stat().st_size, "bytes_share": (folder / TENSORS).stat().st_size / (4 * body["parameters"]),
        "seconds": round(sum(one[2] for one in found), 1), "valid_auc": valid,
    }  # fmt: skip
    return row, folder


def mixed(
    backbone: Backbone, folders: dict[str, Path], prompts: list[Prompt], alone: dict[str, np.ndarray]
) -> dict[str, float]:
    """Of each method, how far a log-probability is at most from its own where instances of all methods share batches."""
    server = TunedServer(backbone)
    artefacts = {method: read_tuned(folder) for method, folder in folders.items()}
    server.add(*(replace(one, task={**one.task, "name": method}) for method, one in artefacts.items()))
    asked = [(method, i) for method in folders for i in range(len(prompts))]
    asked = [asked[at] for at in np.random.default_rng(0).permutation(len(asked))]
    found = server.score([method for method, _ in asked], [prompts[i] for _, i in asked])
    far = dict.fromkeys(folders, 0.0)
    for (method, i), logp in zip(asked, found, strict=True):
        far[method] = max(far[method], float(np.abs(logp - alone[method][i]).max()))
    return far


def interval(labels: np.ndarray, scores: np.ndarray, seed: int, draws: int = 500) -> list[float]:
    """95 % interval of the AUC by bootstrap over instances."""
    rng = np.random.default_rng(seed)
    picks = (rng.integers(len(labels), size=len(labels)) for _ in range(draws))
    return [float(x) for x in np.quantile([auc(labels[pick], scores[pick]) for pick in picks], (0.025, 0.975))]


def show(rows: list[dict[str, Any]]) -> None:
    """One line a method and seed."""
    table = Table(title=f"{rows[0]['dataset']}, {rows[0]['task']}: {rows[0]['train']:,} instances to train on")
    for name in ("method", "seed", "trained", "share", "bytes", "test AUC (95 %)", "mixed", "s"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        low, high = row["ci95"]
        table.add_row(
            row["method"], str(row["seed"]), f"{row['trained']:,}", f"{row['share']:.2%}", f"{row['bytes']:,}",
            f"{row['auc']:.4f} ({low:.4f} to {high:.4f})", f"{row['mixed']:.1e}" if "mixed" in row else "-", f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
