"""Tiny random models over tiny catalogues, made once."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from m6rec_jax.config import ModelConfig
from m6rec_jax.data.tokenizer import Tokenizer, train_tokenizer
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import Transformer
from m6rec_jax.vocab import SPECIALS, Vocab

CATALOGUE = 90
PIECES = len(SPECIALS) + 40


@dataclass(frozen=True)
class World:
    """A model, its engine, and histories of several lengths (an empty one among them)."""

    engine: Engine
    model: Transformer
    histories: list[np.ndarray]

    known: dict[tuple[bytes, float], np.ndarray] = field(default_factory=dict)

    def logp(self, history: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """The slow reference: log-probability of every item after a history, one full forward an item `[C]`."""
        key, every = (history.tobytes(), temperature), np.arange(self.engine.catalogue)
        if key not in self.known:
            self.known[key] = self.engine.score([history] * len(every), every, temperatures=[temperature])[:, 0]
        return self.known[key]


def random_codes(rng: np.random.Generator, levels: int, codebook: int, catalogue: int = CATALOGUE) -> np.ndarray:
    if levels == 1:
        return np.arange(catalogue, dtype=np.int32)[:, None]
    spellings = rng.choice(codebook**levels, catalogue, replace=False)
    return np.stack(np.unravel_index(spellings, (codebook,) * levels), 1).astype(np.int32)


@cache
def world(levels: int, layers: int = 2) -> World:
    rng = np.random.default_rng(levels)
    codes = random_codes(rng, levels, 6)
    vocab = Vocab(PIECES, (CATALOGUE,) if levels == 1 else (6,) * levels)
    model = random_model(rng, vocab, layers)
    content = rng.normal(size=(CATALOGUE, 5)).astype(np.float32)
    engine = Engine(model, codes, content, rng.random(CATALOGUE) < 0.8, length=48)
    histories = [rng.integers(CATALOGUE, size=n).astype(np.int32) for n in (0, 1, 3, 12, 7, 26, 5, 2)]
    return World(engine, model, histories)


def random_model(rng: np.random.Generator, vocab: Vocab, layers: int = 2) -> Transformer:
    """Weights drawn wide, so that probabilities differ by much, and by NumPy: nothing to compile."""
    blueprint = Blueprint(ModelConfig(layers=layers, width=16, heads=2, kv_heads=1), vocab, 5)
    return blueprint.bind(jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), blueprint.shapes()))


@cache
def tokenizer() -> Tokenizer:
    """Pieces of Chinese and of English, and bytes for all else (most of Chinese among it)."""
    texts = ["小米手机 红色鞋子 很好用", "red shoes 小米手机", "你好 世界 手机", "good coffee mug 棉质T恤"] * 5
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer(texts, Path(folder) / "tokenizer.model", 520)


def text_engine(slots: int, seed: int = 5, devices: int = 1) -> Engine:
    """An engine that writes texts, from a random model of `seed`, on so many devices."""
    rng = np.random.default_rng(seed)
    model = random_model(rng, Vocab(tokenizer().size, (6, 6, 6)))
    content = rng.normal(size=(CATALOGUE, 5)).astype(np.float32)
    codes = random_codes(rng, 3, 6)
    return Engine(
        model, codes, content, np.ones(CATALOGUE, bool), length=48, tokenizer=tokenizer(), slots=slots,
        devices=jax.local_devices()[:devices],
    )  # fmt: skip
