"""Every system by name: how it answers a problem, and the settings that it may try."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.tasks import classic, nearest
from benchmarks.tasks.problem import Problem

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


SYSTEMS: dict[str, System] = {
    "logreg": System(
        classic.logreg, ("scoring", "classify"), _same(*({"C": c, "n": n} for n in (2, 1) for c in (0.3, 3.0)))
    ),
    "gbdt": System(
        classic.gbdt,
        ("scoring",),
        _same(*({"learning_rate": rate, "max_leaf_nodes": leaves} for leaves in (4, 15) for rate in (0.03, 0.1))),
    ),
    "din": System(classic.din, ("scoring",), _same(*({"width": width, "rate": rate} for width in (16, 8) for rate in (1e-3, 5e-3)))),
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
}  # fmt: skip


def systems_for(problem: Problem) -> list[str]:
    """Names of the systems that can answer a problem."""
    return [name for name, system in SYSTEMS.items() if problem.task in system.tasks]
