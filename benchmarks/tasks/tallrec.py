"""TALLRec's rows of films and books (Bao et al. 2023): what a user liked and disliked, and whether the next is liked.

Of its three files the validation rows are what is learnt from here (the newest fifth chooses settings) and the test rows
what is scored: the training file is not at hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.tasks.problem import Problem
from benchmarks.tasks.statistics import fold_counts, habit, opinion, smoothed

ITEMS = {"movie": r'"(.*?)"(?:, |$)', "book": r'"(.*?)" written by (.*?)(?=, "|$)'}
VALID = 0.2
NUMBERS = ("user_likes", "user_dislikes", "user_rate", "item_likes", "item_ratings", "item_rate", "author_likes", "author_dislikes")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Titles (with authors, for books) that were liked, disliked, asked for; the answer."""

    liked: tuple[tuple[str, str], ...]
    disliked: tuple[tuple[str, str], ...]
    asked: tuple[str, str]
    label: int


def read(kind: str, folder: Path) -> Problem | None:
    """The problem of `movie` or `book`; None without its files."""
    files = [folder / "tallrec" / f"{kind}_{part}.json" for part in ("valid", "test")]
    if not all(file.is_file() for file in files):
        return None
    known, test = ([row_of(kind, one) for one in json.loads(file.read_text(encoding="utf-8"))] for file in files)
    users = same_user(known)
    # The newest rows choose settings, and no user stands on both sides.
    starts = [i for i in range(1, len(users)) if users[i] != users[i - 1]]
    first = users[min(starts, key=lambda at: abs(at - len(known) * (1 - VALID)))]
    split = ["valid" if user >= first else "train" for user in users] + ["test"] * len(test)
    frame = frame_of(kind, known, test, users, split)
    past = past_of(kind, known, users, split)
    problem = Problem(kind, "scoring", "auc", "like", frame, lambda: card(kind, known, users, split, problem), NUMBERS, past=past)  # fmt: skip
    return problem


def row_of(kind: str, raw: dict[str, str]) -> Row:
    """A prompt of TALLRec, taken apart."""
    liked, rest = raw["input"].removeprefix("User Preference:").split("\nUser Unpreference:", 1)
    disliked, asked = rest.split("\nWhether the user will like the target ", 1)
    title = asked.split(" ", 1)[1].strip().removesuffix("?").removeprefix('"').removesuffix('"')
    if kind == "book":
        name, author = title.rsplit('" written by ', 1)
        item = (name.removeprefix('"'), author)
    else:
        item = (title, "")
    found = [tuple(one if kind == "book" else (one, "") for one in re.findall(ITEMS[kind], part.strip())) for part in (liked, disliked)]  # fmt: skip
    return Row(found[0], found[1], item, int(raw["output"].startswith("Yes")))


def same_user(rows: Sequence[Row]) -> list[int]:
    """A number for each row, the same for neighbours in the file of whose histories half is common."""
    made: list[int] = []
    for i, row in enumerate(rows):
        before = rows[i - 1] if i else row
        own = {*((one, 1) for one in row.liked), *((one, 0) for one in row.disliked)}
        theirs = {*((one, 1) for one in before.liked), *((one, 0) for one in before.disliked)}
        alike = i > 0 and 2 * len(own & theirs) >= min(len(own), len(theirs)) > 0
        made.append(made[-1] + (not alike) if made else 0)
    return made


def facts(rows: Sequence[Row], users: Sequence[int]) -> dict[tuple[int, tuple[str, str]], int]:
    """(user, item) -> liked, of histories and answers."""
    made = {}
    for row, user in zip(rows, users, strict=True):
        made |= {(user, item): 1 for item in row.liked} | {(user, item): 0 for item in row.disliked}
        made[user, row.asked] = row.label
    return made


