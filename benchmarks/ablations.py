"""What each choice of the default configuration brings and costs: one change at a time, validation split.

    python -m benchmarks.ablations [--datasets beauty ml-100k office] [--rows NAME ...] [--seed 0] [--config quality]
                                   [--tables ../shared/data] [--work build/quality] [--source WHEEL]

Every row trains the configuration with one thing changed and measures it beside the run that changes nothing; rows of
the memory take that run and change what stands beside the model. The difference is paired over users. Test targets are
never looked at. Runs end where they stopped before when called again. Writes benchmarks/results/ablations.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.quality import Case, cases, dataset_of, quality_parser
from benchmarks.record import write_results
from m6rec_jax.cli.train import run_training
from m6rec_jax.config import DEFAULT_MIXTURE, Config, MixtureConfig
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.progress import note
from m6rec_jax.recommend.gating import with_gate
from m6rec_jax.recommend.histories import held_out
from m6rec_jax.recommend.memory import FLOOR, Memory, MemoryConfig
from m6rec_jax.recommend.metrics import paired, per_user
from m6rec_jax.recommend.recommender import Recommender
from m6rec_jax.settings import load_config

K = 10
BASE = "as configured"


def _model(**changed: Any) -> Callable[[Config], Config]:
    return lambda config: replace(config, model=replace(config.model, **changed))


def _optim(**changed: Any) -> Callable[[Config], Config]:
    return lambda config: replace(config, optim=replace(config.optim, **changed))


def _tasks(**shares: float) -> Callable[[Config], Config]:
    tasks = {name.replace("_", "-"): share for name, share in shares.items()}
    return lambda config: replace(config, mixture=MixtureConfig(tasks))


def _tokens(tokens: int) -> Callable[[Config], Config]:
    """Batches of other tokens; the row's length has to be said then: that of these data sets' histories."""
    return lambda config: replace(config, data=replace(config.data, length=64, rows=tokens // 64))


# What is trained anew.
TRAINED: dict[str, Callable[[Config], Config]] = {
    "batches of 4,096 tokens": _tokens(4096),
    "all items as negatives": _optim(negatives=0),
    "label smoothing .1": _optim(label_smoothing=0.1),
    "learning rate .001": _optim(learning_rate=0.001),
    "dropout .4, input .6": _model(dropout=0.4, embed_dropout=0.6),
    "id parts never dropped": _model(id_dropout=0.0),
    "no content": _model(content=False),
    "2 layers": _model(layers=2),
    "width 64": _model(width=64),
    "all seven tasks": lambda config: replace(config, mixture=MixtureConfig(dict(DEFAULT_MIXTURE))),
    "with item text": _tasks(next_item=0.8, text_causal=0.2),
    "with masked items": _tasks(next_item=0.8, behaviour_masked=0.2),
    "with seq2seq": _tasks(next_item=0.8, behaviour_seq2seq=0.2),
}
# What stands beside the model of the base run.
MEMORIES: dict[str, tuple[MemoryConfig, bool]] = {  # settings, whether with neighbours
    "memory of 3 items, no neighbours": (FLOOR, False),
    "memory without neighbours": (MemoryConfig(), False),
    "neighbours worth 2 counts": (MemoryConfig(prior=2.0), True),
    "neighbours worth 32 counts": (MemoryConfig(prior=32.0), True),
}
LIKELY = "gate by likelihood alone"


@dataclass(frozen=True)
class Measured:
    """NDCG@10 of each user, `[U]`, with memory and without, and the seconds that training took."""

    with_memory: np.ndarray
    alone: np.ndarray
    seconds: float


def main() -> None:
    names = [*TRAINED, *MEMORIES, LIKELY]
    parser = quality_parser(__doc__)
    parser.add_argument("--rows", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    found: list[dict[str, Any]] = []
    for case in cases(options.datasets, []):
        data = dataset_of(case, options)
        if data is None:
            note(f"{case.name}: no tables under {options.tables}; left out")
            continue
        config = load_config([options.config], [f"--train.seed={options.seed}"])
        run = options.work / "runs" / f"{case.name}-{options.seed}"
        base = trained(config, data, run)
        found.append(_row(case, BASE, base, base, options.seed))
        for name in options.rows:
            if name in TRAINED:
                folder = options.work / "ablations" / f"{case.name}-{options.seed}-{name.replace(' ', '-')}"
                measured = trained(TRAINED[name](config), data, folder)
            else:
                measured = replace(base, with_memory=beside(name, data, run))
            found.append(_row(case, name, measured, base, options.seed))
            path = write_results("ablations", found)
        show(found)
    if found:
        note(f"wrote {path}")


def trained(config: Config, data: Dataset, run: Path) -> Measured:
    """Train a run, or take it up, and rank for every validation user."""
    start = time.monotonic()
    run_training(config, [data.path], run)
    seconds = time.monotonic() - start
    recommender = with_gate(Recommender.load(run, dataset=data), run, data)
    return Measured(ranked(recommender, data), ranked(recommender, data, memory=False), round(seconds, 1))


def beside(name: str, data: Dataset, run: Path) -> np.ndarray:
    """The model of a run beside another memory, or beside its own with a gate that likelihood alone decides."""
    recommender = Recommender.load(run, dataset=data)
    if name == LIKELY:
        gate = with_gate(recommender, run, data).gate
        assert gate is not None
        recommender.gate = replace(gate, bias=gate.bias - gate.moved, moved=0.0)
    else:
        settings, neighbours = MEMORIES[name]
        recommender.memory = Memory(data.transitions, settings, data.neighbours if neighbours else None)
        recommender.gate = None
        recommender = with_gate(recommender, run, data, keep=False)
    return ranked(recommender, data)


def ranked(recommender: Recommender, data: Dataset, **options: Any) -> np.ndarray:
    """NDCG@10 of each validation user `[U]`."""
    asked = held_out(data, "valid")
    rows = recommender.recommend_histories(asked, K, **options).rows
    return per_user(rows, asked.targets, (K,))[f"ndcg@{K}"]


def _row(case: Case, name: str, measured: Measured, base: Measured, seed: int) -> dict[str, Any]:
    metric = f"ndcg@{K}"
    compared = {
        part: paired({metric: getattr(measured, part)}, {metric: getattr(base, part)}, seed=seed)
        for part in ("with_memory", "alone")
    }
    return {
        "dataset": case.dataset, "protocol": case.protocol, "split": "valid", "row": name, "seed": seed,
        "users": len(base.alone), "seconds": measured.seconds,
        "metrics": {part: float(getattr(measured, part).mean(dtype=np.float64)) for part in compared},
        "over_base": {part: {k: one[k] for k in ("relative", "ci95", "p")} for part, one in compared.items()},
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """A line a row and dataset: NDCG@10, and what the change brought in percent."""
    table = Table("data set", "protocol", "changed", "with memory", "alone", "s to train")
    for row in rows:
        shown = []
        for part in ("with_memory", "alone"):
            change = row["over_base"][part]
            shown.append(f"{row['metrics'][part]:.4f}" + ("" if row["row"] == BASE else f" ({change['relative']:+.1%}, p {change['p']:.2f})"))  # fmt: skip
        table.add_row(row["dataset"], row["protocol"], row["row"], *shown, f"{row['seconds']:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
