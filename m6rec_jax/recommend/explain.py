"""Why an item is in a list: what the memory brings and from where, and, apart from it, what the model's word rests on.

Nothing here chooses items: it looks again at lists that are made, and everything it says is plain enough for JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from m6rec_jax.decoding.requests import mass_of
from m6rec_jax.decoding.steps import Steps
from m6rec_jax.recommend.attribution import LeftOut, leave_out
from m6rec_jax.recommend.coldstart import GATE, TABLE
from m6rec_jax.recommend.lists import MEMORY, MODEL, Lists
from m6rec_jax.recommend.request import Request

if TYPE_CHECKING:
    from m6rec_jax.recommend.recommender import Recommender

MOST = 5  # history items, and events, told of for one item
OTHERS = 3  # codes told of beside each that was spelled
BLOCK = 64  # users looked at together: with each event left out, up to 33 histories a user

EXPLAINED: dict[str, pl.DataType] = {
    "memory_share": pl.Float64(),
    "evidence": pl.List(pl.Struct({"item_id": pl.String, "share": pl.Float64})),
    "attribution": pl.List(pl.Struct({"item_id": pl.String, "event": pl.Int32, "drop": pl.Float64})),
}  # fmt: skip
STEPS: dict[str, pl.DataType] = {
    "steps": pl.List(pl.Struct({
        "level": pl.Int32, "code": pl.Int32, "probability": pl.Float64, "place": pl.Int32, "choices": pl.Int32,
        "alternatives": pl.List(pl.Struct({"code": pl.Int32, "probability": pl.Float64, "item_id": pl.String})),
    })),
}  # fmt: skip
ROUTES = {line.route: line for line in TABLE}


def more_columns(explain: bool, show_steps: bool) -> dict[str, pl.DataType]:
    """The columns that `explained` adds to a table of lists."""
    return (EXPLAINED if explain else {}) | (STEPS if show_steps else {})


def explained(recommender: Recommender, asked: Request, lists: Lists, explain: bool = True, show_steps: bool = False) -> pl.DataFrame:  # fmt: skip
    """Of every listed item, in the order of `Recommender.table`, what was asked for of these columns:

    - `memory_share`: the share of the item's score that the memory brings; `evidence`: the history items behind that,
      each with its share of it, largest first;
    - `attribution`: the events (`event` counts from 0, the oldest) whose absence lowers the model's log-probability of
      the item most, and by how much (see `attribution.leave_out`); empty where no model made the list;
    - `steps`: code by code, its probability, its place among the choices that led to something that may be shown, and
      the likeliest others. The probabilities multiply to the model's part of the score. Empty where no model made it.

    `asked` is what the lists were made for. Memory is bounded by `BLOCK` users, whatever the number.
    """
    rows: list[dict[str, Any]] = []
    for start in range(0, len(lists.rows), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(lists.rows)))
        found: list[list[dict[str, Any]]] = [[] for _ in block]
        for route in dict.fromkeys(lists.routes[block].tolist()):
            users = block[lists.routes[block] == route]
            for u, items in zip(users, _of_route(recommender, asked.take(users), lists.of(users), explain, show_steps), strict=True):  # fmt: skip
                found[u - start] = items
        rows += [item for items in found for item in items]
    return pl.DataFrame(rows, schema=more_columns(explain, show_steps))


def _of_route(recommender: Recommender, asked: Request, lists: Lists, explain: bool, show_steps: bool) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    """The listed items of each user, all of one route, one after another."""
    line, seen, ids = ROUTES[str(lists.routes[0])], recommender.seen(asked), recommender.item_ids
    engine = recommender.engine if "model" in line.parts else None
    listed = lists.rows >= 0
    lists = replace(lists, rows=np.where(np.isin(lists.sources, (MODEL, MEMORY)), lists.rows, -1))  # others fill up
    shares, gate = np.zeros(lists.rows.shape), None
    if "memory" in line.needs:
        shares, gate = _memory_shares(recommender, asked, lists)
    heat, left, steps = recommender.heat(gate), None, None
    if engine is not None and explain:
        left = leave_out(engine, asked, lists.rows, heat)
    if engine is not None and show_steps:
        steps = engine.steps(
            asked.items, lists.rows, times=asked.times, kinds=asked.kinds, queries=asked.queries, temperature=heat,
            exclude=seen, allowed=asked.allowed, others=OTHERS,
            candidates=None if asked.candidates is None else asked.left(seen, asked.allowed),
        )  # fmt: skip
    for u, history in enumerate(asked.items):
        items: list[dict[str, Any]] = []
        for place in np.flatnonzero(listed[u]).tolist():
            item: dict[str, Any] = {}
            ranked = lists.rows[u, place] >= 0
            if explain:
                item["memory_share"] = float(shares[u, place])
                item["evidence"] = []
                if shares[u, place] > 0:
                    item["evidence"] = _evidence(recommender, history, int(lists.rows[u, place]))
                item["attribution"] = _attribution(left, u, place, history, ids) if left is not None and ranked else []
            if show_steps:
                item["steps"] = _told(steps, u, place, ids) if steps is not None and ranked else []
            items.append(item)
        yield items


def _memory_shares(recommender: Recommender, asked: Request, lists: Lists) -> tuple[np.ndarray, np.ndarray | None]:
    """What part of each item's score `[U,k]` the memory brings, and the gate where it stands beside a model."""
    memory, seen = recommender.memory, recommender.seen(asked)
    if GATE in ROUTES[str(lists.routes[0])].needs:
        support, gate = recommender.gated_support(asked.known, seen, asked.allowed, asked.candidates)
    else:
        assert memory is not None, "the route needs one"
        gate = None
        support = memory.support(asked.known, exclude=seen, allowed=asked.allowed, candidates=asked.candidates)
    assert support is not None, "the route needs a gate"
    mass = np.stack([mass_of(*one) for one in zip(lists.rows, support.rows, support.mass, strict=True)])
    mass *= 1.0 if gate is None else gate[:, None]
    scores = np.exp(np.where(mass > 0, lists.scores, 0), dtype=np.float64)
    return np.minimum(1, mass / scores), gate


