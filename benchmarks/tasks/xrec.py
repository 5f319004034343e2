"""XRec's explanations (Ma et al. 2024): why a user would enjoy a book (Amazon) or a business (Yelp); 2,400 / 300 / 300."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.tasks.problem import Problem

SIZES = (2400, 300, 300)


def read(kind: str, folder: Path) -> Problem | None:
    """The problem of `amazon` or `yelp`; None without its file. All rows of a user go to one split."""
    path = folder / "xrec" / f"{kind}.jsonl"
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    split = by_user([row["uid"] for row in rows])
    frame = pl.DataFrame(
        {
            "split": split,
            "user_id": [str(row["uid"]) for row in rows],
            "item_id": [str(row["iid"]) for row in rows],
            "answer": [row["explanation"] for row in rows],
            "user": [row["user_summary"] for row in rows],
            "about": [row["item_summary"] for row in rows],
            "item": [row["title"] for row in rows],
        }
    )
    problem = Problem(f"xrec-{kind}", "explanation", "rouge_2", "why", frame, lambda: card(problem))
    return problem


def by_user(users: list[int], sizes: tuple[int, int, int] = SIZES) -> list[str]:
    """Splits of just these sizes: whole users in random order, the largest that still fit."""
    rng = np.random.default_rng(0)
    distinct, counts = np.unique(users, return_counts=True)
    split = {}
    left = {"test": sizes[2], "valid": sizes[1]}
    for at in rng.permutation(len(distinct)).tolist():
        name = next((name for name, room in left.items() if counts[at] <= room), "train")
        split[int(distinct[at])] = name
        if name in left:
            left[name] -= int(counts[at])
    return [split[user] for user in users]


def card(problem: Problem) -> dict[str, Any]:
    """The data card: who chose what, titles with what is said of them in training rows, this task."""
    train = problem.part("train")
    items = problem.frame.unique("item_id", maintain_order=True).select("item_id", "item")
    known = train.unique("item_id", maintain_order=True).select("item_id", "about")
    texts = [f"{row['user']} {row['about']} {row['answer']}" for row in train.iter_rows(named=True)]
    return {
        "name": problem.dataset,
        "events": {"path": train.select("user_id", "item_id").with_row_index("order"), "user": "user_id", "item": "item_id", "time": "order", "time_unit": "order"},
        "items": {"path": items.join(known, on="item_id", how="left"), "id": "item_id", "title": "item", "text": "about"},
        "corpus": {"path": pl.DataFrame({"text": texts}), "text": "text"},
        "split": "leave-one-out",
        "tasks": {"why": problem.task_card()},
    }  # fmt: skip
