"""Objectives: how an example is laid out and what is predicted. One registry, one signature.

An objective is a pure function of (example, rng, mask rate); every one of them but retrieval (`objectives.contrast`) and
replaced (`objectives.detection`) is trained by the same cross-entropy (`objectives.loss`). Others join by the entry point group `m6rec_jax.objectives`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from m6rec_jax.data.examples import Example, Sequence
from m6rec_jax.objectives.causal import arrange_causal
from m6rec_jax.objectives.masked import arrange_infill, arrange_masked, infill_sizes
from m6rec_jax.objectives.replaced import arrange_replaced
from m6rec_jax.objectives.retrieval import arrange_retrieval
from m6rec_jax.objectives.scoring import arrange_scoring
from m6rec_jax.objectives.seq2seq import arrange_seq2seq
from m6rec_jax.plugins import load_points

Sizes = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


@dataclass(frozen=True)
class Objective:
    """`arrange(example, rng, mask_rate)` lays an example out as one segment, or as the two of a retrieval.

    `length(n_source, n_target, mask_rate)` and `predicted(...)` say, for many examples at once, how many positions
    that takes and how many targets it has, so that rows are planned without building them. `by_chance`: whether
    `arrange` uses `rng`; an example that nothing changes is arranged once.
    """

    name: str
    arrange: Callable[[Example, np.random.Generator, float], Sequence]
    length: Sizes
    predicted: Sizes
    by_chance: bool = True


def _infill_length(n_source: np.ndarray, n_target: np.ndarray, rate: float) -> np.ndarray:
    _, spans = infill_sizes(n_target, rate)
    return n_source + n_target + 2 * spans + 1


def _infill_predicted(n_source: np.ndarray, n_target: np.ndarray, rate: float) -> np.ndarray:
    noise, spans = infill_sizes(n_target, rate)
    return noise + spans + 1


BUILT_IN = (
    Objective("causal", arrange_causal, lambda s, t, r: s + t - 1, lambda s, t, r: t, by_chance=False),
    Objective("seq2seq", arrange_seq2seq, lambda s, t, r: s + t - 1, lambda s, t, r: t, by_chance=False),
    Objective("masked", arrange_masked, lambda s, t, r: s + t, lambda s, t, r: np.maximum(1, np.round(t * r))),
    Objective("scoring", arrange_scoring, lambda s, t, r: s + t - 1, lambda s, t, r: t, by_chance=False),
    Objective("retrieval", arrange_retrieval, lambda s, t, r: s + t, lambda s, t, r: np.ones_like(t), by_chance=False),
    Objective("replaced", arrange_replaced, lambda s, t, r: s + t, lambda s, t, r: t),
    Objective("infill", arrange_infill, _infill_length, _infill_predicted),
)


def objectives() -> dict[str, Objective]:
    """Every objective by name, those of other packages included.

    Raises InputError when two have one name.
    """
    return load_points("m6rec_jax.objectives", BUILT_IN)
