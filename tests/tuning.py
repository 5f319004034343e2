"""A small frozen backbone, and tasks of planted instances for it."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np

from m6rec_jax.config import ModelConfig
from m6rec_jax.model.depth import Backbone
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.training.tune.rows import TuneRows
from m6rec_jax.training.tune.run import TuneTask
from m6rec_jax.vocab import BOS, EOS, SPECIALS, Vocab

VOCAB = Vocab(240, (40,))
FIRST = 160  # the first id that stands for a word
SOURCE, END_SOURCE, TARGET, END_TARGET = (SPECIALS[name] for name in ("<source>", "</source>", "<target>", "</target>"))


@cache
def backbone(config: ModelConfig, seed: int = 0) -> Backbone:
    blueprint = Blueprint(config, VOCAB, 6)
    rng = np.random.default_rng(3)
    items = jax.device_put(item_table(rng.normal(size=(40, 6)), np.ones(40, bool)))
    return Backbone(blueprint, blueprint.init(seed), items, {"run": "runs/tiny", "step": 7})


def _sources(rng: np.random.Generator, n: int) -> list[np.ndarray]:
    made = []
    for _ in range(n):
        words = rng.integers(FIRST, FIRST + 4, rng.integers(3, 11))
        made.append(np.array([BOS, SOURCE, *words, END_SOURCE, TARGET, END_TARGET], np.int32))
    return made


def _bare(parts: list[np.ndarray]) -> list[np.ndarray]:
    return [np.full(len(part), -1, np.int32) for part in parts]


def options_rows(seed: int, n: int, options: int = 2) -> TuneRows:
    """The label is the share of the two high words of four, in `options` steps."""
    sources = _sources(np.random.default_rng(seed), n)
    share = np.array([(s[2:-3] >= FIRST + 2).mean() for s in sources])
    return TuneRows.with_options(sources, _bare(sources), np.minimum((share * options).astype(int), options - 1))


def options_task(name: str = "click", options: int = 2, n: int = 256) -> TuneTask:
    names = tuple(f"option {i}" for i in range(options))
    return TuneTask(name, names, options_rows(1, n, options), options_rows(2, 96, options), {"dataset": "planted"})


def texts_task(n: int = 128) -> TuneTask:
    """The answer repeats the first word of the source twice."""

    def rows(seed: int, n: int) -> TuneRows:
        sources = [s[:-1] for s in _sources(np.random.default_rng(seed), n)]
        answers = [np.array([s[2], s[2], EOS], np.int32) for s in sources]
        return TuneRows.with_texts(sources, _bare(sources), answers, _bare(answers))

    return TuneTask("repeat", (), rows(1, n), rows(2, 48), {"dataset": "planted"})
