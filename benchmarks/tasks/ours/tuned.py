"""`m6rec tune` in this benchmark: every method over the same backbone, under the same search."""

from __future__ import annotations

import shutil
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tasks.ours.backbone import backbone
from benchmarks.tasks.ours.recipes import asked
from benchmarks.tasks.problem import SPLITS, Problem
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.data.instances import read_instances
from m6rec_jax.decoding.tuned import TunedServer
from m6rec_jax.model.depth import Backbone
from m6rec_jax.model.tuning import TuneSpec
from m6rec_jax.recommend.metrics.options import of_options
from m6rec_jax.recommend.tuned import learnt_rows, open_backbone
from m6rec_jax.training.tune.run import TuneTask, tune
from m6rec_jax.training.tune.settings import LEARNING_RATES, TuneSettings

EPOCHS, STEPS, PATIENCE, EVERY = 3, 300, 3, 50  # at most, of training; steps between validations
RATES = (1.0, 0.3, 0.1, 0.03)  # of the method's own learning rate


def settings(problem: Problem) -> tuple[dict[str, Any], ...]:
    """Four learning rates."""
    return tuple({"rate": rate} for rate in RATES)


def tuned(method: str):
    """The `fit` of a method: tune a copy of the few numbers, keep what validation likes best, serve it."""

    def fit(problem: Problem, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, np.ndarray]:
        data, run = backbone(problem, options)
        base, task = _opened(run, data.path), _task(run, data, problem)
        count = len(task.train)
        spec = TuneSpec.of(base.blueprint.config, method, len(task.options))
        how = TuneSettings(
            learning_rate=settings["rate"] * LEARNING_RATES[method], epochs=min(EPOCHS, STEPS * 32 / count), every=EVERY,
            patience=PATIENCE, seed=seed,
        )  # fmt: skip
        folder = options.work / "tuned" / problem.name / f"{method}-{settings['rate']:g}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        server = TunedServer(base)
        server.add(tune(base, task, spec, how, folder, of_options))
        return {split: _chances(server, data, problem, split, task.about["length"]) for split in SPLITS[1:]}

    return fit


@cache
def _opened(run: Path, data: Path) -> Backbone:
    return open_backbone(run, open_dataset(data), "latest")


def _task(run: Path, data: Dataset, problem: Problem) -> TuneTask:
    name = asked(problem)
    train, valid = (read_instances(data, name, split) for split in ("train", "valid"))
    rows = learnt_rows(_opened(run, data.path), run, data, train.option_task)
    return TuneTask.of(data, train, valid, read_run(run).config.data.length, rows)


def _chances(server: TunedServer, data: Dataset, problem: Problem, split: str, room: int) -> np.ndarray:
    instances = read_instances(data, asked(problem), split)
    prompts = [(one.source, one.source_rows) for one in instances.laid_out(room)]
    return np.exp(np.stack(server.score([asked(problem)] * len(prompts), prompts)))
