"""Every system by name: how it answers a problem, and the settings that it may try."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.tasks import classic, nearest
from benchmarks.tasks.ours import direct, lists, tuned
from benchmarks.tasks.problem import Problem
from m6rec_jax.model.tuning import METHODS

# Settings that every method may try on the validation split. One with fewer choices, such as a template's, has fewer.
BUDGET = 4

Fit = Callable[[Problem, dict[str, Any], int, Namespace], dict[str, Any]]


@dataclass(frozen=True)
class System:
    """`fit(problem, settings, seed, options)` -> answers of "valid" and "test"; `tasks`: those it can answer; `settings`
    of a problem: what is tried, the first where there is time for one alone."""

    fit: Fit
    tasks: tuple[str, ...]
    settings: Callable[[Problem], tuple[dict[str, Any], ...]]


def _same(*settings: dict[str, Any]) -> Callable[[Problem], tuple[dict[str, Any], ...]]:
    return lambda problem: settings


def _scored(choices: Iterable[dict[str, Any]]) -> Callable[[Problem], tuple[dict[str, Any], ...]]:
    """Each choice without and, of scoring, with the rows of training users' own pasts."""
    tries = tuple(choices)
    return lambda problem: tuple(one | {"past": past} for past in ((False, True) if problem.past is not None else (False,)) for one in tries)  # fmt: skip


def _read(problem: Problem) -> tuple[dict[str, Any], ...]:
    """Of logistic regression: how hard it is pulled to zero, and with the rows of pasts or without; of classes, with longer
    runs of words or without."""
    if problem.past is not None:
        return _scored({"C": c} for c in (0.3, 3.0))(problem)
    return tuple({"C": c, "n": n} for c in (0.3, 3.0) for n in (1, 2))


SYSTEMS: dict[str, System] = {
    "logreg": System(classic.logreg, ("scoring", "classify"), _read),
    "gbdt": System(
        classic.gbdt,
        ("scoring",),
        _scored({"max_leaf_nodes": leaves} for leaves in (4, 15)),
    ),
    "din": System(classic.din, ("scoring",), _scored({"rate": rate} for rate in (1e-3, 5e-3))),
    "tfidf-nn": System(nearest.nearest_items, ("retrieval",), _same(*({"n": n, "last": last} for n in (1, 2) for last in (1, 3)))),
    "tfidf-likeness": System(nearest.likeness, ("plausibility",), _same({})),
    "copy": System(
        nearest.copied,
        ("explanation", "chat", "caption"),
        _same(*({"n": n, "most": most} for n in (1, 2) for most in (0.2, 1.0))),
    ),
    "template": System(
        nearest.filled,
        ("explanation", "chat", "caption"),
        lambda problem: tuple({"form": name} for name in nearest.TEMPLATES[problem.task]),
    ),
    **{f"m6rec-{method}": System(tuned.tuned(method), ("scoring", "classify"), tuned.settings) for method in METHODS},
    "m6rec": System(direct.answers, tuple(direct.ANSWERS), direct.settings),
    "m6rec-decode": System(lists.decoded, ("retrieval",), _same({})),
    "m6rec-describe": System(lists.described, ("retrieval",), _same({})),
}  # fmt: skip


def systems_for(problem: Problem) -> list[str]:
    """Names of the systems that can answer a problem."""
    return [name for name, system in SYSTEMS.items() if problem.task in system.tasks]
