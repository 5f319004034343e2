"""Baselines that look up: nearest by TF-IDF, the answer of the nearest training row, a template filled in."""

from __future__ import annotations

import re
from argparse import Namespace
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from benchmarks.tasks.problem import SPLITS, Problem

K = 100


def reader(problem: Problem, n: int, **more: Any) -> TfidfVectorizer:
    """TF-IDF of words (Chinese: characters) and runs of up to n of them."""
    chars = problem.wording.language == "zh"
    return TfidfVectorizer(analyzer="char" if chars else "word", ngram_range=(1, n + chars), sublinear_tf=True,
                           token_pattern=None if chars else r"(?u)\b\w+\b", **more)  # fmt: skip


def copied(problem: Problem, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, list[str]]:
    """The answer of the training instance whose text is nearest."""
    tfidf = reader(problem, settings["n"], max_df=settings["most"])
    seen, answers = tfidf.fit_transform(problem.texts("train")), problem.part("train")["answer"].to_list()
    made = {}
    for split in SPLITS[1:]:
        near = (tfidf.transform(problem.texts(split)) @ seen.T).toarray().argmax(1)
        made[split] = [answers[i] for i in near]
    return made


def filled(problem: Problem, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, list[str]]:
    """One sentence for everybody, with the fields of the instance put in."""
    fill = TEMPLATES[problem.task][settings["form"]]
    return {split: [fill(row) for row in problem.part(split).iter_rows(named=True)] for split in SPLITS[1:]}


def _audience(about: str) -> str:
    """What an item's summary says its readers or guests like: what stands behind "who enjoy", "fans of", "looking for"."""
    found = re.search(r"(?:who (?:enjoy|appreciate|love|like|are looking for)|[Ff]ans of|looking for|seeking|interested in) (.*?)(?: (?:will|would|can|may|should|are likely)\b|[.;]|$)", about)  # fmt: skip
    return (found.group(1) if found else about.split(".")[0]).strip(" ,")


def _spoken(row: dict[str, Any]) -> str:
    films = [turn["title"] for turn in row["turns"]]
    named = re.findall(r"[A-Z][\w':]*(?: [\w':&-]+)* \(\d{4}\)", " ".join(films))
    return f"Have you seen {named[-1]}?" if named else "Have you seen It (2017)?"


TEMPLATES = {
    "explanation": {
        "enjoy": lambda row: f"The user would enjoy {row['item']} because they enjoy {_audience(row['about'])}.",
        "buy": lambda row: f"The user would buy the book because they enjoy {_audience(row['about'])}.",
        "offers": lambda row: f"The user would enjoy the business for its {_audience(row['about'])}.",
        "summary": lambda row: f"The user would enjoy {row['item']} because it is for {_audience(row['about'])}. {row['about']}",
    },
    "chat": {
        "seen": _spoken,
        "like": lambda row: f"I think you will like it. {_spoken(row)}",
        "asked": lambda row: "What kind of movies do you like?",
        "bye": lambda row: "You are welcome. Have a nice day!",
    },
    "caption": {
        "kind": lambda row: f"{row['kind']} {row['finer']}",
        "tags": lambda row: f"#{row['kind']} #感谢快手我要上热门",
        "cover": lambda row: f"{row['cover'] or row['kind']} #感谢快手我要上热门",
        "thanks": lambda row: "#感谢快手我要上热门",
    },
}  # fmt: skip


def nearest_items(problem: Problem, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, np.ndarray]:
    """Rows of the K items of the catalogue nearest to the last items of each history, `[n, K]`; history left out."""
    items = problem.catalogue
    tfidf = reader(problem, settings["n"])
    words = tfidf.fit_transform([f"{title} {kinds}" for title, kinds in items.select("title", "categories").iter_rows()]).tocsr()  # fmt: skip
    row_of = {one: i for i, one in enumerate(items["item_id"].to_list())}
    made = {}
    for split in SPLITS[1:]:
        rows = np.zeros((problem.part(split).height, K), np.int32)
        for i, events in enumerate(problem.part(split)["history"].to_list()):
            known = [row_of[event["item"]] for event in events]
            near = np.asarray(words[known[-settings["last"] :]].sum(0) @ words.T).ravel()
            near[known] = -1
            rows[i] = np.argsort(-near, kind="stable")[:K]
        made[split] = rows
    return made


def likeness(problem: Problem, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, np.ndarray]:
    """Cosine of the two texts of each pair."""
    part = problem.part("test")
    tfidf = reader(problem, 1)
    tfidf.fit([*part["first"].to_list(), *part["item"].to_list()])
    a, b = (tfidf.transform(part[name].to_list()) for name in ("first", "item"))
    return {"test": np.asarray(a.multiply(b).sum(1)).ravel().astype(np.float32)}