def _evidence(recommender: Recommender, history: np.ndarray, row: int) -> list[dict[str, Any]]:
    """The history items behind the memory's mass of an item, and their shares of it."""
    behind = recommender.memory.evidence(history, row)[:MOST] if recommender.memory is not None else []
    return [{"item_id": recommender.item_ids[item], "share": share} for item, share in behind]


def _attribution(left: LeftOut, u: int, place: int, history: np.ndarray, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The events that the model reads and the item needs most; of equal ones the newer first. A query has no item."""
    there = np.flatnonzero(left.read[u])
    drops = left.drops[u, place, there]
    best = np.argsort(-drops, kind="stable")[:MOST]
    told = zip(left.events[u, there[best]].tolist(), drops[best].tolist(), strict=True)
    return [
        {"item_id": ids[history[event]] if history[event] >= 0 else None, "event": event, "drop": drop}
        for event, drop in told
    ]


def _told(steps: Steps, u: int, place: int, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The steps to one item, level 1 first."""
    p, other_p = np.exp(steps.logp[u, place], dtype=np.float64), np.exp(steps.other_logp[u, place], dtype=np.float64)
    told: list[dict[str, Any]] = []
    for level, code in enumerate(steps.codes[u, place].tolist()):
        others = zip(steps.other_codes[u, place, level].tolist(), other_p[level].tolist(), steps.other_rows[u, place, level].tolist(), strict=True)  # fmt: skip
        told.append({
            "level": level + 1, "code": code, "probability": float(p[level]),
            "place": int(steps.place[u, place, level]), "choices": int(steps.choices[u, place, level]),
            "alternatives": [
                {"code": other, "probability": chance, "item_id": ids[row] if row >= 0 else None}
                for other, chance, row in others
                if other >= 0
            ],
        })  # fmt: skip
    return told
