"""Late interaction and early exit beside the full model: how each answers, and its area under the ROC curve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from benchmarks.clicks.runs import TASK
from benchmarks.tasks.measures import auc, difference, interval
from m6rec_jax.artifacts.atomic import atomic_path
from m6rec_jax.data.instances.read import Instances
from m6rec_jax.decoding.exits import Exits, ExitScorer, calibrate
from m6rec_jax.decoding.instances import InstanceScorer
from m6rec_jax.decoding.late import LateScorer
from m6rec_jax.decoding.quick import exit_scorer, late_scorer, option_table, prompts
from m6rec_jax.decoding.shapes import Prompt

NOTHING = Exits((), ())  # every row runs all layers
Call = Callable[[Sequence[Prompt]], Any]


@dataclass(frozen=True)
class Answer:
    """The log-odds of the second option of each instance `[n]`, and behind which layer each row left, on average."""

    margins: np.ndarray
    layers_run: float


@dataclass(frozen=True)
class System:
    """How requests are answered: `answer` instances by the scorer that users call, `call` of prompts as it is timed; `late`
    where parts are kept; `facts` for its rows; `run`: whose parameters."""

    run: Path
    answer: Callable[[Instances], Answer]
    call: Call
    late: LateScorer | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def systems(runs: Mapping[str, Path], valid: Instances, max_loss: Sequence[float]) -> dict[str, System]:
    """Of runs by name (full, exits, late k) the systems; thresholds of exits are fitted on `valid`, once for each loss."""
    made = {}
    for name, run in runs.items():
        scorer = InstanceScorer.load(run, "latest")
        if name == "exits":
            made |= _exits(run, scorer, valid, max_loss)
        else:
            made[name] = _late(run, scorer) if scorer.blueprint.config.late else _full(run, scorer)
    return made


def _full(run: Path, scorer: InstanceScorer) -> System:
    """The full model; timed, its last layer is run for the last token alone, as the others do."""
    blueprint = replace(scorer.blueprint, config=replace(scorer.blueprint.config, exits=True))
    whole = ExitScorer(blueprint.bind(nnx.to_pure_dict(scorer.params)), scorer.items)
    table, layers = option_table(scorer, TASK), float(scorer.blueprint.config.layers)

    def answer(instances: Instances) -> Answer:
        odds = np.log(scorer.chances(instances).astype(np.float64))
        return Answer(odds[:, 1] - odds[:, 0], layers)

    return System(run, answer, lambda some: whole.score(some, table, NOTHING).scores)


def _late(run: Path, scorer: InstanceScorer) -> System:
    late, table, layers = late_scorer(scorer), option_table(scorer, TASK), float(scorer.blueprint.config.layers)

    def answer(instances: Instances) -> Answer:
        return Answer(_margins(late.score(prompts(instances.laid_out(scorer.length)), table)), layers)

    return System(run, answer, lambda some: late.score(some, table), late)


def _exits(run: Path, scorer: InstanceScorer, valid: Instances, max_loss: Sequence[float]) -> dict[str, System]:
    """The run with thresholds that lose so much at most on validation, for each of `max_loss`, and with none."""
    quick, table = exit_scorer(scorer), option_table(scorer, TASK)
    of_layers = kept(run / "layers-valid.npy", lambda: quick.every(prompts(valid.laid_out(scorer.length)), table))
    areas = [auc(valid.labels, _margins(one))(np.arange(len(valid))) for one in of_layers]

    def facts(exits: Exits) -> dict[str, Any]:
        return {
            "layers": list(exits.layers), "thresholds": list(exits.thresholds), "lost_on_valid": exits.lost,
            "layers_run_on_valid": exits.layers_run, "valid_auc_of_layers": [round(one, 4) for one in areas],
        }  # fmt: skip

    def system(which: Exits, facts: dict[str, Any]) -> System:
        def answer(instances: Instances) -> Answer:
            left = quick.score(prompts(instances.laid_out(scorer.length)), table, which)
            return Answer(_margins(left.scores), float(left.layers.mean()))

        return System(run, answer, lambda some: quick.score(some, table, which).scores, None, facts)

    made = {"exits, none leaves": system(NOTHING, {})}
    for loss in max_loss:
        exits = calibrate(of_layers, valid.labels, loss)
        made[f"exits, {loss:g} allowed"] = system(exits, facts(exits))
    return made


def _margins(scores: np.ndarray) -> np.ndarray:
    return scores[:, 1].astype(np.float64) - scores[:, 0]


def kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What was made before, from its file beside the run; else it is made now."""
    if not path.is_file():
        found = make()
        with atomic_path(path) as beside, beside.open("wb") as file:
            np.save(file, found)
    return np.load(path)


def areas(made: Mapping[str, System], split: str, instances: Instances, base: str = "full") -> list[dict[str, Any]]:
    """A row a system: AUC of a split with its 95 %, what it lies above that of `base` with the 95 % of the same resampled
    instances for both, and the facts."""

    def answered(name: str, system: System) -> np.ndarray:
        def make() -> np.ndarray:
            found = system.answer(instances)
            return np.append(found.margins, found.layers_run)

        file = "-".join([*name.replace(",", "").split(), *map(str, system.facts.get("thresholds", ())), split])
        return kept(system.run / f"{file}.npy", make)

    found = {name: answered(name, system) for name, system in made.items()}
    told = compared(instances.labels, {name: one[:-1] for name, one in found.items()}, base)
    return [
        {"system": name, "split": split, **told[name], "layers_run": float(found[name][-1]), **system.facts}
        for name, system in made.items()
    ]


def compared(labels: np.ndarray, scores: Mapping[str, np.ndarray], base: str) -> dict[str, dict[str, Any]]:
    """AUC of scores `[n]` by name, and the difference from `base`, both with 95 %."""
    made, n = {}, len(labels)
    measures = {name: auc(labels, one) for name, one in scores.items()}
    for name, measure in measures.items():
        made[name] = {"auc": measure(np.arange(n)), "ci95": list(interval(measure, n)), "instances": n}
        if name != base:
            apart = difference(([measure], [measures[base]], n))
            made[name] |= {"difference": apart["difference"], "difference_ci95": apart["ci95"], "against": base}
    return made
