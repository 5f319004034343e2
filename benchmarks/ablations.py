"""What each choice of the default configuration brings and costs: one change at a time, validation split.

    python -m benchmarks.ablations [--datasets beauty ml-100k office] [--rows NAME ...] [--seed 0] [--config quality]
                                   [--tables ../shared/data] [--work build/quality] [--source WHEEL]

Every row trains the configuration with one thing changed (a setting, a part of the model, or the dataset prepared in
another way) and measures it beside the run that changes nothing; rows of the memory take that run and change what stands
beside the model. The difference is paired over users. Test targets are never looked at. Runs end where they stopped
before when called again. Writes benchmarks/results/ablations.json, whose rows of earlier calls stay until measured anew,
and from all of them the page docs/ablations.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from benchmarks.quality import Case, cases, dataset_of, quality_parser
from benchmarks.record import RESULTS, commit, kept_rows, timed_training, write_results
from benchmarks.variants import VARIANTS, variant
from m6rec_jax.config import Config, MixtureConfig
from m6rec_jax.config.data import DEFAULT_MIXTURE
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.data.neighbours import Neighbours, find_neighbours
from m6rec_jax.data.prepare import prepare
from m6rec_jax.progress import note
from m6rec_jax.recommend import gate, gating
from m6rec_jax.recommend.gating import with_gate
from m6rec_jax.recommend.histories import held_out
from m6rec_jax.recommend.memory import FLOOR, Memory, MemoryConfig
from m6rec_jax.recommend.metrics import paired, per_user
from m6rec_jax.recommend.recommender import Recommender
from m6rec_jax.settings import load_config

K = 10
BASE = "as configured"
KEY = ("dataset", "protocol", "row", "seed")
PAGE = RESULTS.parents[1] / "docs" / "ablations.md"


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
    "dropout .2, input .4": _model(dropout=0.2, embed_dropout=0.4),
    "15 passes": lambda config: replace(config, train=replace(config.train, epochs=15.0)),
    "dropout .4, input .6": _model(dropout=0.4, embed_dropout=0.6),
    "running mean of the parameters": _optim(average=0.998),
    "id parts never dropped": _model(id_dropout=0.0),
    "no content": _model(content=False),
    "2 layers": _model(layers=2),
    "width 64": _model(width=64),
    "all seven tasks": lambda config: replace(config, mixture=MixtureConfig(dict(DEFAULT_MIXTURE))),
    "with item text": _tasks(next_item=0.8, text_causal=0.2),
    "with masked items": _tasks(next_item=0.8, behaviour_masked=0.2),
    "with seq2seq": _tasks(next_item=0.8, behaviour_seq2seq=0.2),
}


def _kinds(card: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """Events of two kinds, by the rating; None without ratings."""
    events = card["events"]
    if "value" not in events:
        return None
    table = pl.read_csv(events["path"], infer_schema=False)
    liked = pl.when(pl.col(events["value"]).cast(pl.Float64) >= 4).then(pl.lit("liked")).otherwise(pl.lit("met"))
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / "events.csv").resolve()
    table.with_columns(kind=liked).write_csv(path)
    return card | {"events": events | {"path": str(path), "kind": "kind"}}


# What is prepared in another way: a change of the card (None: says nothing there), and options of `prepare`.
PREPARED: dict[str, tuple[Callable[[dict, Path], dict | None], dict[str, Any]]] = {
    "codes of 3 x 256": (lambda card, folder: card, {"levels": 3, "codebook": 256}),
    "behaviour kinds": (_kinds, {}),
}
# What stands beside the model of the base run: settings, and which neighbours of the dataset.
MEMORIES: dict[str, tuple[MemoryConfig, Callable[[Dataset], Neighbours | None]]] = {
    "memory of 3 items, no neighbours": (FLOOR, lambda data: None),
    "memory without neighbours": (MemoryConfig(), lambda data: None),
    "20 neighbours by content vectors, 8 counts": (MemoryConfig(prior=8.0), lambda data: find_neighbours(data.content, k=20, sharpness=4.0)),
    "neighbours worth 4 counts": (MemoryConfig(prior=4.0), lambda data: data.neighbours),
    "neighbours worth 64 counts": (MemoryConfig(prior=64.0), lambda data: data.neighbours),
}  # fmt: skip
LIKELY = "gate by likelihood alone"
SURE = "model as sure as it is"  # no temperature
BEST = "gate at the very best list"  # however few users say so
NAMES = [*TRAINED, *VARIANTS, *PREPARED, *MEMORIES, LIKELY, SURE, BEST]


@dataclass(frozen=True)
class Measured:
    """NDCG@10 of each user, `[U]`, with memory and without; seconds of training, parameters, users ranked a second."""

    with_memory: np.ndarray
    alone: np.ndarray
    seconds: float | None
    parameters: int
    users_per_s: float


def main() -> None:
    parser = quality_parser(__doc__)
    parser.add_argument("--rows", nargs="+", default=NAMES, choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    options.commit = commit()
    found: list[dict[str, Any]] = []
    for case in cases(options.datasets, []):
        data = dataset_of(case, options)
        if data is None:
            note(f"{case.name}: no tables under {options.tables}; left out")
            continue
        config = load_config([options.config], [f"--train.seed={options.seed}"])
        run = options.work / "runs" / f"{case.name}-{options.seed}"
        base = trained(config, data, run)
        found.append(_row(case, BASE, base, base, options))
        for name in options.rows:
            folder = options.work / "ablations" / f"{case.name}-{options.seed}-{name.replace(' ', '-')}"
            if name in PREPARED:
                other = prepared(case, name, options)
                if other is None:
                    continue
                measured = trained(config, other, folder)
            elif name in TRAINED or name in VARIANTS:
                with variant(name):
                    measured = trained(TRAINED.get(name, lambda c: c)(config), data, folder)
            else:
                measured = replace(base, with_memory=beside(name, data, run))
            found.append(_row(case, name, measured, base, options))
            path = written(found)
        path = written(found)
        show(found)
    if found:
        note(f"wrote {path}")


def written(found: list[dict[str, Any]]) -> Path:
    """The rows found so far beside those of earlier calls, as JSON and as the page."""
    together = kept_rows("ablations", found, KEY) + found
    PAGE.write_text(page(together), encoding="utf-8")
    return write_results("ablations", together)


def prepared(case: Case, name: str, options: argparse.Namespace) -> Dataset | None:
    """The dataset of a case, prepared in another way; None where that way says nothing."""
    out = options.work / "datasets" / f"{case.name}-{name.replace(' ', '-')}"
    if not (out / "manifest.json").is_file():
        change, how = PREPARED[name]
        tables = options.work / "tables"
        card = change(json.loads((tables / case.name / "card.yaml").read_text(encoding="utf-8")), tables / out.name)
        if card is None:
            return None
        path = tables / case.name / f"card-{name.replace(' ', '-')}.yaml"
        path.write_text(json.dumps(card, indent=2), encoding="utf-8")
        prepare(path, out, **how)
    return open_dataset(out)


def trained(config: Config, data: Dataset, run: Path) -> Measured:
    """Train a run, or take it up, and rank for every validation user."""
    seconds = timed_training(config, data, run)
    recommender = with_gate(Recommender.load(run, dataset=data), run, data)
    assert recommender.engine is not None
    parameters = sum(x.size for x in jax.tree.leaves(recommender.engine.params))
    both, alone = ranked(recommender, data), ranked(recommender, data, memory=False)
    begun = time.monotonic()  # once more, with everything compiled
    ranked(recommender, data, memory=False)
    return Measured(both, alone, seconds, parameters, len(alone) / (time.monotonic() - begun))  # fmt: skip


def beside(name: str, data: Dataset, run: Path) -> np.ndarray:
    """The model of a run beside another memory, or beside its own with a gate that likelihood alone decides."""
    recommender = Recommender.load(run, dataset=data)
    if name == SURE:
        recommender.gate = None
        with instead(gating, "TEMPERATURES", (1.0,)):
            recommender = with_gate(recommender, run, data, keep=False)
    elif name == BEST:
        recommender.gate = None
        with instead(gate, "ERRORS", 0.0):
            recommender = with_gate(recommender, run, data, keep=False)
    elif name == LIKELY:
        fitted = with_gate(recommender, run, data).gate
        assert fitted is not None
        recommender.gate = replace(fitted, bias=fitted.bias - fitted.moved, moved=0.0)
    else:
        settings, neighbours = MEMORIES[name]
        recommender.memory = Memory(data.transitions, settings, neighbours(data))
        recommender.gate = None
        recommender = with_gate(recommender, run, data, keep=False)
    return ranked(recommender, data)


@contextmanager
def instead(module: ModuleType, constant: str, value: Any) -> Iterator[None]:
    """While open, a constant of a module has another value."""
    before = getattr(module, constant)
    setattr(module, constant, value)
    try:
        yield
    finally:
        setattr(module, constant, before)


def ranked(recommender: Recommender, data: Dataset, **options: Any) -> np.ndarray:
    """NDCG@10 of each validation user `[U]`."""
    asked = held_out(data, "valid")
    rows = recommender.recommend_histories(asked, K, **options).rows
    return per_user(rows, asked.targets, (K,))[f"ndcg@{K}"]


def _row(case: Case, name: str, measured: Measured, base: Measured, options: argparse.Namespace) -> dict[str, Any]:
    metric, seed = f"ndcg@{K}", options.seed
    compared = {
        part: paired({metric: getattr(measured, part)}, {metric: getattr(base, part)}, seed=seed)
        for part in ("with_memory", "alone")
    }
    return {
        "dataset": case.dataset, "protocol": case.protocol, "split": "valid", "row": name, "seed": seed,
        "users": len(base.alone), "commit": options.commit, "seconds": measured.seconds, "parameters": measured.parameters,
        "users_per_s": round(measured.users_per_s, 1),
        "metrics": {part: float(getattr(measured, part).mean(dtype=np.float64)) for part in compared},
        "over_base": {part: {k: one[k] for k in ("relative", "ci95", "p")} for part, one in compared.items()},
    }  # fmt: skip


HEAD = """# What each choice brings

