"""Late interaction and early exit beside the full model: how each answers, and its area under the ROC curve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from benchmarks.clicks.runs import TASK
from benchmarks.tasks.measures import auc, difference, interval
from m6rec_jax.data.instances.read import Instances
from m6rec_jax.decoding.exits import Exits, ExitScorer, calibrate
from m6rec_jax.decoding.instances import InstanceScorer
from m6rec_jax.decoding.late import LateScorer
from m6rec_jax.decoding.quick import chances, exit_scorer, late_scorer, option_table, prompts
from m6rec_jax.decoding.shapes import Prompt

NOTHING = Exits((), ())  # every row runs all layers
Call = Callable[[Sequence[Prompt]], Any]


@dataclass(frozen=True)
class System:
    """How requests are answered: `chances` of instances float32 `[n, 2]` by the scorer that users call, `call` of prompts
    as it is timed; `late` where parts are kept; `facts` for its rows."""

    chances: Callable[[Instances], np.ndarray]
    call: Call
    late: LateScorer | None = None
    facts: Callable[[Instances], dict[str, Any]] = lambda instances: {}


def systems(runs: Mapping[str, Path], valid: Instances, max_loss: float) -> dict[str, System]:
    """Of runs by name (full, exits, late k) the systems; thresholds of exits are fitted on `valid`."""
    made = {}
    for name, run in runs.items():
        scorer = InstanceScorer.load(run, "latest")
        if name == "full":
            made[name] = System(scorer.chances, _whole(scorer))
        elif name == "exits":
            made |= _exits(scorer, valid, max_loss)
        else:
            made[name] = _late(scorer)
    return made


def _whole(scorer: InstanceScorer) -> Call:
    """The full model as it is timed: its last layer for the last token alone, as the others do."""
    blueprint = replace(scorer.blueprint, config=replace(scorer.blueprint.config, exits=True))
    whole = ExitScorer(blueprint.bind(nnx.to_pure_dict(scorer.params)), scorer.items)
    table = option_table(scorer, TASK)
    return lambda some: whole.score(some, table, NOTHING).scores


def _late(scorer: InstanceScorer) -> System:
    late, table, room = late_scorer(scorer), option_table(scorer, TASK), scorer.length
    call = lambda some: late.score(some, table)  # noqa: E731
    return System(lambda instances: chances(call(prompts(instances.laid_out(room)))), call, late)


def _exits(scorer: InstanceScorer, valid: Instances, max_loss: float) -> dict[str, System]:
    """The run with thresholds that lose `max_loss` at most on validation, and with none."""
    quick, table, room = exit_scorer(scorer), option_table(scorer, TASK), scorer.length
    asked = prompts(valid.laid_out(room))
    of_layers = quick.every(asked, table)
    exits = calibrate(of_layers, valid.labels, max_loss)
    every = np.arange(len(valid))
    areas = [round(auc(valid.labels, one[:, 1] - one[:, 0])(every), 4) for one in of_layers]
    told = {"layers": list(exits.layers), "thresholds": list(exits.thresholds), "valid_auc_of_layers": areas}

    def system(which: Exits) -> System:
        def left(instances: Instances) -> Any:
            return quick.score(prompts(instances.laid_out(room)), table, which)

        def facts(instances: Instances) -> dict[str, Any]:
            return {**(told if which is exits else {}), "layers_run": float(left(instances).layers.mean())}

        return System(lambda instances: chances(left(instances).scores), lambda some: quick.score(some, table, which).scores, None, facts)  # fmt: skip

    return {"exits": system(exits), "exits, none leaves": system(NOTHING)}


def areas(made: Mapping[str, System], parts: Mapping[str, Instances], base: str = "full") -> dict[str, dict[str, Any]]:
    """Of each system and split: AUC with its 95 %, what it lies above that of `base` with the 95 % of the same resampled
    instances for both, and the facts."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in made}
    for split, instances in parts.items():
        margins = {}
        for name, system in made.items():
            found = system.chances(instances)
            margins[name] = found[:, 1]
            rows[name][split] = system.facts(instances)
        for name, told in compared(instances.labels, margins, base).items():
            rows[name][split] = told | rows[name][split]
    return rows


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
