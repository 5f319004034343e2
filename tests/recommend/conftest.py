"""Two tiny runs for all tests of this room: one code level, and three with kinds of events."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from m6rec_jax.artifacts.manifest import file_digest
from m6rec_jax.artifacts.run import Run, TrainedOn, write_run
from m6rec_jax.config import Config
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.model.load import Blueprint
from m6rec_jax.training.checkpoint import CheckpointWriter, Position
from m6rec_jax.training.state import TrainState
from tests.fixtures import tiny, tiny_dataset, tiny_levels, tiny_root  # noqa: F401

SETTINGS = {"model": {"layers": 1, "width": 16, "heads": 2}, "data": {"length": 64}}
STEP = 30


def saved_run(dataset: Path, run: Path, mixture: dict[str, float] | None = None) -> Path:
    """A run folder as training leaves it, with random parameters large enough to tell items apart."""
    data, config = (
        open_dataset(dataset),
        Config.from_dict(SETTINGS | ({"mixture": {"tasks": mixture}} if mixture else {})),
    )
    run.mkdir(parents=True)
    for name in ("tokenizer.model", "items.parquet", "codes.npz", "transitions.npz"):
        shutil.copyfile(dataset / name, run / name)
    width = data.content.shape[1]
    trained_on = TrainedOn.of(dataset, data.digest, data.manifest)
    write_run(Run(run, config, data.vocab, width, (trained_on,), file_digest(run / "tokenizer.model"), "test"))
    params = jax.tree.map(lambda x: 3 * x, Blueprint(config.model, data.vocab, width).init(0))
    writer = CheckpointWriter(run, config.checkpoint)
    writer.save(TrainState(params, {"none": jnp.zeros(1)}, jnp.int32(STEP), jnp.int32(0)), Position(), {"ndcg@10": 0.1})
    writer.wait()
    return run


@pytest.fixture(scope="session")
def tiny_run(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A run of `tiny_dataset`. Tests may let it have its gate and its looks, nothing else."""
    return saved_run(tiny_dataset, tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture(scope="session")
def levels_run(tiny_levels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A run of `tiny_levels`: three code levels, kinds of events, searches with text."""
    return saved_run(tiny_levels, tmp_path_factory.mktemp("runs") / "levels")