`make bench-ablations` wrote this page. Each line changes one thing of `configs/quality.yaml`, or of what stands beside the
model; NDCG@10 on validation users, the whole catalogue ranked. In a cell: by how much the change is better or worse with
memory / for the model alone (one number: the model is the same), paired over users; a star: p < .05 by randomisation,
not corrected for how many lines there are. The first line has the scores themselves; lines were compared with the base
of the same call (benchmarks/results/ablations.json names the commits). In brackets: seconds of training, parameters in
millions, users ranked a second by the model alone; seconds depend on what else the machine did.

"""


def page(rows: list[dict[str, Any]]) -> str:
    """All rows as Markdown: a line a change, seeds a column each."""
    columns = sorted({(r["dataset"], r["protocol"], r["seed"]) for r in rows})
    names = [BASE, *(name for name in NAMES if any(r["row"] == name for r in rows))]
    lines = [
        "| changed | " + " | ".join(f"{d}, {p}, seed {s}" for d, p, s in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in names:
        cells = []
        for column in columns:
            row = next(
                (r for r in rows if r["row"] == name and (r["dataset"], r["protocol"], r["seed"]) == column), None
            )
            cells.append("" if row is None else _cell(row))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return HEAD + "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    same_model = row["row"] in (*MEMORIES, LIKELY, SURE, BEST)
    parts = ("with_memory",) if same_model else ("with_memory", "alone")
    if row["row"] == BASE:
        said = " / ".join(f"{row['metrics'][part]:.4f}" for part in parts)
    else:
        over = [row["over_base"][part] for part in parts]
        said = " / ".join(
            f"{one['relative']:+.1%}".replace("%", " %") + ("*" if one["p"] < 0.05 else "") for one in over
        )
    cost = [f"{row['seconds']:,.0f} s"] if row["seconds"] else []
    if not same_model:
        cost += [f"{row['parameters'] / 1e6:.2f} M", f"{row['users_per_s']:,.0f}/s"]
    return said + (f" ({', '.join(cost)})" if cost else "")


def show(rows: list[dict[str, Any]]) -> None:
    """A line a row and dataset: NDCG@10, and what the change brought in percent."""
    table = Table(
        "data set", "protocol", "changed", "with memory", "alone", "s to train", "parameters", "users/s alone"
    )
    for row in rows:
        shown = []
        for part in ("with_memory", "alone"):
            change = row["over_base"][part]
            shown.append(f"{row['metrics'][part]:.4f}" + ("" if row["row"] == BASE else f" ({change['relative']:+.1%}, p {change['p']:.2f})"))  # fmt: skip
        table.add_row(row["dataset"], row["protocol"], row["row"], *shown, f"{row['seconds'] or np.nan:,.0f}", f"{row['parameters'] / 1e6:.2f} M", f"{row['users_per_s']:,.0f}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
