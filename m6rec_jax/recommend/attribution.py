"""What the model's word for an item rests on: each event of the history left out, the rest read again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from m6rec_jax.decoding.engine import Engine
from m6rec_jax.recommend.request import Request

EVENTS = 32  # of a history, the newest, are left out, one at a time


@dataclass(frozen=True)
class LeftOut:
    """How much an item's log-probability by the model falls without an event; below 0, it rises.

    `events` int32 `[U,EVENTS]`: places in each history, newest first, -1 = none; `read` bool `[U,EVENTS]`: the model
    reads the event; `drops` float32 `[U,k,EVENTS]`, 0 for an event that is not read and for an empty place of the list.
    """

    events: np.ndarray
    read: np.ndarray
    drops: np.ndarray


def leave_out(engine: Engine, asked: Request, rows: np.ndarray, temperature: float | np.ndarray = 1.0) -> LeftOut:
    """Leave each of the newest `EVENTS` events of each history out of it, for the items `rows [U,k]` (-1 = none).

    What is left is read as a history of its own: pauses join, and where the history is longer than the model reads an
    older event moves up. All of it, for all users, is scored in one call of the engine.
    """
    users, k = rows.shape
    events = np.full((users, EVENTS), -1, np.int32)
    read, drops = np.zeros((users, EVENTS), bool), np.zeros((users, k, EVENTS), np.float32)
    told = engine.prompts.read(asked.items, asked.times, asked.kinds, asked.queries)
    for u, (_, there) in enumerate(told):
        last = np.arange(len(asked.items[u]))[: -EVENTS - 1 : -1]
        events[u, : len(last)], read[u, : len(last)] = last, np.isin(last, there)
    listed = rows >= 0
    read_of = read & listed.any(1)[:, None]
    whole = np.flatnonzero(read_of.any(1))
    who, slot = np.nonzero(read_of)
    full, less = asked.take(whole), asked.without(who, events[who, slot])
    every = replace(
        full, items=[*full.items, *less.items],
        **{name: None if getattr(full, name) is None else [*getattr(full, name), *getattr(less, name)] for name in ("times", "kinds", "queries")},
    )  # fmt: skip
    owner = np.concatenate([whole, who])
    logp = engine.logp(
        every.items, [rows[u][listed[u]] for u in owner], times=every.times, kinds=every.kinds, queries=every.queries,
        temperature=np.broadcast_to(np.asarray(temperature, np.float32), users)[owner],
    )  # fmt: skip
    before = dict(zip(whole.tolist(), logp[: len(whole)], strict=True))
    for u, at, after in zip(who.tolist(), slot.tolist(), logp[len(whole) :], strict=True):
        drops[u, listed[u], at] = before[u] - after
    return LeftOut(events, read, drops)
