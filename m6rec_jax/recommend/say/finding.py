"""Real items for a text: those whose own texts say most of it, and of equals those that the model spells after it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import scipy.sparse as sp

from m6rec_jax.data.features import TfidfEncoder, item_texts
from m6rec_jax.data.tasks import SAID_ROOM
from m6rec_jax.data.tokenizer import Tokenizer
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.vocab import ITEM, SPELL

SPELLED = 50  # items that the model spells for a text, by which equals are told apart
BLOCK = 64  # texts compared with the catalogue at a time
EQUAL = 1e-3  # similarities nearer than this are equal


@dataclass(frozen=True)
class Finder:
    """`spells`: the model has learnt to translate texts into codes."""

    items: pl.DataFrame
    encoder: TfidfEncoder
    engine: Engine
    tokenizer: Tokenizer
    spells: bool

    @cached_property
    def weights(self) -> sp.csr_array:
        """TF-IDF of the texts of the catalogue `[C, t]`, unit rows."""
        return self.encoder.weigh(item_texts(self.items))

    def find(self, texts: Sequence[str], k: int, exclude: Sequence[np.ndarray], allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """(the k rows nearest to each text `[n, k]`, -1 = none is left; their cosine `[n, k]`), of those `allowed` bool `[C]`
        and not in `exclude`."""
        n, C = len(texts), self.items.height
        rows, alike = np.full((n, k), -1, np.int64), np.zeros((n, k))
        place = np.full((n, C), SPELLED, np.int32)
        if self.spells and n:
            asked = [[SPELL, *self.tokenizer.encode(text)[: self._room], ITEM] for text in texts]
            lists = self.engine.spell(asked, min(SPELLED, C), exclude=exclude, allowed=allowed, both_ways=True)
            owner, at = np.nonzero(lists.rows >= 0)
            place[owner, lists.rows[owner, at]] = at
        for start in range(0, n, BLOCK):
            some = [_as_item(text) for text in texts[start : start + BLOCK]]
            cosine = (self.weights @ self.encoder.weigh(some).T).toarray().T
            for i, own in enumerate(cosine, start):
                may = np.ones(C, bool) if allowed is None else allowed.copy()
                may[np.asarray(exclude[i], np.int64)] = False
                there = np.flatnonzero(may)
                best = there[np.lexsort((there, place[i, there], -np.round(own[there] / EQUAL)))][:k]
                rows[i, : len(best)], alike[i, : len(best)] = best, own[best]
        return rows, alike

    def alike(self, text: str, rows: Sequence[int]) -> list[float]:
        """The cosine of a text and those of some catalogue rows."""
        return (
            (self.weights[list(rows)] @ self.encoder.weigh([_as_item(text)]).T).toarray()[:, 0].tolist() if rows else []
        )

    @property
    def _room(self) -> int:
        return min(SAID_ROOM, self.engine.prompts.length - self.engine.codes.shape[1] - 2)


def _as_item(text: str) -> str:
    """A text as texts of items are laid out: an empty title, then a line each for what stands between commas."""
    return "\n".join(["", *(part.strip() for part in re.split(r"[,;:.，；：、。]", text) if part.strip()), text])
