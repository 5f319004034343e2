"""One table of all systems, and the differences between ours and theirs."""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.tasks.answers import answered
from benchmarks.tasks.figures import measures_of
from benchmarks.tasks.measures import difference
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
    """Ours less each baseline, on the measure that is compared: the same resampled instances, seeds drawn anew."""
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[f"{row['dataset']}-{row['task']}"][row["system"]].append(row["seed"])
    made = []
    for problem in problems.values():
        systems = groups[problem.name]

        def over(system: str, problem: Problem = problem, systems: dict[str, list[int]] = systems) -> list[Any]:
            found = (answered(problem, system, seed, options)["test"] for seed in systems[system])
            return [measures_of(problem, "test", answer)[problem.metric] for answer in found]

        for ours in (name for name in systems if name.startswith(OURS)):
            for theirs in (name for name in systems if name != ours):
                told = difference(over(ours), over(theirs), problem.part("test").height)
                made.append({"task": problem.task, "dataset": problem.dataset, "system": ours, "against": theirs, "metric": problem.metric} | told)  # fmt: skip
    return made


def show_differences(rows: list[dict[str, Any]]) -> None:
    """A line a pair of systems."""
    if not rows:
        return
    out = Table("data set", "system", "less", "measure", "difference", "95 %", box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)  # fmt: skip
    for row in rows:
        low, high = row["ci95"]
        out.add_row(row["dataset"], row["system"], row["against"], row["metric"], f"{row['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}")  # fmt: skip
    Console().print(out)
