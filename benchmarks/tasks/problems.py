"""Every problem by name."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from benchmarks.tasks import beauty, kuairec, movielens, office, redial, tallrec, xrec
from benchmarks.tasks.problem import Problem

DATASETS: dict[str, Callable[[Namespace], Problem | None]] = {
    "movie": lambda options: tallrec.read("movie", options.tables),
    "book": lambda options: tallrec.read("book", options.tables),
    "ml-100k": lambda options: movielens.read(options.work / "ml-100k", options.source),
    "kuairec": lambda options: kuairec.read(options.tables, "classify"),
    "kuairec-caption": lambda options: kuairec.read(options.tables, "caption"),
    "xrec-amazon": lambda options: xrec.read("amazon", options.tables),
    "xrec-yelp": lambda options: xrec.read("yelp", options.tables),
    "redial": lambda options: redial.read(options.tables),
    "beauty": lambda options: beauty.read(options.tables),
    "office": lambda options: office.read(options.tables),
}


def read_problem(name: str, options: Namespace) -> Problem | None:
    """The problem of a name; None without its tables."""
    return DATASETS[name](options)
