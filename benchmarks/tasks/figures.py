"""From what a system answered to measures of a task, to rows of results, to differences with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.tasks.measures import (
    Measure,
    auc,
    distinct_2,
    grounded,
    interval,
    macro_f1,
    mean,
    rouge_2,
)
from benchmarks.tasks.problem import Problem

Answer = Any  # probabilities [n, C], scores [n], texts, or catalogue rows [n, K], by the task


def measures_of(problem: Problem, split: str, answer: Answer) -> dict[str, Measure]:
    """Every measure of a task over the instances of a split, the one that is compared first."""
    part = problem.part(split)
    if problem.task in ("scoring", "plausibility"):
        scores = np.asarray(answer)
        return {"auc": auc(part["label"].to_numpy(), scores[:, 1] if scores.ndim > 1 else scores)}
    if problem.task == "classify":
        labels, guesses = part["label"].to_numpy(), np.asarray(answer).argmax(1)
        return {"macro_f1": macro_f1(labels, guesses), "accuracy": mean((labels == guesses).astype(float))}
    if problem.task == "retrieval":
        row_of = {one: i for i, one in enumerate(problem.catalogue["item_id"].to_list())}  # type: ignore[index]
        targets = np.array([row_of[one] for one in part["item_id"].to_list()])
        found = np.asarray(answer) == targets[:, None]
        return {f"recall@{k}": mean(found[:, :k].any(1).astype(float)) for k in (100, 10)}
    texts, references = list(answer), part["answer"].to_list()
    rouge = np.array([rouge_2(a, b) for a, b in zip(texts, references, strict=True)])
    known = np.array([grounded(a, b) for a, b in zip(texts, problem.texts(split), strict=True)], float)
    return {
        "rouge_2": mean(rouge),
        "distinct_2": lambda at: distinct_2([texts[i] for i in at]),
        "grounded": mean(known),
    }


def figures(problem: Problem, split: str, answer: Answer, spread: bool = False) -> dict[str, Any]:
    """`metrics` over all instances of a split and, where `spread`, the 95 % interval and standard error of the first."""
    made = measures_of(problem, split, answer)
    every = np.arange(problem.part(split).height)
    out: dict[str, Any] = {"metrics": {name: measure(every) for name, measure in made.items()}, "instances": len(every)}
    if spread:
        low, high = interval(made[problem.metric], len(every))
        out |= {"ci95": [low, high], "standard_error": (high - low) / 3.92}
    return out
