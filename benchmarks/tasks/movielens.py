"""ML-100K as clicks: a rating of 4 or more is a click; what came later is held out (a tenth and a tenth by time)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.tasks.problem import SPLITS, Problem
from benchmarks.tasks.statistics import habit, opinion, smoothed
from m6rec_jax.data.registry import fetch

LIKED = 4
HISTORY = 12  # events before the one that is asked for
ROWS = {"train": 20_000, "valid": 2_000, "test": 5_000}  # of each split, drawn once for all systems and seeds
PAST = 20_000  # more rows of the training time, for pretraining
NUMBERS = ("user_likes", "user_ratings", "user_rate", "item_likes", "item_ratings", "item_rate", "genre_likes", "genre_ratings", "genre_rate", "age")  # fmt: skip


def read(folder: Path, source: str | None = None, history: int = HISTORY) -> Problem:
    """The problem; the tables are fetched into `folder`. `history`: most events before the one that is asked for."""
    fetch("ml-100k", folder, source=source)
    events = pl.read_csv(folder / "events.csv", infer_schema_length=None).sort("time", maintain_order=True)
    items = {str(one["id"]): one for one in map(json.loads, (folder / "items.jsonl").read_text(encoding="utf-8").splitlines())}  # fmt: skip
    users = {str(one["user"]): one for one in pl.read_csv(folder / "users.csv").iter_rows(named=True)}
    every = frame_of(events, items, users, history)
    frame, past = every.filter(pl.col("split") != "past"), every.filter(pl.col("split") == "past")
    problem = Problem("ml-100k", "scoring", "auc", "like", frame, lambda: card(events, items, users, problem), NUMBERS, past=past)  # fmt: skip
    return problem


def frame_of(
    events: pl.DataFrame, items: dict[str, dict], users: dict[str, dict], history: int = HISTORY
) -> pl.DataFrame:
    """Drawn rows, and those of the split "past"; counts are those of everything earlier, for held-out rows of training rows
    and the user's own past."""
    n = events.height
    cuts = [int(n * 0.8), int(n * 0.9)]
    rng, drawn = np.random.default_rng(0), dict[int, str]()
    for split, (start, stop) in zip(SPLITS, ((0, cuts[0]), (cuts[0], cuts[1]), (cuts[1], n)), strict=True):
        order = rng.permutation(np.arange(start, stop)).tolist()
        drawn |= dict.fromkeys(order[: ROWS[split]], split)
        if split == "train":
            drawn |= dict.fromkeys(order[ROWS[split] : ROWS[split] + PAST], "past")
    item_counts: dict[str, list[int]] = {}
    pasts: dict[str, list[tuple[str, int]]] = {}
    all_likes = all_ratings = 1
    rows = []
    for i, (user, item, rating) in enumerate(events.select("user", "item", "rating").iter_rows()):
        user, item, like = str(user), str(item), int(rating >= LIKED)
        past, (likes, ratings) = pasts.setdefault(user, []), item_counts.setdefault(item, [0, 0])
        if i in drawn:
            genres = set(items[item]["genres"])
            akin = [y for one, y in past if genres & set(items[one]["genres"])]
            about, mine = users[user], sum(y for _, y in past)
            rows.append(
                {
                    "split": drawn[i],
                    "user_id": user,
                    "item_id": item,
                    "label": like,
                    "user": f"{about['age']}, {about['gender']}, {about['occupation']}",
                    "history": [
                        {"action": "Liked" if y else "Disliked", "title": _title(items[one]), "item": one}
                        for one, y in past[-history:]
                    ],
                    "habit": ", ".join(filter(None, (habit(mine, len(past)), _of_genre(akin)))),
                    "item": _title(items[item]),
                    "categories": ", ".join(items[item]["genres"]),
                    "user_likes": mine, "user_ratings": len(past), "user_rate": smoothed(mine, len(past), 0.55),
                    "item_likes": likes, "item_ratings": ratings,
                    "item_rate": smoothed(likes, ratings, all_likes / all_ratings),
                    "genre_likes": sum(akin), "genre_ratings": len(akin), "genre_rate": smoothed(sum(akin), len(akin), 0.55),
                    "age": int(about["age"]),
                }
            )  # fmt: skip
        past.append((item, like))
        if i < cuts[0]:
            item_counts[item] = [likes + like, ratings + 1]
            all_likes, all_ratings = all_likes + like, all_ratings + 1
    frame = pl.DataFrame(rows, infer_schema_length=None)
    words = opinion(frame["item_rate"].to_list(), frame["item_ratings"].to_list())
    return frame.with_columns(pl.Series("statistics", words))


def _of_genre(akin: list[int]) -> str:
    return habit(sum(akin), len(akin)).lower() + " of this kind" if akin else ""


def _title(item: dict[str, Any]) -> str:
    return f"{item['title']} ({item['year']})" if item.get("year") and str(item["year"]) not in item["title"] else item["title"]  # fmt: skip


def card(events: pl.DataFrame, items: dict[str, dict], users: dict[str, dict], problem: Problem) -> dict[str, Any]:
    """The data card: training events, films, users, this task."""
    train = events.head(int(events.height * 0.8)).with_row_index("order")
    train = train.with_columns(kind=pl.when(pl.col("rating") >= LIKED).then(pl.lit("liked")).otherwise(pl.lit("disliked")))  # fmt: skip
    table = pl.DataFrame([{"id": key, "title": _title(one), "genres": one["genres"]} for key, one in items.items()])
    people = pl.DataFrame([{"id": key, **{name: str(one[name]) for name in ("age", "gender", "occupation")}} for key, one in users.items()])  # fmt: skip
    return {
        "name": "ml-100k-clicks",
        "events": {"path": train, "user": "user", "item": "item", "time": "order", "time_unit": "order", "kind": "kind"},
        "items": {"path": table, "id": "id", "title": "title", "categories": "genres"},
        "users": {"path": people, "id": "id", "attributes": ["age", "gender", "occupation"]},
        "kinds": {"liked": 1.0, "disliked": 0.0},
        "corpus": {"path": pl.DataFrame({"text": problem.texts("train")}), "text": "text"},
        "split": "leave-one-out",
        "tasks": {"like": problem.task_card(), "past": problem.past_card()},
    }  # fmt: skip
