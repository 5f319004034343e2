"""The decoder that every system trains, the batches, and how its floating point operations are counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from m6rec_jax.config import ModelConfig, OptimConfig
from m6rec_jax.config.model import DType, Remat
from m6rec_jax.model.load import Blueprint
from m6rec_jax.vocab import SPECIALS, Vocab

PIECES, ROWS, LENGTH, BATCHES = 8192, 16, 256, 4
MODEL = ModelConfig(
    layers=6, width=256, heads=4, ffn=1024, dropout=0, embed_dropout=0, id_dropout=0, content=False, attention="xla"
)
OPTIM = OptimConfig(learning_rate=1e-4, warmup=0, final=1.0, label_smoothing=0)  # constant: what is timed is a step
SEED = 0


def blueprint(dtype: DType, remat: Remat = "none") -> Blueprint:
    """The decoder in this arithmetic. Beside its 8,192 text pieces it has one small code level, which no batch uses."""
    return Blueprint(replace(MODEL, dtype=dtype, remat=remat), Vocab(PIECES, (128,)), 1)


def token_batches() -> np.ndarray:
    """Ids int32 `[BATCHES, ROWS, LENGTH + 1]`: a token and the one after it, of words as frequent as words are."""
    rng = np.random.default_rng(SEED)
    often = 1 / (np.arange(PIECES - len(SPECIALS)) + 10.0)
    ids = rng.choice(len(often), (BATCHES, ROWS, LENGTH + 1), p=often / often.sum())
    return (ids + len(SPECIALS)).astype(np.int32)


def matmul_parameters() -> int:
    """Parameters that a token is multiplied by: layers, and the output table once (reading a row multiplies nothing)."""
    layer = 2 * MODEL.width**2 + 2 * MODEL.width * MODEL.n_kv * MODEL.head_dim + 3 * MODEL.width * MODEL.ffn_width
    return MODEL.layers * layer + PIECES * MODEL.width


def flops_per_token() -> float:
    """6 x matmul parameters + 12 x layers x width x length for attention (Chowdhery et al. 2022, appendix B): forward
    and backward, every key counted for every query, recomputation not counted."""
    return 6.0 * matmul_parameters() + 12.0 * MODEL.layers * MODEL.width * LENGTH


FORMULA = (
    f"a token = 6 x {matmul_parameters():,} matmul parameters + 12 x {MODEL.layers} layers x width {MODEL.width} x "
    f"{LENGTH} keys = {flops_per_token() / 1e6:.1f} MFLOP, recomputation not counted"
)
