"""What validation measures: losses of held-out rows, and the figures that evaluators of the caller's give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from m6rec_jax.artifacts.best import check_measured
from m6rec_jax.artifacts.run import option_spans
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.domains import Domain
from m6rec_jax.data.plan import Pool
from m6rec_jax.model.load import Blueprint
from m6rec_jax.training.loop import Evaluator
from m6rec_jax.training.metrics import Labels

MakeEvaluator = Callable[[Blueprint, Dataset, int], Evaluator]


class JointEvaluator:
    """The figures of one domain; of several each as `figure@domain`, and under `figure` their mean over domains.

    `names`: of the figures, None where an evaluator does not tell its own beforehand.
    """

    def __init__(self, make: MakeEvaluator, blueprint: Blueprint, domains: Sequence[Domain], length: int):
        self.blueprint, self.domains = blueprint, domains
        self.spans = option_spans([domain.dataset.tasks for domain in domains])
        self.each = [
            make(blueprint.domain(i, self.spans[i]), domain.dataset, length) for i, domain in enumerate(domains)
        ]
        told = [getattr(one, "names", None) for one in self.each]
        self.names = None if None in told else list(self._named([dict.fromkeys(names or (), 0.0) for names in told]))

    def __call__(self, params: Any) -> dict[str, float]:
        of = zip(self.each, self.spans, strict=True)
        return self._named([one(self.blueprint.domain_params(params, i, span)) for i, (one, span) in enumerate(of)])

    def _named(self, found: Sequence[dict[str, float]]) -> dict[str, float]:
        if len(found) == 1:
            return found[0]
        names = dict.fromkeys(name for figures in found for name in figures)
        means = {name: float(np.mean([figures[name] for figures in found if name in figures])) for name in names}
        pairs = zip(self.domains, found, strict=True)
        return means | {f"{name}@{domain.name}": value for domain, figures in pairs for name, value in figures.items()}


def check_best(name: str, labels: Labels, held_out: Sequence[Pool], evaluator: JointEvaluator | None) -> None:
    """Raise InputError where it is known before training that validation will not give the figure `train.best`."""
    names = [] if evaluator is None else evaluator.names
    if names is not None:
        check_measured(name, [*_losses(labels, held_out), *names])


def _losses(labels: Labels, held_out: Sequence[Pool]) -> Iterator[str]:
    """Of the tasks that have held-out records; of replaced-token detection none is looked at (`validation_rows`)."""
    for some, pool in zip(labels, held_out, strict=True):
        if len(pool.records) and pool.objective.name != "replaced":
            yield from (f"loss/{label}" for label in some)
