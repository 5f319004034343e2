"""Whether replaced-token detection pays: the default configuration with and without it, at equal steps, validation split.

    python -m benchmarks.replaced [--datasets office] [--seeds 0 1] [--cases NAME ...] [--config quality]
                                  [--tables ../shared/data] [--work build/quality] [--source WHEEL]

Every case trains as many rows of the same length from the same seed. NDCG@10 of the model alone and with memory, the whole
catalogue ranked; differences from the case that changes nothing are paired over users, each user's mean over seeds. Test
targets are never looked at. Runs end where they stopped before when called again. Writes benchmarks/results/replaced.json.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.ablations import K, Measured, trained
from benchmarks.quality import cases, dataset_of, quality_parser
from benchmarks.record import commit, write_results
from m6rec_jax.config import Config, MixtureConfig, ReplacedConfig
from m6rec_jax.progress import note
from m6rec_jax.recommend.metrics import paired
from m6rec_jax.settings import load_config
from m6rec_jax.training.metrics import read_rows

BASE = "as configured"
CASES: dict[str, dict[str, float] | None] = {
    BASE: None,
    "weight 50": {"weight": 50.0},
    "weight 5": {"weight": 5.0},
    "weight 5, reward 1": {"weight": 5.0, "reward": 1.0},
    "weight 5, reward 1, a quarter of the histories rewritten": {"weight": 5.0, "reward": 1.0, "augment": 0.25},
}
SHARE = 0.2  # of the target tokens
PARTS = ("alone", "with_memory")


def main() -> None:
    parser = quality_parser(__doc__)
    parser.set_defaults(datasets=["office"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME")
    options = parser.parse_args()

    options.commit = commit()
    rows: list[dict[str, Any]] = []
    for case in cases(options.datasets, []):
        data = dataset_of(case, options)
        if data is None:
            note(f"{case.name}: no tables under {options.tables}; left out")
            continue
        found: dict[str, list[Measured]] = {}
        for name in dict.fromkeys([BASE, *options.cases]):
            said = []
            for seed in options.seeds:
                config = load_config([options.config], [f"--train.seed={seed}"])
                folder = f"{case.name}-{seed}-{name.replace(',', '').replace(' ', '-')}"
                run = options.work / "replaced" / folder
                found.setdefault(name, []).append(trained(changed(config, CASES[name]), data, run))
                said.append(last_said(read_rows(run)))
            rows.append(row(case.dataset, case.protocol, name, found, said, options))
            path = write_results("replaced", rows)
            show(rows)
            note(f"wrote {path}")


def changed(config: Config, settings: dict[str, float] | None) -> Config:
    """The configuration with a share of its targets for detection, None: without."""
    if settings is None:
        return config
    mixture = MixtureConfig({"next-item": 1 - SHARE, "behaviour-replaced": SHARE})
    return replace(config, mixture=mixture, replaced=ReplacedConfig(**settings))


def last_said(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the last logged row says of detection."""
    logged = [r for r in rows if "detection/auc" in r]
    return {k: v for k, v in logged[-1].items() if k.startswith(("detection/", "generator/"))} if logged else {}


def row(
    dataset: str, protocol: str, name: str, found: dict[str, list[Measured]], said: list[dict[str, float]],
    options: Namespace,
) -> dict[str, Any]:  # fmt: skip
    """NDCG@10 of each seed, and of all seeds together how far it is from the case that changes nothing."""
    users = lambda of, part: np.mean([getattr(one, part) for one in of], axis=0)  # noqa: E731
    over = {
        part: paired({f"ndcg@{K}": users(found[name], part)}, {f"ndcg@{K}": users(found[BASE], part)}, seed=0)
        for part in PARTS
    }
    return {
        "dataset": dataset, "protocol": protocol, "split": "valid", "case": name, "seeds": options.seeds,
        "commit": options.commit, "users": len(found[name][0].alone),
        "seconds": [one.seconds for one in found[name]],
        "ndcg@10": {part: [float(getattr(one, part).mean()) for one in found[name]] for part in PARTS},
        "over_base": {part: {k: one[k] for k in ("relative", "ci95", "p")} for part, one in over.items()},
        "last_logged": said,
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """A line a case: NDCG@10 a seed, what it brought in percent, and how well replaced tokens were found."""
    table = Table("data set", "case", "alone", "with memory", "AUC of detection", "s to train")
    for one in rows:
        cells = []
        for part in PARTS:
            over = one["over_base"][part]
            change = "" if one["case"] == BASE else f" ({over['relative']:+.1%}, p {over['p']:.2f})"
            cells.append(" ".join(f"{x:.4f}" for x in one["ndcg@10"][part]) + change)
        auc = " ".join(f"{told['detection/auc']:.3f}" for told in one["last_logged"] if told)
        table.add_row(one["dataset"], one["case"], *cells, auc, " ".join(f"{s or np.nan:,.0f}" for s in one["seconds"]))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
