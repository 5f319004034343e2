"""What many users ask of a recommender, and the parts of it that some of them ask."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Request:
    """U users as a recommender answers them: their histories (`known`: the items alone), and what was asked for all."""

    items: list[np.ndarray]
    known: list[np.ndarray]
    k: int
    allowed: np.ndarray | None
    candidates: Sequence[np.ndarray] | None
    beams: int | None
    times: Sequence[np.ndarray] | None
    kinds: Sequence[np.ndarray] | None
    queries: Sequence[Mapping[int, np.ndarray]] | None
    memory: bool
    attributes: Sequence[Sequence[str]] | None
    users: Sequence[Hashable | None] | None

    def take(self, users: np.ndarray) -> Request:
        pick = lambda part: None if part is None else [part[u] for u in users]  # noqa: E731
        return replace(self, **{name: pick(getattr(self, name)) for name in ("items", "known", "candidates", "times", "kinds", "queries", "attributes", "users")})  # fmt: skip

    def without(self, users: np.ndarray, events: np.ndarray) -> Request:
        """These users, each without the event at one place of the history; a user may come often."""
        places = list(zip(users.tolist(), events.tolist(), strict=True))

        def cut(part: Sequence[np.ndarray] | None) -> list[np.ndarray] | None:
            return None if part is None else [np.delete(part[u], event) for u, event in places]

        items = [np.delete(self.items[u], event) for u, event in places]
        queries = None if self.queries is None else [
            {place - (place > event): text for place, text in self.queries[u].items() if place != event}
            for u, event in places
        ]  # fmt: skip
        return replace(
            self.take(users), items=items, known=[h[h >= 0] for h in items], times=cut(self.times),
            kinds=cut(self.kinds), queries=queries,
        )  # fmt: skip

    def own(self, catalogue: int) -> np.ndarray:
        """What the one user of the request may get, bool `[C]`."""
        assert self.candidates is not None and len(self.candidates) == 1
        given = np.zeros(catalogue, bool)
        given[self.candidates[0]] = True
        return given if self.allowed is None else given & self.allowed

    def left(self, seen: Sequence[np.ndarray] | None, inside: np.ndarray | None) -> list[np.ndarray]:
        """Each user's candidates without what they had and what a filter forbids."""
        given = [own if inside is None else own[inside[own]] for own in self.candidates or ()]
        return given if seen is None else [own[~np.isin(own, had)] for own, had in zip(given, seen, strict=True)]


def within_catalogue(history: np.ndarray, catalogue: int) -> np.ndarray:
    """A history whose rows outside the catalogue count as events without an item."""
    rows = np.asarray(history, np.int32)
    return np.where((rows >= 0) & (rows < catalogue), rows, -1)
