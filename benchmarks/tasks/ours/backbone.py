"""From a problem to a trained run: prepare its card, train one mixture on it; both are kept under the work folder."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tasks.problem import Problem
from m6rec_jax.artifacts.checkpoints import steps
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.data.prepare import prepare
from m6rec_jax.progress import note
from m6rec_jax.settings import load_config
from m6rec_jax.training.run import train

CONFIG = Path(__file__).with_name("backbone.yaml")


@dataclass(frozen=True)
class Recipe:
    """What the backbone of a task learns: shares of the mixture by task, steps, and settings of its own."""

    mixture: dict[str, float]
    steps: int
    settings: tuple[str, ...] = ()
    prepare: tuple[tuple[str, Any], ...] = (("levels", 1), ("codebook", 256), ("vocab_size", 4096))


def backbone(problem: Problem, recipe: Recipe, options: Namespace, seed: int = 0) -> tuple[Dataset, Path]:
    """The dataset and the run of a problem, made where they are not there yet. What is tuned shares the run of seed 0."""
    data, run = options.work / "datasets" / problem.name, options.work / "runs" / f"{problem.name}-{seed}"
    if not (data / "manifest.json").is_file():
        prepare(problem.card(), data, **dict(recipe.prepare))
    dataset = open_dataset(data)
    if max(steps(run), default=0) < recipe.steps:
        note(f"{problem.name}: training the backbone of seed {seed}, {recipe.steps:,} steps")
        named = ", ".join(f"{task}: {share}" for task, share in recipe.mixture.items())
        own = [f"--train.steps={recipe.steps}", f"--train.seed={seed}", f"--mixture.tasks={{{named}}}", *recipe.settings]
        train(load_config([str(CONFIG)], own), [data], run)
    return dataset, run
