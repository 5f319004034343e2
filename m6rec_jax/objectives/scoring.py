"""Scoring by options: a bidirectional source, a candidate read left to right, an option at its end (M6-Rec)."""

from __future__ import annotations

import numpy as np

from m6rec_jax.data.examples import Example, Sequence
from m6rec_jax.objectives.seq2seq import arrange_seq2seq
from m6rec_jax.vocab import TARGET


def scoring_order(tokens: np.ndarray) -> np.ndarray:
    """Order of a prompt `[n]`: 0 for all before its last `<target>`, which opens the candidate and counts 1, 2, ..."""
    opens = np.flatnonzero(tokens == TARGET)
    first = int(opens[-1]) if len(opens) else len(tokens)
    return np.maximum(np.arange(len(tokens)) - first + 1, 0).astype(np.int32)


def arrange_scoring(example: Example, rng: np.random.Generator, mask_rate: float) -> Sequence:
    """`<s> <source> ... </source>` all see each other, `<target> candidate </target>` reads on left to right.

    The source's last token, `</target>`, predicts the first target token: the option.
    """
    made = arrange_seq2seq(example, rng, mask_rate)
    order = scoring_order(example.source)
    after = order[-1] + np.arange(1, len(example.target), dtype=np.int32)
    return Sequence(made.tokens, made.targets, np.concatenate([order, after]), made.weights, made.item_rows)