def frame_of(kind: str, known: Sequence[Row], test: Sequence[Row], users: list[int], split: list[str]) -> pl.DataFrame:
    rows = [*known, *test]
    number: dict[tuple[str, str], int] = {}
    for row in rows:
        for item in (*row.liked, *row.disliked, row.asked):
            number.setdefault(item, len(number))
    train = [i for i, part in enumerate(split[: len(known)]) if part == "train"]
    seen = facts([known[i] for i in train], [users[i] for i in train])
    who, what = (np.array(column) for column in zip(*((user, number[item]) for user, item in seen), strict=True))
    liked = np.array(list(seen.values()), float)
    asked = np.array([number[row.asked] for row in rows])
    own = np.array([user if part == "train" else -1 for user, part in zip([*users, *[-1] * len(test)], split, strict=True)])  # fmt: skip
    likes, ratings = fold_counts(who, what, liked, own, asked)
    rate = smoothed(likes, ratings, float(liked.mean()))
    user_likes, user_dislikes = (np.array([len(part) for part in parts]) for parts in ([r.liked for r in rows], [r.disliked for r in rows]))  # fmt: skip
    by = [[sum(_name(a) == _name(row.asked[1]) for _, a in part) if row.asked[1] else 0 for row in rows for part in [getattr(row, of)]] for of in ("liked", "disliked")]  # fmt: skip
    return pl.DataFrame(
        {
            "split": split,
            "user_id": [str(user) for user in users] + [f"test{i}" for i in range(len(test))],
            "item_id": [str(one) for one in asked.tolist()],
            "label": [row.label for row in rows],
            "history": [history(row, number) for row in rows],
            "habit": [habit(a, a + b) for a, b in zip(user_likes.tolist(), user_dislikes.tolist(), strict=True)],
            "item": [said(row.asked) for row in rows],
            "statistics": [
                ", ".join(filter(None, (words, _author(a, b)))) if kind == "book" else words
                for words, a, b in zip(opinion(rate.tolist(), ratings.tolist()), *by, strict=True)
            ],
            "user_likes": user_likes, "user_dislikes": user_dislikes,
            "user_rate": smoothed(user_likes, user_likes + user_dislikes, 0.5),
            "item_likes": likes, "item_ratings": ratings, "item_rate": rate,
            "author_likes": by[0], "author_dislikes": by[1],
        }
    )  # fmt: skip


def past_of(kind: str, known: Sequence[Row], users: Sequence[int], split: Sequence[str]) -> pl.DataFrame:
    """Rows from the histories of training rows: a random half of the events is told, each of the others is asked. (Asked of
    all the rest, a liked one would always leave a smaller share of likes behind than a disliked one.)"""
    train = [i for i, part in enumerate(split[: len(known)]) if part == "train"]
    rng, made = np.random.default_rng(0), dict[tuple[int, tuple[str, str]], Row]()
    for i in train:
        events = [(item, 1) for item in known[i].liked] + [(item, 0) for item in known[i].disliked]
        order = rng.permutation(len(events)).tolist()
        asked = set(order[len(order) // 2 :])
        liked, disliked = (tuple(item for at, (item, own) in enumerate(events) if own == label and at not in asked) for label in (1, 0))  # fmt: skip
        for at in sorted(asked):
            item, label = events[at]
            made.setdefault((users[i], item), Row(liked, disliked, item, label))
    rows, owners = list(made.values()), [user for user, _ in made]
    told, of = [*(known[i] for i in train), *rows], [*(users[i] for i in train), *owners]
    return frame_of(kind, told, [], of, ["train"] * len(told))[len(train) :]


def _author(liked: int, disliked: int) -> str:
    return ", ".join(f"author {word} before" for word, n in (("liked", liked), ("disliked", disliked)) if n)


def _name(author: str) -> str:
    return " ".join(author.lower().replace(".", " ").split())


def said(item: tuple[str, str]) -> str:
    """A title, and by whom."""
    return f"{item[0]} by {item[1]}" if item[1] else item[0]


def history(row: Row, number: dict[tuple[str, str], int]) -> list[dict[str, str]]:
    """The events of a row; `item`: for models of ids."""
    return [
        {"action": action, "title": said(item), "item": str(number[item])}
        for action, part in (("Disliked", row.disliked), ("Liked", row.liked))
        for item in part
    ]


def card(kind: str, known: Sequence[Row], users: list[int], split: list[str], problem: Problem) -> dict[str, Any]:
    """The data card: what training users liked and disliked, every title, this task."""
    titles: dict[str, str] = {}
    for row in problem.frame.iter_rows(named=True):
        titles |= {event["item"]: event["title"] for event in row["history"]} | {row["item_id"]: row["item"]}
    ids = {title: item for item, title in titles.items()}
    train = [i for i, part in enumerate(split[: len(known)]) if part == "train"]
    seen = facts([known[i] for i in train], [users[i] for i in train])
    events = pl.DataFrame(
        [{"user": str(user), "item": ids[said(item)], "kind": "liked" if like else "disliked"} for (user, item), like in seen.items()]
    ).with_row_index("order")  # fmt: skip
    return {
        "name": f"tallrec-{kind}",
        "events": {"path": events, "user": "user", "item": "item", "time": "order", "time_unit": "order", "kind": "kind"},
        "items": {"path": pl.DataFrame({"id": list(titles), "title": list(titles.values())}), "id": "id", "title": "title"},
        "kinds": {"liked": 1.0, "disliked": 0.0},
        "corpus": {"path": pl.DataFrame({"text": problem.texts("train")}), "text": "text"},
        "split": "leave-one-out",
        "tasks": {"like": problem.task_card(), "brief": problem.brief_card(), "past": problem.past_card(), "counts": problem.counts_card()},
    }  # fmt: skip
