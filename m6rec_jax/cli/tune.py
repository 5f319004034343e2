"""`m6rec tune`: a few numbers beside the frozen parameters of a run, trained for one task."""

from __future__ import annotations

from typing import Any

from m6rec_jax.cli.outputs import folder_to_write
from m6rec_jax.config import ModelConfig
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.settings import Parser

MOST_VALID = 20_000  # instances that choose the best step; the first of a shuffle where there are more


def tune(argv: list[str]) -> None:
    """Tune a run for a task of its dataset into a folder; the same command goes on where it stopped."""
    parser = Parser(
        prog="m6rec tune",
        usage="m6rec tune --run RUN --dataset DATASET --task NAME --method METHOD --out TUNED [--layers keep=N,add=M]\n"
        "                  [--rank N] [--prompts N] [--learning-rate X] [--epochs X] [--seed N] ...",
        description="Tune a run for one task: train a few numbers beside its frozen parameters (docs/tuning.md).\n"
        "The same command again goes on where it stopped; many tuned tasks are served over one run.\n\n"
        "methods:\n"
        "  prompt          soft prompts in front of the tokens, and a linear head\n"
        "  option          soft prompts whose last are the rows of the classifier too (M6-Rec)\n"
        "  adapter         a low-rank network beside every feed-forward layer, and a head\n"
        "  option-adapter  option and adapter together\n"
        "  lora            low-rank updates of the attention matrices, and a head\n"
        "  full            everything, and a head: a copy of all parameters\n\n"
        "example:\n  m6rec tune --run runs/shop --dataset data/shop --task click --method option-adapter --out tuned/click",
    )
    add = parser.add_argument
    add("--run", required=True, metavar="RUN", help="folder that `m6rec train` wrote; nothing in it changes")
    add("--dataset", required=True, metavar="DATASET", help="folder that `m6rec prepare` wrote, with the task in it")
    add("--task", required=True, metavar="NAME", help="a task of the dataset's own, by name")
    add("--method", required=True, metavar="METHOD", help="one of the methods above")
    add("--out", required=True, metavar="TUNED", help="folder of the artefact; made if missing")
    add("--step", default="best", metavar="STEP", help="of the run: best, latest, or the number of a checkpoint")
    add("--layers", default="", metavar="KEEP,ADD", help="keep=N: only the first N layers, or a list such as keep=0+2+5; add=M: M fresh layers on top, trained too; all and none if left out")  # fmt: skip
    add("--rank", type=int, default=0, metavar="N", help="of adapters and LoRA; 0 = a sixteenth of the width, of LoRA a sixty-fourth")  # fmt: skip
    add("--prompts", type=int, default=0, metavar="N", help="soft prompts, options among them; 0 = 16, or 8 and the options if those are more")  # fmt: skip
    add("--targets", default="", metavar="NAMES", help="matrices that LoRA updates: some of query, key, value, output, gate, up, down; the first four if left out")  # fmt: skip
    add("--learning-rate", type=float, default=0.0, metavar="X", help="at its peak; 0 = what suits the method")
    add("--epochs", type=float, default=16.0, metavar="X", help="passes over the instances at most")
    add("--rows", type=int, default=32, metavar="N", help="instances a step")
    add("--every", type=int, default=0, metavar="N", help="steps between validations; 0 = an epoch, 1,000 at most")
    add("--patience", type=int, default=4, metavar="N", help="validations without a better figure before tuning stops; 0 = never")  # fmt: skip
    add("--weight-decay", type=float, default=0.01, metavar="X", help="on matrices of layers; never on prompts and heads")  # fmt: skip
    add("--dropout", type=float, default=-1.0, metavar="X", help="in place of the run's model.dropout and model.embed_dropout; -1 = theirs")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of fresh numbers, data order and dropout")
    options = parser.parse(argv)
    run_tuning(options)


def run_tuning(options: Any) -> None:
    """What the options ask for."""
    from dataclasses import replace

    import numpy as np

    from m6rec_jax.data.dataset import open_dataset
    from m6rec_jax.data.instances import read_instances
    from m6rec_jax.model.tuning import METHODS, TuneSpec
    from m6rec_jax.recommend.metrics.options import of_options
    from m6rec_jax.recommend.tuned import learnt_rows, open_backbone
    from m6rec_jax.training.tune.run import TuneTask, tune
    from m6rec_jax.training.tune.settings import LEARNING_RATES, TuneSettings

    out = folder_to_write("--out", options.out)
    if options.method not in METHODS:
        raise InputError(f"--method {options.method}: unknown; one of {', '.join(METHODS)}")
    settings = TuneSettings(
        learning_rate=options.learning_rate or LEARNING_RATES[options.method], epochs=options.epochs, rows=options.rows,
        every=options.every, patience=options.patience, weight_decay=options.weight_decay, seed=options.seed,
    )  # fmt: skip
    data = open_dataset(options.dataset)
    train, valid = (read_instances(data, options.task, split) for split in ("train", "valid"))
    if len(valid) > MOST_VALID:
        valid = valid.take(np.sort(np.random.default_rng(options.seed).permutation(len(valid))[:MOST_VALID]))
    backbone = open_backbone(options.run, data, options.step)
    backbone = replace(backbone, blueprint=replace(backbone.blueprint, config=_dropped(backbone.blueprint.config, options.dropout)))  # fmt: skip
    spec = TuneSpec.of(
        backbone.blueprint.config, options.method, len(train.about["options"]), prompts=options.prompts, rank=options.rank,
        layers=options.layers, targets=tuple(filter(None, options.targets.split(","))),
    )  # fmt: skip
    rows = learnt_rows(backbone, options.run, data, train.option_task)
    task = TuneTask.of(data, train, valid, _room(options.run), rows, dropout=options.dropout)
    made = tune(backbone, task, spec, settings, out, of_options)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in sorted(made.metrics.items()))
    print(f"{made.path}: {made.name} by {options.method}; validation {figures}")
    if options.method == "full":
        note("of method full every task is a model of its own; the other methods share one")


def _dropped(config: ModelConfig, rate: float) -> ModelConfig:
    """The configuration with another rate of dropout; -1: as it is."""
    from dataclasses import replace

    return config if rate == -1 else replace(config, dropout=rate, embed_dropout=rate)


def _room(run: str) -> int:
    """Tokens of a row that the run was trained on."""
    from m6rec_jax.artifacts.run import read_run

    return read_run(run).config.data.length
