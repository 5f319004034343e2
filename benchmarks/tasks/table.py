"""One table of all systems, and the differences between ours and theirs."""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.tasks.answers import answered
from benchmarks.tasks.figures import measures_of
from benchmarks.tasks.measures import Measure, Pair, difference
from benchmarks.tasks.problem import Problem

OURS = "m6rec"


def show(rows: list[dict[str, Any]]) -> None:
    """Means over seeds, a line a dataset and system; the interval is that of the first measure, averaged."""
    out = Table("task", "data set", "system", "measure", "mean", "95 %", "others", "tried", "s", box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)  # fmt: skip
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["dataset"], row["system"]].append(row)
    for (task, dataset, system), group in groups.items():
        first, *others = group[0]["metrics"]
        means = {name: np.mean([row["metrics"][name] for row in group]) for name in (first, *others)}
        low, high = np.mean([row["ci95"] for row in group], 0)
        more = ", ".join(f"{name} {means[name]:.4f}" for name in others)
        seconds = np.mean([row["seconds"] for row in group])
        out.add_row(task, dataset, system, first, f"{means[first]:.4f}", f"{low:.4f} to {high:.4f}", more, str(group[0]["tried"]), f"{seconds:,.0f}")  # fmt: skip
    Console().print(out)


def differences(problems: dict[str, Problem], rows: list[dict[str, Any]], options: Namespace) -> list[dict[str, Any]]:
    """Ours less each other system, on the measure that is compared; of scoring also the mean over its data sets, where all
    of them have both systems."""
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[f"{row['dataset']}-{row['task']}"][row["system"]].append(row["seed"])
    made, scoring = [], [problem for problem in problems.values() if problem.task == "scoring"]

    def pair(problem: Problem, ours: str, theirs: str) -> Pair:
        def over(system: str) -> list[Measure]:
            found = (answered(problem, system, seed, options)["test"] for seed in groups[problem.name][system])
            return [measures_of(problem, "test", answer)[problem.metric] for answer in found]

        return over(ours), over(theirs), problem.part("test").height

    for problem in problems.values():
        for ours, theirs in _pairs(groups[problem.name]):
            head = {"task": problem.task, "dataset": problem.dataset, "system": ours, "against": theirs}
            made.append(head | {"metric": problem.metric} | difference(pair(problem, ours, theirs)))
    if len(scoring) > 1:
        for ours, theirs in _pairs(set.intersection(*(set(groups[problem.name]) for problem in scoring))):
            head = {"task": "scoring", "dataset": f"mean of {len(scoring)}", "system": ours, "against": theirs}
            made.append(head | {"metric": "auc"} | difference(*(pair(problem, ours, theirs) for problem in scoring)))
    return made


def _pairs(systems: Iterable[str]) -> list[tuple[str, str]]:
    names = sorted(systems)
    return [(ours, theirs) for ours in names if ours.startswith(OURS) for theirs in names if theirs != ours]


def show_differences(rows: list[dict[str, Any]]) -> None:
    """A line a pair of systems."""
    if not rows:
        return
    out = Table("data set", "system", "less", "measure", "difference", "95 %", box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)  # fmt: skip
    for row in rows:
        low, high = row["ci95"]
        out.add_row(row["dataset"], row["system"], row["against"], row["metric"], f"{row['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}")  # fmt: skip
    Console().print(out)
