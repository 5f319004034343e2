"""The runs that are compared: one plain run begins them all, and each goes on from it for as many steps."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tasks import movielens
from benchmarks.tasks.ours.recipes import SCORED
from m6rec_jax.artifacts.checkpoints import steps
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.data.prepare import prepare
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.settings import load_config
from m6rec_jax.training.run import train

BASE = Path(__file__).parents[1] / "tasks" / "ours" / "backbone.yaml"
TASK = "like"
ASKED = {"past": 0.5, "like": 0.5}  # from the first run on, nothing but what is asked
LENGTH = 256
HISTORY = 24  # events before the one that is asked for: some 200 tokens an instance
PIECES = 4096


@dataclass(frozen=True)
class Kind:
    """One run: its settings, its steps, which run it begins with and which one teaches it (of this table, or none)."""

    settings: tuple[str, ...]
    steps: int
    begins: str = ""
    teacher: str = ""
    mixture: tuple[tuple[str, float], ...] = tuple(ASKED.items())


@dataclass(frozen=True)
class Sizes:
    """How large and how long: `full` and `edge` are settings of the models, `first`, `more`, `taught` and `thinned` steps."""

    full: tuple[str, ...] = ("--model.layers=8",)
    edge: tuple[str, ...] = ("--model.layers=4", "--model.width=96", "--model.embed=32", "--model.heads=4", "--distill.heads=4")  # fmt: skip
    begin: tuple[str, ...] = ("--data.length=96", "--data.rows=64")  # the newest events alone
    first: int = 800
    more: int = 240
    taught: int = 240
    thinned: int = 160
    late: tuple[int, ...] = (2,)


def kinds(sizes: Sizes) -> dict[str, Kind]:
    """Every run by name, each behind those that it needs."""
    plain = (*sizes.full, f"--data.length={LENGTH}", "--optim.learning_rate=0.001", "--optim.warmup=20")
    small = (
        *sizes.edge, *sizes.begin, "--model.shared_layers=true", "--model.content=false",
        "--model.id_dropout=0", "--model.dropout=0.1", "--model.embed_dropout=0.1",
    )  # fmt: skip
    further = (*small, "--optim.learning_rate=0.002", "--optim.warmup=20", "--optim.weight_decay=0")
    end = round(0.6 * sizes.thinned)  # the rest of the steps mends what is left
    thin = ("--prune.sparsity=0.8", "--prune.tables=true", f"--prune.end={end}", f"--prune.every={max(1, end // 30)}")
    taught = {"begins": "edge", "teacher": "full"}
    return {
        "begin": Kind((*sizes.full, *sizes.begin), sizes.first, mixture=tuple(SCORED.items())),
        "full": Kind(plain, sizes.more, "begin"),
        **{f"late {k}": Kind((*plain, f"--model.late={k}"), sizes.more, "begin") for k in sizes.late},
        # The same again from there, on other rows.
        **{
            f"late {k}, longer": Kind((*plain, f"--model.late={k}", "--train.seed=1"), sizes.more, f"late {k}")
            for k in sizes.late
        },
        "exits": Kind((*plain, "--model.exits=true"), sizes.more, "begin"),
        "edge": Kind((*small, "--optim.learning_rate=0.003"), sizes.taught, teacher="full"),
        "dense": Kind(further, sizes.thinned, **taught),
        "sparse": Kind((*further, *thin), sizes.thinned, **taught),
    }


def prepared(options: Namespace) -> Path:
    """The dataset of clicks of ML-100K with long histories, made where it is not there yet."""
    data = options.work / "datasets" / "clicks"
    if not (data / "manifest.json").is_file():
        problem = movielens.read(options.work / "ml-100k", options.source, HISTORY)
        prepare(problem.card(), data, levels=1, vocab_size=PIECES)
    return data


def trained(data: Path, work: Path, names: Sequence[str], sizes: Sizes) -> dict[str, Path]:
    """The folder of each named run and of those that it needs, trained or taken up where they are not finished.

    Raises InputError when one is there with other settings.
    """
    known, made = kinds(sizes), {}

    def run_of(name: str) -> Path:
        kind, run = known[name], work / "runs" / name.replace(",", "").replace(" ", "-")
        begins, teacher = (run_of(other) if other else None for other in (kind.begins, kind.teacher))
        mixture = ", ".join(f"{task}: {share}" for task, share in kind.mixture)
        own = (f"--train.steps={kind.steps}", f"--checkpoint.every={max(1, kind.steps // 2)}", "--train.eval_every=0")
        config = load_config([str(BASE)], [f"--mixture.tasks={{{mixture}}}", *own, *kind.settings])
        if kind.steps not in steps(run):
            note(f"training {name}: {kind.steps:,} steps")
            train(config, [data], run, init_from=begins, distill_from=teacher)
        elif read_run(run).config != config:
            raise InputError(f"{run}: trained with other settings than this benchmark's now; remove it, or name another --work")  # fmt: skip
        made[name] = run
        return run

    for name in names:
        run_of(name)
    return {name: made[name] for name in names}
