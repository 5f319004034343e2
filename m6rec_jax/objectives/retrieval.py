"""Retrieval: a query and an item, each alone, whose vectors shall lie close (M6-Rec). The loss is in `contrast`."""

from __future__ import annotations

import numpy as np

from m6rec_jax.data.examples import Example, Sequence

OWN = 32  # items of a query's user that are kept from being wrong answers; more are forgotten


def arrange_retrieval(example: Example, rng: np.random.Generator, mask_rate: float) -> Sequence:
    """The source, bidirectional, and the target, left to right, as two segments that do not see each other.

    A vector is made of each (`contrast.counted`). What the loss must know of them stands in `targets`, at positions that
    predict nothing: at the item's end its number plus one (0: none); at the query's end, which alone has a weight, how
    often training asks for the item; before it, from there backwards, numbers plus one of items of the query's own.
    """
    n, m = len(example.source), len(example.target)
    own = np.asarray(example.own[: min(OWN, n - 1)], np.int32)
    targets, weights = np.zeros(n + m, np.int32), np.zeros(n + m, np.float32)
    targets[n - 1 - len(own) : n - 1] = own[::-1] + 1
    targets[n - 1], weights[n - 1] = max(example.times, 1), 1.0
    targets[-1] = example.item + 1
    order = np.concatenate([np.zeros(n, np.int32), np.arange(1, m + 1, dtype=np.int32)])
    tokens = np.concatenate([example.source, example.target])
    return Sequence(tokens, targets, order, weights, np.concatenate([example.source_rows, example.target_rows]), n)
