"""The parts of a recommender, and how each way through them makes a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from m6rec_jax.decoding.engine import Engine
from m6rec_jax.recommend.baselines import ItemKNN, Popularity
from m6rec_jax.recommend.coldstart import Way
from m6rec_jax.recommend.gate import Gate
from m6rec_jax.recommend.lists import MEMORY, MODEL, NONE, POPULARITY, Lists, appended, continued, of_memory
from m6rec_jax.recommend.memory import Memory, Support
from m6rec_jax.recommend.request import Request
from m6rec_jax.recommend.reranking import Rules, kept
from m6rec_jax.recommend.segments import Segments


class Ranker:
    """Model, memory and its gate, item-kNN, segments, popularity, and the catalogue they speak of; some may be missing.

    `repeat`: whether an item may be listed for who had it.
    """

    def __init__(self, items: pl.DataFrame, *, memory: Memory | None, engine: Engine | None, gate: Gate | None,
                 knn: ItemKNN | None, segments: Segments | None, repeat: bool) -> None:  # fmt: skip
        self.items, self.memory, self.engine, self.gate, self.knn = items, memory, engine, gate, knn
        self.segments, self.repeat = segments, repeat
        self.popularity = Popularity.of(items) if segments is None else segments.popularity

    @property
    def catalogue(self) -> int:
        return self.items.height

    @property
    def parts(self) -> set[str]:
        """Which parts of `coldstart.PARTS` this recommender has."""
        there = {"model": self.engine, "memory": self.memory, "item-knn": self.knn, "segment": self.segments, "popularity": self.popularity}  # fmt: skip
        return {name for name, part in there.items() if part is not None}

    def lists(self, line: Way, part: Request, rules: Rules | None) -> Lists:
        """The lists of some users, who all take this way."""
        if rules is None:
            return self._ranked(line, part)

        def ask(users: np.ndarray, width: int, within: np.ndarray | None) -> Lists:
            return self._ranked(line, replace(part.take(users), k=width), within)

        had = [np.zeros(0, np.int32)] * len(part.known) if self.repeat else part.known
        return kept(rules, ask, had, part.k)

    def _ranked(self, line: Way, part: Request, within: np.ndarray | None = None) -> Lists:
        """The best items of some users by their scores, part after part until the lists are full.

        Of all that may be shown, or of those `within` bool `[C]`, in the same order.
        """
        seen, users = self.seen(part), len(part.known)
        if part.candidates is not None and line.parts[0] != "model":
            part = replace(part, allowed=part.own(self.catalogue), candidates=None)
        inside = part.allowed if within is None else within if part.allowed is None else within & part.allowed
        lists = Lists.empty(users, part.k)
        for name in line.parts:
            if name == "model" and self.engine is not None:
                lists = self._by_model(self.engine, part, seen, inside, within)
                if part.candidates is not None:
                    break  # it scores them all
            elif name == "memory" and self.memory is not None:
                support = self.memory.support(part.known, exclude=seen, allowed=part.allowed)
                support = support if within is None else support.within(within)
                lists = of_memory(support.rows, support.mass, part.k)
            elif (lists.rows < 0).any():
                rows, share = lists.rows, None
                if name == "item-knn" and self.knn is not None:
                    rows = appended(rows, self.knn.rank(part.known, part.k, self.repeat), inside)
                elif name == "segment" and self.segments is not None:
                    about = part.attributes or [()] * users
                    rows, share = self.segments.fill(rows, part.known, about, self.repeat, inside)
                else:
                    rows = self.popularity.fill(rows, part.known, self.repeat, inside)
                share = self.popularity.share[np.maximum(rows, 0)] if share is None else share
                lists = continued(lists, rows, MEMORY if name == "item-knn" else POPULARITY, share)
        return replace(lists, routes=np.full(users, line.route, object))

    def _by_model(self, engine: Engine, part: Request, seen: list[np.ndarray] | None, inside: np.ndarray | None,
                  within: np.ndarray | None) -> Lists:  # fmt: skip
        support, gate = (
            self.gated_support(part.known, seen, part.allowed, part.candidates) if part.memory else (None, None)
        )
        heat = self.heat(gate)
        whole = np.zeros(len(part.known))
        if support is not None and within is not None:
            # The engine renormalises the memory over what it may list; for the scores of a longer list the gate takes
            # the mass that stays: (1-g) p + g m = w ((1-g') p + g' m / s) with s = sum m, w = 1-g + g s, g' = g s / w.
            support = support.within(within)
            stays = support.mass.sum(1, dtype=np.float64)
            left = 1 - gate + gate * stays
            gate, whole = (gate * stays / left).astype(np.float32), np.log(left)
        options: dict[str, Any] = {
            "times": part.times, "kinds": part.kinds, "queries": part.queries, "gate": gate, "temperature": heat,
            "memory": None if support is None else (support.rows, support.mass),
        }  # fmt: skip
        if part.candidates is None:
            found = engine.recommend(
                part.items, users=part.users, k=part.k, beams=part.beams, exclude=seen, allowed=inside, **options
            )
        else:
            found = engine.rank(part.items, part.left(seen, inside), **options).cut(part.k)
        carried = np.full(found.rows.shape, MODEL, np.uint8)
        if gate is not None:
            with np.errstate(divide="ignore"):
                by_memory = np.log(gate)[:, None] + found.memory_logp
                by_model = np.log1p(-gate)[:, None] + found.model_logp
            carried[by_memory > by_model] = MEMORY
        sources = np.where(found.rows >= 0, carried, NONE).astype(np.uint8)
        scores = found.scores if within is None else (found.scores + whole[:, None]).astype(np.float32)
        return Lists(found.rows, scores, sources, np.full(len(found.rows), "", object), found.exact)

    def seen(self, part: Request) -> list[np.ndarray] | None:
        """What each user had and shall not get again."""
        return None if self.repeat else part.known

    def heat(self, gate: np.ndarray | None) -> float | np.ndarray:
        """What the model's logits are divided by, beside a memory of shares `gate [U]`."""
        return 1.0 if gate is None or self.gate is None else self.gate.heat(gate)

    def gated_support(self, known: Sequence[np.ndarray], exclude: Sequence[np.ndarray] | None,
                      allowed: np.ndarray | None = None, candidates: Sequence[np.ndarray] | None = None
                      ) -> tuple[Support | None, np.ndarray | None]:  # fmt: skip
        """The memory's support for histories and the share g `[U]` it is given; (None, None) without a gate."""
        if self.memory is None or self.gate is None:
            return None, None
        support = self.memory.support(known, exclude=exclude, allowed=allowed, candidates=candidates)
        return support, self.gate(np.array([len(h) for h in known]), support.total)
