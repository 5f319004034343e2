"""Left to right: language modelling of text, next item of a behaviour (GPT, SASRec)."""

from __future__ import annotations

import numpy as np

from m6rec_jax.data.examples import Example, Sequence


def arrange_causal(example: Example, rng: np.random.Generator, mask_rate: float) -> Sequence:
    """Every position sees what came before and predicts the next predicted token.

    Context (pauses, kinds, queries) is stepped over: the event before it and its own last token both predict
    the item after it, so a history asks for its next item with and without knowing the pause. Items that are not to
    be predicted (a held-out example asks for its last ones only) are not stepped over.
    """
    tokens = np.concatenate([example.source, example.target])
    rows = np.concatenate([example.source_rows, example.target_rows])
    predict = np.concatenate([np.zeros(len(example.source), np.float32), example.predict])
    n = len(tokens) - 1
    following = np.where(predict > 0, np.arange(n + 1), n + 1)
    following = np.minimum.accumulate(following[::-1])[::-1][1:]  # next predicted token after each position
    exists = following <= n
    following = np.minimum(following, n)
    last_of_source = np.arange(n) == len(example.source) - 1
    items = np.cumsum(rows >= 0)
    nothing_between = items[np.maximum(following - 1, 0)] == items[:-1]
    asks = exists & (((predict[:-1] > 0) | last_of_source) & nothing_between | (predict[1:] > 0))
    weights = np.where(asks, predict[following], 0).astype(np.float32)
    return Sequence(tokens[:-1], tokens[following], np.arange(n, dtype=np.int32), weights, rows[:-1])
