"""Bidirectional source, causal target (T5, UniLM, M6)."""

from __future__ import annotations

import numpy as np

from m6rec_jax.data.examples import Example, Sequence


def arrange_seq2seq(example: Example, rng: np.random.Generator, mask_rate: float) -> Sequence:
    """The source, whose tokens all share order 0, then the target counting up from 1.

    The last source token (the task's marker) predicts the first target token.
    """
    n_source, n_target = len(example.source), len(example.target)
    tokens = np.concatenate([example.source, example.target[:-1]])
    rows = np.concatenate([example.source_rows, example.target_rows[:-1]])
    order = np.concatenate([np.zeros(n_source, np.int32), np.arange(1, n_target, dtype=np.int32)])
    before = n_source - 1
    targets = np.concatenate([np.zeros(before, np.int32), example.target])
    weights = np.concatenate([np.zeros(before, np.float32), example.predict])
    return Sequence(tokens, targets, order, weights, rows)
