"""Amazon Beauty, retrieval of items that training has not seen: the coldest tenth of the catalogue is held out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.tasks.problem import Problem

SHARE = 0.1  # of the items, those with the fewest events
HISTORY = 8
TRAIN, HELD = 30_000, 1_000  # rows of training and of each held-out split at most


def read(folder: Path) -> Problem | None:
    """The problem; None without its files. Asked are users whose last item (test), or the one before it (valid), is an
    unseen one; no unseen item is in a training row."""
    files = [folder / "beauty" / name for name in ("items.jsonl", "sequences.txt")]
    if not all(file.is_file() for file in files):
        return None
    items = {str(one["id"]): one for one in map(json.loads, files[0].read_text(encoding="utf-8").splitlines())}
    sequences = [line.split() for line in files[1].read_text(encoding="utf-8").splitlines()]
    counts = pl.Series([item for row in sequences for item in row[1:]]).value_counts(name="n").sort("n", "")
    unseen = set(counts.head(round(SHARE * counts.height))[""].to_list())
    rng, rows = np.random.default_rng(0), {"train": [], "valid": [], "test": []}
    training = {row[0]: [item for item in row[1:-2] if item not in unseen] for row in sequences}
    for user, *events in sequences:
        for split, at in (("valid", len(events) - 2), ("test", len(events) - 1)):
            if at > 0 and events[at] in unseen:
                rows[split].append((user, list(events[:at]), events[at]))
        own = training[user]
        rows["train"] += [(user, own[:at], own[at]) for at in range(1, len(own))]
    made = []
    for split, most in (("train", TRAIN), ("valid", HELD), ("test", HELD)):
        chosen = np.sort(rng.permutation(len(rows[split]))[:most]).tolist()
        made += [_row(split, *rows[split][i], items) for i in chosen]
    catalogue = pl.DataFrame(
        [{"item_id": key, "title": one["title"] or "", "categories": _categories(one)} for key, one in items.items()]
    )
    problem = Problem("beauty", "retrieval", "recall@100", "next", pl.DataFrame(made), lambda: card(problem, training), catalogue=catalogue)  # fmt: skip
    return problem


def _row(split: str, user: str, history: list[str], item: str, items: dict[str, dict]) -> dict[str, Any]:
    return {
        "split": split,
        "user_id": user,
        "item_id": item,
        "history": [{"title": items[one]["title"] or one, "item": one} for one in history[-HISTORY:]],
        "id": item,
        "item": items[item]["title"] or item,
        "categories": _categories(items[item]),
    }


def _categories(item: dict[str, Any]) -> str:
    return ", ".join(dict.fromkeys(one for one in item["attributes"] if one))


def card(problem: Problem, training: dict[str, list[str]]) -> dict[str, Any]:
    """The data card: training events without the unseen items, every item's text, this task."""
    events = [(user, item) for user, items in training.items() for item in items]
    table = pl.DataFrame(events, schema=["user", "item"], orient="row").with_row_index("order")
    task = {key: value for key, value in problem.task_card().items() if key != "target"}
    return {
        "name": "beauty-unseen",
        "events": {"path": table, "user": "user", "item": "item", "time": "order", "time_unit": "order"},
        "items": {"path": problem.catalogue, "id": "item_id", "title": "title", "categories": "categories", "list_separator": ", "},
        "split": "leave-one-out",
        "tasks": {"next": task, "plausibility": {}, "describe": {}},
    }  # fmt: skip
