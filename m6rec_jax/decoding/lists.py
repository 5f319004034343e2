"""Ranked lists of many users as arrays, filled lot by lot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m6rec_jax.decoding.wave import Lot


@dataclass(frozen=True)
class Lists:
    """Ranked lists of U users: `rows` int32 `[U, k]`, -1 where nothing is left to show.

    `scores` are log-probabilities, falling along a list; `model_logp` and `memory_logp` their two parts before the
    gate. `exact [U]`: nothing that was pruned could have been in the list. An item with several spellings is there once,
    with the score of the best one: of the best found, where a list is not exact.
    """

    rows: np.ndarray
    scores: np.ndarray
    model_logp: np.ndarray
    memory_logp: np.ndarray
    exact: np.ndarray

    @classmethod
    def empty(cls, users: int, k: int) -> Lists:
        """Nothing found yet."""
        scores, model_logp, memory_logp = (np.full((users, k), -np.inf, np.float32) for _ in range(3))
        return cls(np.full((users, k), -1, np.int32), scores, model_logp, memory_logp, np.zeros(users, bool))

    def put(self, lots: Sequence[Lot]) -> None:
        """Write what was found for some users; places past the catalogue stay empty."""
        for who, found in lots:
            n, width = len(who), found.rows.shape[1]
            for name in ("rows", "scores", "model_logp", "memory_logp"):
                getattr(self, name)[who, :width] = np.asarray(getattr(found, name))[:n]
            self.exact[who] = np.asarray(found.exact)[:n]

    def of(self, user: int) -> Lists:
        """The list of one user, as lists of one."""
        one = slice(user, user + 1)
        return Lists(self.rows[one], self.scores[one], self.model_logp[one], self.memory_logp[one], self.exact[one])

    def cut(self, k: int) -> Lists:
        """The first k places of each list."""
        places = lambda x, none: np.pad(x[:, :k], ((0, 0), (0, max(0, k - x.shape[1]))), constant_values=none)  # noqa: E731
        logs = [places(x, -np.inf) for x in (self.scores, self.model_logp, self.memory_logp)]
        return Lists(places(self.rows, -1), logs[0], logs[1], logs[2], self.exact)
