"""Which way a request takes when something is missing: no history, no model (one table, read from top to bottom).

A way names the parts that make the list, in order: the first ranks, the next ones fill the places it leaves empty.
Popularity closes every way, so a list is short only when the catalogue is used up. `diagram` and `table` draw the
table for docs/routing.md.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from m6rec_jax.errors import InputError

# What can rank. `segment`: popularity among users of the same attributes; `popularity`: among all, lately.
PARTS = ("model", "memory", "item-knn", "segment", "popularity")
GATE = "gate"  # how far to trust the memory beside the model; without one the model answers alone
# What carried an item; index = code in arrays. Item-kNN counts as memory: both are what others did, and the route says
# which of the two it was. So it is with the segment and popularity.
SOURCES = ("none", "model", "memory", "popularity")
ENGINES = ("auto", "model", "memory", "popularity")
# What a request comes with, the first that is true of it.
ASKS = {
    "history": "events of a known user",
    "session": "session events of an unknown user",
    "attributes": "attributes of a user without events",
    "nothing": "nothing that is known",
}


@dataclass(frozen=True)
class Way:
    """One line of the table: taken when the request comes with `asks` and every one of `needs` is there."""

    route: str
    asks: str
    needs: tuple[str, ...]
    parts: tuple[str, ...]


TABLE = (
    Way("model+memory", "history", ("model", "memory", GATE), ("model", "popularity")),  # memory joins in the beam search
    Way("model", "history", ("model",), ("model", "popularity")),
    Way("memory", "history", ("memory",), ("memory", "item-knn", "popularity")),
    Way("item-knn", "history", ("item-knn",), ("item-knn", "popularity")),
    Way("popularity", "history", (), ("popularity",)),
    Way("session-memory", "session", ("memory",), ("memory", "item-knn", "segment", "popularity")),
    Way("session-item-knn", "session", ("item-knn",), ("item-knn", "segment", "popularity")),
    Way("popularity", "session", (), ("popularity",)),
    Way("segment", "attributes", ("segment",), ("segment", "popularity")),
    Way("popularity", "attributes", (), ("popularity",)),
    Way("popularity", "nothing", (), ("popularity",)),
)  # fmt: skip


def way(asks: str, available: Collection[str], engine: str = "auto") -> Way:
    """The way of a request that comes with `asks` (a key of ASKS); `available`: the parts, and the gate, there are.

    `engine` narrows the choice: model (reads sessions too; never cold parts first), memory (no model), popularity
    (within the segment, or of all). Raises InputError when the engine is unknown, or is `model` and there is none.
    """
    if engine not in ENGINES:
        raise InputError(f"engine={engine}: unknown; one of {', '.join(ENGINES)}")
    if engine == "model":
        if "model" not in available:
            raise InputError("engine=model: no usable checkpoint in this run; finish training, or take engine=auto")
        asks = "history" if asks == "session" else asks
    barred = {"memory": {"model"}, "popularity": {"model", "memory", "item-knn"}}.get(engine, set())
    usable = set(available) - barred
    for line in TABLE:
        if line.asks == asks and usable.issuperset(line.needs):
            return replace(line, parts=tuple(p for p in line.parts if p in usable or p == "popularity"))
    raise AssertionError("the table answers every request")


def diagram() -> str:
    """TABLE as a Mermaid flow chart: what a request comes with, what is there, which parts make the list."""
    lines = ["flowchart TD", "  request([request]) --> history"]
    asks = list(ASKS)
    for place, kind in enumerate(asks):
        ways = [line for line in TABLE if line.asks == kind]
        if place + 1 < len(asks):
            lines.append(f'  {kind}{{"{ASKS[kind]}?"}} -- yes --> {kind}1')
            lines.append(f"  {kind} -- no --> {asks[place + 1] if place + 2 < len(asks) else f'{asks[-1]}1'}")
        for number, line in enumerate(ways, 1):
            made = f'["<b>{line.route}</b><br/>{", then ".join(line.parts)}"]'
            if line.needs:
                lines.append(
                    f'  {kind}{number}{{"{" and ".join(line.needs)} there?"}} -- yes --> {kind}{number}w{made}'
                )
                lines.append(f"  {kind}{number} -- no --> {kind}{number + 1}")
            else:
                lines.append(f"  {kind}{number}{made}")
    return "\n".join(lines)


def table() -> str:
    """TABLE in Markdown, a line a way."""
    head = "| the request comes with | and there is | `route` | the list is made by |\n|---|---|---|---|"
    rows = [
        f"| {ASKS[line.asks]} | {', '.join(line.needs) or 'none of it'} | `{line.route}` | {', then '.join(line.parts)} |"
        for line in TABLE
    ]
    return "\n".join([head, *rows])


if __name__ == "__main__":
    print(f"{table()}\n\n```mermaid\n{diagram()}\n```")
