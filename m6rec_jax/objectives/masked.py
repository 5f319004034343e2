"""Masked tokens (BERT) and span infilling (T5, M6)."""

from __future__ import annotations

import numpy as np

from m6rec_jax.data.examples import Example, Sequence, text_example
from m6rec_jax.objectives.seq2seq import arrange_seq2seq
from m6rec_jax.vocab import EOS, FILL, MASK, N_SPANS, SPAN_0

MEAN_SPAN = 3


def arrange_masked(example: Example, rng: np.random.Generator, mask_rate: float) -> Sequence:
    """Every position sees every other; a share of units (an item's whole spelling, a text token) is hidden.

    A hidden token loses its item features too (`item_rows = -1`).
    """
    tokens = np.concatenate([example.source, example.target])
    rows = np.concatenate([example.source_rows, example.target_rows])
    units = np.concatenate([np.full(len(example.source), -1), example.units])
    predict = np.concatenate([np.zeros(len(example.source), np.float32), example.predict])
    hidden = hidden_units(units, predict, rng, mask_rate)
    return Sequence(
        tokens=np.where(hidden, MASK, tokens).astype(np.int32),
        targets=np.where(hidden, tokens, 0).astype(np.int32),
        order=np.zeros(len(tokens), np.int32),
        weights=np.where(hidden, predict, 0).astype(np.float32),
        item_rows=np.where(hidden, -1, rows).astype(np.int32),
    )


def hidden_units(units: np.ndarray, predict: np.ndarray, rng: np.random.Generator, rate: float) -> np.ndarray:
    """Which tokens `[n]` belong to the share of units that is hidden: of those that are predicted, at least one."""
    choices = np.unique(units[(units >= 0) & (predict > 0)])
    n_hidden = min(len(choices), max(1, round(len(choices) * rate)))
    return np.isin(units, rng.choice(choices, n_hidden, replace=False)) if n_hidden else np.zeros(len(units), bool)


def infill_sizes(n: np.ndarray, mask_rate: float) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens of `n` are hidden, in how many spans (at least one token stays and one is hidden)."""
    noise = np.clip(np.round(n * mask_rate), 1, np.maximum(n - 1, 1)).astype(np.int64)
    spans = np.clip(np.round(noise / MEAN_SPAN), 1, np.minimum(N_SPANS, np.maximum(n - noise, 1))).astype(np.int64)
    return noise, spans


def arrange_infill(example: Example, rng: np.random.Generator, mask_rate: float) -> Sequence:
    """Spans of the target are replaced by sentinels in a bidirectional source and restored left to right
    (Raffel et al. 2020, section 3.1.4; M6's text infilling)."""
    text = example.target
    noise, spans = (int(x) for x in infill_sizes(np.array(len(text)), mask_rate))
    kept_lengths = _random_parts(len(text) - noise, spans, rng)
    noise_lengths = _random_parts(noise, spans, rng)
    source, target, at = [example.source], [], 0
    for i, (kept, hidden) in enumerate(zip(kept_lengths, noise_lengths, strict=True)):
        sentinel = np.array([SPAN_0 + i], np.int32)
        source += [text[at : at + kept], sentinel]
        target += [sentinel, text[at + kept : at + kept + hidden]]
        at += kept + hidden
    source.append(np.array([FILL], np.int32))
    target.append(np.array([EOS], np.int32))
    return arrange_seq2seq(text_example(np.concatenate(source), np.concatenate(target)), rng, mask_rate)


def _random_parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`total` cut into `parts` pieces of at least one, every cut equally likely; pieces may be 0 if total < parts."""
    if total < parts:
        return np.array([1] * total + [0] * (parts - total))
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1 if parts > 1 else np.array([], np.int64)
    return np.diff(np.concatenate([[0], cuts, [total]]))
