"""The one setting of the benchmark: a model of 6.6 million parameters, a catalogue, users; and how they are laid out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.decoding.work import Work
from m6rec_jax.config import ModelConfig
from m6rec_jax.data.history import spell_history
from m6rec_jax.model.export import llama
from m6rec_jax.model.load import Blueprint
from m6rec_jax.vocab import BOS, Vocab

CATALOGUE = 12_101
LEVELS, CODEBOOK = 4, 256
EVENTS = 50  # of 4 tokens each, and <s>: prefixes of 201 tokens
USERS = 256
# Without item content, which a Llama cannot read.
BLUEPRINT = Blueprint(
    ModelConfig(layers=6, width=256, heads=4, dropout=0, embed_dropout=0, id_dropout=0, content=False),
    Vocab(6016, (CODEBOOK,) * LEVELS),
    1,
)
SEED = 0


def lay_out(folder: Path) -> Work:
    """Draw weights, catalogue and users, always the same; write what every system reads into `folder`.

    `params.npz`: our parameters; `llama.npz` and `llama/config.json`: the same model for others; `work.npz`: the rest.
    """
    params = jax.tree.map(np.asarray, BLUEPRINT.init(SEED))
    described, tensors = llama(BLUEPRINT, params, positions=512)
    (folder / "llama").mkdir(parents=True, exist_ok=True)
    (folder / "llama" / "config.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
    np.savez(folder / "llama.npz", **tensors)
    np.savez(folder / "params.npz", **dict(_flat(params)))

    rng = np.random.default_rng(SEED)
    codes = spellings(rng, CATALOGUE)
    histories = rng.integers(0, CATALOGUE, (USERS, EVENTS)).astype(np.int32)
    vocab = BLUEPRINT.vocab
    prefixes = np.array([[BOS, *spell_history(vocab, codes, h)[0]] for h in histories], np.int32)
    offsets, sizes = (np.array([getattr(s, name) for s in vocab.levels]) for name in ("offset", "size"))
    work = Work(folder, codes, offsets, sizes, histories, prefixes)
    work.save()
    return work


def load_params(folder: Path) -> dict[str, Any]:
    """The nested parameters that `lay_out` wrote."""
    nested: dict[str, Any] = {}
    with np.load(folder / "params.npz", allow_pickle=False) as file:
        for name in file.files:
            *path, last = name.split("/")
            at = nested
            for part in path:
                at = at.setdefault(part, {})
            at[last] = file[name]
    return nested


def spellings(rng: np.random.Generator, items: int) -> np.ndarray:
    """Codes int32 `[items, LEVELS]` as residual k-means leaves them: some clusters are crowded, the last level only
    tells apart what the others spell alike."""
    crowd = 1 / (np.arange(CODEBOOK) + 16.0)
    codes = np.stack([rng.choice(CODEBOOK, items, p=crowd / crowd.sum()) for _ in range(LEVELS)], axis=1)
    codes[:, 1:-1] = (codes[:, 1:-1] + 37 * codes[:, :1]) % CODEBOOK  # which ones are crowded differs by parent
    _, cell = np.unique(codes[:, :-1], axis=0, return_inverse=True)
    order = np.argsort(cell, kind="stable")
    first = np.searchsorted(cell[order], cell[order])
    codes[order, -1] = np.arange(items) - first
    return codes.astype(np.int32)


def _flat(tree: dict[str, Any], path: str = "") -> list[tuple[str, np.ndarray]]:
    parts = []
    for name, value in tree.items():
        parts += _flat(value, f"{path}{name}/") if isinstance(value, dict) else [(path + name, value)]
    return parts
