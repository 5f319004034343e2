"""From a problem to a trained run: prepare its card, train one mixture on it; both are kept under the work folder."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from benchmarks.tasks.ours.recipes import recipe_of
from benchmarks.tasks.problem import Problem
from benchmarks.tasks.problems import read_problem
from m6rec_jax.artifacts.checkpoints import steps
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.data.prepare import prepare
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.settings import load_config
from m6rec_jax.training.run import train

VOCABULARY = 4096  # pieces of text at most
CONFIG = Path(__file__).with_name("backbone.yaml")


def backbone(problem: Problem, options: Namespace, seed: int = 0) -> tuple[Dataset, Path]:
    """The dataset and the run of a problem, made where they are not there yet. What is tuned shares the run of seed 0."""
    recipe = recipe_of(problem)
    data, run = options.work / "datasets" / problem.name, options.work / "runs" / f"{problem.name}-{seed}"
    lent, start = None, None
    if recipe.after:
        lender = read_problem(recipe.after, options)
        assert lender is not None
        lent, start = backbone(lender, options, seed)
    if not (data / "manifest.json").is_file():
        like = {"like": lent.path, "borrow": "tokenizer"} if lent else {"vocab_size": VOCABULARY}
        prepare(problem.card(), data, levels=1, **like)
    dataset = open_dataset(data)
    named = ", ".join(f"{task}: {share}" for task, share in recipe.mixture.items())
    own = [f"--train.steps={recipe.steps}", f"--train.seed={seed}", f"--mixture.tasks={{{named}}}", *recipe.settings]
    config = load_config([str(CONFIG)], own)
    if recipe.steps not in steps(run):
        note(f"{problem.name}: training the backbone of seed {seed}, {recipe.steps:,} steps")
        train(config, [data], run, init_from=start)
    elif read_run(run).config != config:
        raise InputError(f"{run}: trained with other settings than its recipe has now; remove it, or name another --work")  # fmt: skip
    return dataset, run
