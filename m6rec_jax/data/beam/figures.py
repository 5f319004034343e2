"""The figures of the quality report from sums over ranges: the same numbers as those of one table of events.

The launcher holds a number a user and a few an item; order statistics of times are found by counting in ever
narrower bins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from m6rec_jax.data.beam.ranges import activity_of, count_windows
from m6rec_jax.data.beam.rows import Job
from m6rec_jax.data.beam.workers import Workers
from m6rec_jax.data.card import Card
from m6rec_jax.data.clean import Cleaned
from m6rec_jax.data.quality_figures import (
    ACTIVITY_SPAN,
    BUCKETS,
    bots,
    day,
    limit_figures,
    missing,
    near,
    outliers,
    rules,
    spread,
    tail,
)
from m6rec_jax.data.sources import EVENT_SCHEMA, Tables
from m6rec_jax.data.splits import SPLITS, TRAIN

WINDOW_BINS = 1 << 14


def figures(card: Card, tables: Tables, cleaned: Cleaned, read: dict[str, Any], by_rule: dict[str, int],
            sums: list[dict[str, Any]], by_split: np.ndarray, name_of: Callable[[int], str],
            activity: dict[str, Any] | None) -> dict[str, Any]:  # fmt: skip
    """`quality_figures.figures`: `read` says of the events as read (rows, missing), `by_rule` counts rejected ones,
    `sums` are those of `label_range`, `by_split` [3, C] events on items, `tables` and `cleaned` all but the events."""
    items = cleaned.tables.items
    assert items is not None
    timed = card.events.time_unit != "order"
    by_user, by_item = np.concatenate([one["by_user"] for one in sums]), by_split.sum(0)
    n, n_users, real = int(by_user.sum()), len(by_user), sum(one["real"] for one in sums)
    busy = [np.zeros(n_users, kind) for kind in (np.int64, np.float64, np.int64)]
    for one in sums:
        at, *values = one["busy"]
        for whole, part in zip(busy, values, strict=True):
            whole[at] = part
    most, fast, awake = busy
    found: dict[str, Any] = {
        "name": card.name,
        "read": read["rows"],
        "events": n,
        "users": n_users,
        "items": items.height,
        "density": n / max(n_users * items.height, 1),
        "timed": timed,
        "from": day(min(one["from"] for one in sums)) if timed else None,
        "to": day(max(one["to"] for one in sums)) if timed else None,
        "ties": sum(one["ties"] for one in sums) / max(n - n_users, 1),
        "repeats": 1 - sum(one["pairs"] for one in sums) / max(real, 1),
        "per_user": spread(by_user),
        "per_item": spread(by_item[by_item > 0]),
        "short_users": int((by_user < 3).sum()),
        "rules": rules(cleaned, by_rule),
        "missing": _missing(card, tables, read),
        "outliers": outliers(cleaned.tables.events, items, card),
        "bots": bots(name_of, by_user, most, fast, awake, timed),
        "tail": tail(by_item),
        "near": near(items),
        "drift": _drift(card, sums, by_split),
    }
    if activity:
        found["activity"] = activity
    found["limits"] = limit_figures(found, cleaned.counts, sum(by_rule.values()), by_rule)
    return found


def _missing(card: Card, tables: Tables, read: dict[str, Any]) -> list[dict[str, Any]]:
    made = missing(tables, card)
    for one in made:
        if one["table"] == "events":
            one["rows"], one["missing"] = read["rows"], read["missing"][one["column"]]
    return made


def _drift(card: Card, sums: list[dict[str, Any]], by_split: np.ndarray) -> dict[str, Any]:
    timed = card.events.time_unit != "order"
    train = by_split[TRAIN]
    rank = np.empty(len(train), np.int64)
    rank[np.argsort(-train, kind="stable")] = np.arange(len(train))
    seen = max(int((train > 0).sum()), 1)
    band = np.select([train == 0, rank < max(1, 0.01 * seen), rank < 0.1 * seen], [3, 0, 1], 2)
    popular = set(np.argsort(-train, kind="stable")[:100].tolist())
    parts = []
    for number, name in enumerate(SPLITS):
        counts, mine = by_split[number], [one["parts"][number] for one in sums]
        if not (n := int(counts.sum())):
            continue
        top = np.argsort(-counts, kind="stable")[: min(100, int((counts > 0).sum()))]
        times = [t for one in mine if one["from"] is not None for t in (one["from"], one["to"])]
        parts.append(
            {
                "name": name,
                "events": n,
                "users": sum(one["users"] for one in mine),
                "items": int((counts > 0).sum()),
                "new_items": int(counts[train == 0].sum()) / n,
                "new_users": sum(one["strangers"] for one in mine) / n,
                "popularity": _median(train, counts),
                "top": len(popular.intersection(top.tolist())) / len(top),
                "value": None,
                "bands": (np.bincount(band, weights=counts, minlength=4) / n).round(4).tolist(),
                "from": day(min(times)) if timed else None,
                "to": day(max(times)) if timed else None,
            }
        )
    held = by_split[TRAIN + 1 :].sum(0)
    new = int(held[train == 0].sum()) / int(held.sum()) if held.any() else 0.0
    return {"rule": card.split.rule, "parts": parts, "new_items": new}


def _median(values: np.ndarray, counts: np.ndarray) -> float:
    """The median of each value as often as its count says."""
    order = np.argsort(values, kind="stable")
    ends, n = np.cumsum(counts[order]), int(counts.sum())
    low, high = (int(values[order[np.searchsorted(ends, place, side="right")]]) for place in ((n - 1) // 2, n // 2))
    return (low + high) / 2


def nth_times(workers: Workers, job: Job, numbers: list[int], targets: bool, span: tuple[int, int], places: list[int]) -> list[int]:  # fmt: skip
    """The times at `places` of all (or all `targets`') times sorted, which lie in `span`, both ends included."""
    width = (span[1] - span[0]) // WINDOW_BINS + 1
    windows = [(span[0], 0)] * len(places)  # where each begins, and how many times lie before it
    turn = 0
    while True:
        looked = sorted({low for low, _ in windows})
        task = partial(count_windows, job, targets, [(low, width) for low in looked], WINDOW_BINS)
        counts = np.sum(workers.each(f"times-{int(targets)}-{turn}", task, numbers), axis=0)
        for i, (low, before) in enumerate(windows):
            ends = before + np.cumsum(counts[looked.index(low)])
            at = int(np.searchsorted(ends, places[i], side="right"))
            windows[i] = (low + at * width, int(ends[at - 1]) if at else before)
        if width == 1:
            return [low for low, _ in windows]
        width, turn = (width - 1) // WINDOW_BINS + 1, turn + 1


def activity(workers: Workers, job: Job, numbers: list[int], n: int, span: tuple[int, int]) -> dict[str, Any]:
    """`activity` of the figures, over `n` events."""
    places = [(n - 1) * (q / 100) for q in ACTIVITY_SPAN]
    wanted = [min(int(place) + more, n - 1) for place in places for more in (0, 1)]
    times = nth_times(workers, job, numbers, False, span, wanted)
    low, high = (_between(times[2 * i], times[2 * i + 1], place - int(place)) for i, place in enumerate(places))
    edges = np.linspace(low, max(high, low + 1), BUCKETS + 1)
    found = workers.each("activity", partial(activity_of, job, edges), numbers)
    return {
        "edges": [day(edge) for edge in edges],
        "events": np.sum([one[0] for one in found], axis=0).tolist(),
        "new_users": np.sum([one[1] for one in found], axis=0).tolist(),
        "outside": sum(one[2] for one in found),
    }


def _between(low: int, high: int, share: float) -> float:
    """As np.percentile does it, to the last bit."""
    return float(low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share))


def no_events() -> pl.DataFrame:
    """A table of events without any, where those of the other tables are asked about."""
    return pl.DataFrame(schema=EVENT_SCHEMA)
