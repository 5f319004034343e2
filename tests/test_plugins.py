"""A task and an objective of another package, found by entry point and trained."""

import numpy as np
import pytest

from m6rec_jax.config import Config, DataConfig, MixtureConfig, ModelConfig, OptimConfig, TrainConfig
from m6rec_jax.errors import InputError
from m6rec_jax.training.metrics import read_rows
from m6rec_jax.training.run import train
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401

MODULE = """
from m6rec_jax.data.records import ITEM
from m6rec_jax.data.tasks import Task
from m6rec_jax.data.examples import text_example
from m6rec_jax.objectives import Objective
from m6rec_jax.objectives.causal import arrange_causal
import numpy as np

def arrange(example, rng, mask_rate):
    return arrange_causal(example, rng, mask_rate)

def build(record, piece, facts):
    text = record.tokens[: piece.stretch][::-1].copy()
    return text_example(text[:1], text[1:])

backwards = Task(
    "{name}", (ITEM,), "left-to-right", lambda room, facts: room,
    lambda tokens, draws, facts: (np.ones_like(tokens), tokens - 1), build, least=2, windows=False,
)
left = Objective("left-to-right", arrange, lambda s, t, r: s + t - 1, lambda s, t, r: t)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    def make(name):
        module = f"others_{name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(MODULE.replace("{name}", name))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            f"[m6rec_jax.tasks]\nx = {module}:backwards\n[m6rec_jax.objectives]\ny = {module}:left\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))

    return make


def test_a_task_and_an_objective_of_another_package_train(package, tiny_dataset, tmp_path):  # noqa: F811
    package("title-backwards")
    config = Config(
        model=ModelConfig(layers=1, width=16, heads=2),
        optim=OptimConfig(learning_rate=0.02, warmup=1),
        data=DataConfig(length=64, rows=4, block=512),
        mixture=MixtureConfig({"title-backwards": 0.5, "next-item": 0.5}),
        train=TrainConfig(steps=10, log_every=2, eval_every=0),
    )
    rows = [r for r in read_rows(train(config, [tiny_dataset], tmp_path / "run")) if "loss" in r]
    losses = [row["loss/title-backwards"] for row in rows]
    assert losses[-1] < losses[0]
    assert np.isfinite(losses).all()


def test_a_name_that_is_taken_is_refused(package):
    from m6rec_jax.data.tasks import tasks

    package("next-item")
    with pytest.raises(InputError, match="the name 'next-item' is taken in m6rec_jax.tasks"):
        tasks()
