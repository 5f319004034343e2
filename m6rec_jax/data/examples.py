"""What builders hand to objectives, and objectives to packing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise, starmap

import numpy as np


@dataclass(frozen=True)
class Example:
    """A source, then a target (either may be empty). Arrays are one entry a token.

    `*_rows`: catalogue row on the token that completes a spelling, else -1. `predict`: loss weight of a target
    token; 0 = context that is read, not predicted. `units`: tokens hidden together by masking; -1 = never hidden.

    Of a retrieval: `item`, a number of the item that the target says (-1: none); `times`, how often training asks for it;
    `own`, numbers of items that are no wrong answers, the most frequent first.
    """

    source: np.ndarray
    source_rows: np.ndarray
    target: np.ndarray
    target_rows: np.ndarray
    predict: np.ndarray
    units: np.ndarray
    item: int = -1
    times: int = 1
    own: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sequence:
    """One segment of a packed row: `tokens, targets, order, weights, item_rows`, all `[n]` (DESIGN section 4).

    `targets[i]` is what position i must predict, counted with `weights[i]`; `order` never falls. `query`: tokens of the
    first of two segments, a query and an item side by side, whose `targets` are no tokens (objectives/retrieval); 0: one.
    """

    tokens: np.ndarray
    targets: np.ndarray
    order: np.ndarray
    weights: np.ndarray
    item_rows: np.ndarray
    query: int = 0

    @property
    def segments(self) -> tuple[slice, ...]:
        """Where its one or two segments lie."""
        cuts = [0, *([self.query] if self.query else []), len(self.tokens)]
        return tuple(starmap(slice, pairwise(cuts)))


@dataclass(frozen=True)
class Shift:
    """Where a dataset's own ids lie in a joint id space: code tokens (those from `text_end` on), item rows and options
    (from `codes_end` on) move up."""

    text_end: int = 0
    tokens: int = 0
    rows: int = 0
    codes_end: int = 0
    options: int = 0

    def moved(self, sequence: Sequence) -> Sequence:
        """The same segment in joint ids."""
        if not (self.tokens or self.rows or self.options):
            return sequence
        up = lambda ids: (ids + np.where(ids < self.text_end, 0, np.where(ids < self.codes_end, self.tokens, self.options))).astype(np.int32)  # noqa: E731  # fmt: skip
        rows = np.where(sequence.item_rows >= 0, sequence.item_rows + self.rows, -1).astype(np.int32)
        targets = sequence.targets if sequence.query else up(sequence.targets)
        return replace(sequence, tokens=up(sequence.tokens), targets=targets, item_rows=rows)


def text_example(source: np.ndarray, target: np.ndarray) -> Example:
    """An example of text (or bare code) tokens: no item features, every target token predicted and maskable."""
    none = lambda x: np.full(len(x), -1, np.int32)  # noqa: E731
    return Example(source, none(source), target, none(target), np.ones(len(target), np.float32), np.arange(len(target)))
