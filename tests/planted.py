"""A tiny dataset with three tasks of its own in which something is planted: clicks, topics, and what a user's words ask for."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from m6rec_jax.config import CheckpointConfig, Config, DataConfig, MixtureConfig, ModelConfig, OptimConfig, TrainConfig
from m6rec_jax.data.prepare import prepare
from m6rec_jax.recommend.tasks import TaskEvaluator
from m6rec_jax.training.run import train
from tests.fixtures import tiny_card

TOPICS = ("shoes", "lipstick", "coffee")
WORDS = ("classic", "light", "pro", "mini", "vintage", "kids")
CONFIG = Config(
    model=ModelConfig(layers=1, width=32, heads=2, vectors=16, dropout=0.0, embed_dropout=0.0),
    optim=OptimConfig(learning_rate=0.01, warmup=20, label_smoothing=0.0),
    data=DataConfig(length=64, rows=8, block=512),
    checkpoint=CheckpointConfig(every=1000, keep=1),
    train=TrainConfig(steps=120, log_every=40, eval_every=120),
    mixture=MixtureConfig(tasks={"next-item": 2.0, "click": 1.0, "topic": 1.0, "retrieval": 1.0}, temperature=0.0),
)


def planted_tasks(seed: int = 0) -> dict[str, dict]:
    """The `tasks:` section of a card. Clicks follow `statistics` nine times of ten; a topic is a word of the text; a user's
    word is that of the item that is asked for."""
    rng = np.random.default_rng(seed)
    n = 300
    often = rng.random(n) < 0.4
    clicked = np.where(rng.random(n) < 0.9, often, ~often)
    number, topic, word = rng.integers(0, 56, n), rng.integers(0, 3, n), rng.integers(0, len(WORDS), n)
    user = [f"u{i}" for i in rng.integers(0, 60, n)]
    clicks = pl.DataFrame({
        "u": user, "i": [f"item-{i}" for i in number], "item": [f"thing {i}" for i in number],
        "statistics": ["clicked often" if one else "clicked seldom" for one in often], "label": clicked,
    })  # fmt: skip
    topics = pl.DataFrame({
        "item": [f"{WORDS[w]} {TOPICS[t]} {i}" for w, t, i in zip(word, topic, number, strict=True)],
        "topic": [TOPICS[t] for t in topic],
    })  # fmt: skip
    of_word = word + len(WORDS) * rng.integers(0, 4, n)  # four items have each word
    wanted = pl.DataFrame({
        "u": user, "i": [f"item-{i}" for i in of_word], "interests": [WORDS[w] for w in word],
        "item": [f"{WORDS[i % len(WORDS)]} thing {i}" for i in of_word],
    })  # fmt: skip
    cut = {"valid": 0.2, "test": 0.2}
    return {
        "click": {"path": clicks, "target": "label", "group": "u", "item": "i", **cut},
        "topic": {"path": topics, "target": "topic", **cut},
        "retrieval": {"path": wanted, "item": "i", **cut},
    }


@cache
def _prepared(root: Path) -> Path:
    return prepare(tiny_card(tasks=planted_tasks()), root / "planted", levels=1, vocab_size=640).path


@cache
def _trained(root: Path) -> Path:
    def evaluator(blueprint, dataset, length):
        return TaskEvaluator(blueprint, dataset, CONFIG.mixture.tasks, length=length)

    return train(CONFIG, [_prepared(root)], root / "planted-run", make_evaluator=evaluator)


@pytest.fixture(scope="session")
def planted(tiny_root: Path) -> Path:
    """Folder of the dataset."""
    return _prepared(tiny_root)


@pytest.fixture(scope="session")
def planted_run(tiny_root: Path) -> Path:
    """A run of 120 steps on it, validated by its tasks. Never write into it."""
    return _trained(tiny_root)
