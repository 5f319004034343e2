"""Histories of catalogue rows as the prefixes that a model reads: <s>, then the newest whole events that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from m6rec_jax.data.history import spell_history
from m6rec_jax.decoding.shapes import Prompt
from m6rec_jax.vocab import BOS, GAPS, SPECIALS, Vocab

GAP_TOKENS = np.array([SPECIALS[name] for name, _ in GAPS])

Queries = Mapping[int, np.ndarray]
Parts = Sequence[np.ndarray | None] | None  # one array a history, or none


@dataclass(frozen=True)
class Prompts:
    """How a dataset spells its histories: `codes [C, L]`, `timed` and `n_kinds` as `spell_history` takes them.

    `length`: tokens of the longest prefix, <s> included.
    """

    vocab: Vocab
    codes: np.ndarray
    timed: bool = False
    n_kinds: int = 0
    length: int = 256

    @property
    def event(self) -> int:
        """Most tokens of an event with an item: pause, kind, codes."""
        return self.codes.shape[1] + int(self.timed) + int(self.n_kinds > 1)

    def __call__(
        self, histories: Sequence[np.ndarray], times: Parts = None, kinds: Parts = None,
        queries: Sequence[Queries | None] | None = None,
    ) -> list[Prompt]:  # fmt: skip
        """The prefix of each history (oldest event first, -1 = an event without an item).

        Raises ValueError when a row is outside the catalogue.
        """
        return [prompt for prompt, _ in self.read(histories, times, kinds, queries)]

    def read(
        self, histories: Sequence[np.ndarray], times: Parts = None, kinds: Parts = None,
        queries: Sequence[Queries | None] | None = None,
    ) -> list[tuple[Prompt, np.ndarray]]:  # fmt: skip
        """The prefix of each history, and the places in it of the events that it holds, oldest first."""
        made = []
        for u, history in enumerate(histories):
            at = lambda part, u=u: None if part is None or part[u] is None else np.asarray(part[u])  # noqa: E731
            asked = (queries[u] if queries else None) or {}
            (tokens, rows), events = self._spell(np.asarray(history), at(times), at(kinds), asked)
            made.append(((np.insert(tokens, 0, BOS), np.insert(rows, 0, -1)), events))
        return made

    def _spell(
        self, items: np.ndarray, times: np.ndarray | None, kinds: np.ndarray | None, queries: Queries
    ) -> tuple[Prompt, np.ndarray]:
        if items.max(initial=-1) >= len(self.codes):
            raise ValueError(f"history: row {items.max()} is outside the catalogue of {len(self.codes)} items")
        room = self.length - 1
        told = items >= 0  # neither an item nor a query: nothing to spell
        told[[p for p in queries if p < len(items)]] = True
        events = np.flatnonzero(told)[-room:] if room else np.zeros(0, np.int64)

        def spelled(events: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            pick = lambda part: None if part is None else part[events]  # noqa: E731
            asked = {i: queries[e] for i, e in enumerate(events.tolist()) if e in queries} if queries else {}
            return spell_history(
                self.vocab, self.codes, items[events], pick(times), pick(kinds), self.timed, self.n_kinds, asked
            )

        tokens, rows, event = spelled(events)
        if len(tokens) > room:
            start = np.minimum(np.searchsorted(event, np.arange(len(events))), len(tokens) - 1)
            left = len(tokens) - start - np.isin(tokens[start], GAP_TOKENS)  # the first event has no pause before it
            events = events[left <= room]
            tokens, rows, _ = spelled(events)
        return (tokens, rows), events
