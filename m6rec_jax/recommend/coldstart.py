"""Which way a request takes when something is missing: no history, no model (one table, read from top to bottom).

A way names the parts that make the list, in order: the first ranks, the next ones fill the places it leaves empty.
Popularity closes every way, so a list is short only when the catalogue is used up.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from m6rec_jax.errors import InputError

PARTS = ("model", "memory", "item-knn", "popularity")  # what can rank
# What carried an item; index = code in arrays. Item-kNN counts as memory: both are what others did, and the route says
# which of the two it was.
SOURCES = ("none", "model", "memory", "popularity")
ENGINES = ("auto", "model", "memory", "popularity")


@dataclass(frozen=True)
class Way:
    """One line of the table: taken when the request is `known` (has a catalogue item) and every `needs` is there."""

    route: str
    known: bool
    needs: tuple[str, ...]
    parts: tuple[str, ...]


TABLE = (
    Way("model+memory", True, ("model", "memory"), ("model", "popularity")),  # memory joins inside the beam search
    Way("model", True, ("model",), ("model", "popularity")),
    Way("memory", True, ("memory",), ("memory", "item-knn", "popularity")),
    Way("item-knn", True, ("item-knn",), ("item-knn", "popularity")),
    Way("popularity", True, (), ("popularity",)),
    Way("popularity", False, (), ("popularity",)),
)


def way(known: bool, available: Collection[str], engine: str = "auto") -> Way:
    """The way of a request: `known` = its history holds a catalogue item; `available` = the parts that can be used.

    `engine` narrows the choice: model (never cold parts first), memory (no model), popularity (nothing else).
    Raises InputError when the engine is unknown, or is `model` and there is none.
    """
    if engine not in ENGINES:
        raise InputError(f"engine={engine}: unknown; one of {', '.join(ENGINES)}")
    if engine == "model" and "model" not in available:
        raise InputError("engine=model: no usable checkpoint in this run; finish training, or take engine=auto")
    barred = {"memory": {"model"}, "popularity": set(PARTS) - {"popularity"}}.get(engine, set())
    usable = set(available) - barred
    for line in TABLE:
        if line.known == known and usable.issuperset(line.needs):
            return Way(line.route, known, line.needs, tuple(p for p in line.parts if p in usable or p == "popularity"))
    raise AssertionError("the table answers every request")
