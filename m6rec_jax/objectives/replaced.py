"""Replaced-token detection (ELECTRA, Clark et al. 2020): how an example is laid out. The losses are in `detection`."""

from __future__ import annotations

import numpy as np

from m6rec_jax.data.examples import Example, Sequence
from m6rec_jax.objectives.masked import hidden_units
from m6rec_jax.vocab import MASK


def arrange_replaced(example: Example, rng: np.random.Generator, replace_rate: float) -> Sequence:
    """Every position sees every other; `<mask>` stands in a share of units (an item's whole spelling, a text token).

    That is what the generator reads; the step puts what it proposes in their place before the model reads the row.
    `targets` say what stood at every position, and those that may be asked about have a weight.
    """
    tokens = np.concatenate([example.source, example.target]).astype(np.int32)
    rows = np.concatenate([example.source_rows, example.target_rows])
    units = np.concatenate([np.full(len(example.source), -1), example.units])
    predict = np.concatenate([np.zeros(len(example.source), np.float32), example.predict]).astype(np.float32)
    hidden = hidden_units(units, predict, rng, replace_rate) & (predict > 0)
    return Sequence(
        tokens=np.where(hidden, MASK, tokens).astype(np.int32),
        targets=tokens,
        order=np.zeros(len(tokens), np.int32),
        weights=predict,
        item_rows=np.where(hidden, -1, rows).astype(np.int32),
    )
