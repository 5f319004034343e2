"""`m6rec train`: pretrain, resume, or start from weights that are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m6rec_jax.cli.outputs import folder_to_write
from m6rec_jax.cli.processes import join_processes
from m6rec_jax.config import Config, dump_config
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.settings import Parser, add_config_options, config_of

VALIDATION_USERS = 10_000  # who choose the best checkpoint; a sample of them where there are more


def train(argv: list[str]) -> None:
    """Train into the run folder, or print the merged configuration."""
    parser = Parser(
        prog="m6rec train",
        usage="m6rec train --config CONFIG.yaml [--config MORE.yaml] --dataset DATASET[=WEIGHT] [--dataset ...]\n"
        "                   --run RUN [--init-from RUN|FOLDER] [--distill-from RUN] [--print-config]\n"
        "                   [--section.key=value ...]",
        description="Pretrain a model on one dataset or several. The same command again resumes where it stopped.\n"
        "On several machines start it with srun, or give each process M6REC_COORDINATOR=host:port, M6REC_PROCESSES\n"
        "(how many) and M6REC_PROCESS_ID (from 0).\n\n"
        "example:\n  m6rec train --config small --dataset data/shop --run runs/shop --train.steps=3000",
    )
    add = parser.add_argument
    add("--dataset", action="append", metavar="DATASET[=WEIGHT]", help="folder that `m6rec prepare` wrote; repeat for several, which share one tokenizer (prepare --like) and are trained together. WEIGHT multiplies its share of the target tokens: 1 if left out, so all have the same share; shop=0.5 has half that of the others")  # fmt: skip
    add("--run", metavar="RUN", help="folder of the run: checkpoints, metrics, configuration; made if missing")
    add("--init-from", metavar="RUN|FOLDER", help="start from this run's best parameters, items matched by id; or from a Llama in a folder of Hugging Face (config.json, model.safetensors, its tokenizer), text matched by piece: docs/weights.md")  # fmt: skip
    add("--distill-from", metavar="RUN", help="a larger run on the same datasets that teaches this one by relations between tokens, beside the tasks (section distill): docs/edge.md")  # fmt: skip
    add("--print-config", action="store_true", help="print the merged configuration as YAML and stop")
    add_config_options(parser)
    options = parser.parse(argv)
    config = config_of(options)
    if options.print_config:
        print(dump_config(config), end="")
        return
    for name in ("dataset", "run"):
        if not options[name]:
            raise InputError(f"--{name} is missing; m6rec train --help shows an example")
    run = folder_to_write("--run", options.run)
    join_processes()
    datasets, weights = zip(*map(weighted, options.dataset), strict=True)
    run_training(config, list(datasets), run, options.init_from, weights, options.distill_from)


def weighted(named: str) -> tuple[Path, float]:
    """The folder and the weight that one --dataset names; InputError when what stands after = is no number above 0."""
    path, found, weight = named.rpartition("=")
    if not found or Path(named).is_dir():
        return Path(named), 1.0
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(f"--dataset {named}: no such folder, and {weight!r} is no weight; write --dataset DATASET, or DATASET=0.5 with a number above 0")  # fmt: skip
    return Path(path), value


def run_training(
    config: Config,
    datasets: list[Path],
    run: Path,
    init_from: str | None = None,
    weights: Sequence[float] = (),
    distill_from: str | None = None,
) -> None:
    """Say what is resumed, then train."""
    import jax

    from m6rec_jax.artifacts.checkpoints import steps
    from m6rec_jax.artifacts.run import read_run
    from m6rec_jax.recommend.evaluate import ValidationEvaluator
    from m6rec_jax.recommend.gating import fit_gate
    from m6rec_jax.recommend.tasks import TaskEvaluator
    from m6rec_jax.training.run import train as pretrain

    done = max(steps(run), default=0)
    if done:  # whether patience ended it there, the loop says
        wanted = (
            min(config.train.steps, read_run(run).config.train.steps) if config.train.epochs else config.train.steps
        )
        end = "; nothing is left to train" if done >= wanted else ""
        note(f"{run}: step {done:,} of {wanted:,} is saved{end}")
        if init_from:
            note(f"--init-from {init_from} counted at the first start only; the checkpoints of {run} go on")
    else:
        passes = f"{config.train.epochs:g} passes over the histories, at most " if config.train.epochs else ""
        start = f" from the parameters of {init_from}" if init_from else ""
        note(f"{run}: starting, {passes}{config.train.steps:,} steps{start}")

    def evaluator(blueprint, dataset, length):
        ranking = ValidationEvaluator(blueprint, dataset, length=length, users=VALIDATION_USERS)
        return _Together(ranking, TaskEvaluator(blueprint, dataset, config.mixture.tasks, length=length))

    of = {"weights": weights, "init_from": init_from, "distill_from": distill_from}
    pretrain(config, datasets, run, **of, make_evaluator=evaluator)
    if jax.process_count() == 1:  # of many processes none has the run to itself; the first `evaluate` does it then
        for dataset in datasets:
            fit_gate(run, dataset)


class _Together:
    """Several evaluators as one: the figures of each."""

    def __init__(self, *parts: Any):
        self.parts = parts
        self.names = [name for part in parts for name in part.names]

    def __call__(self, params: Any) -> dict[str, float]:
        return {name: value for part in self.parts for name, value in part(params).items()}
