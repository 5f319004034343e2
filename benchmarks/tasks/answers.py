"""What systems answered, kept on disk: settings are searched once, and nothing is run twice."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from benchmarks.tasks.figures import figures
from benchmarks.tasks.ours.recipes import behind
from benchmarks.tasks.problem import Problem
from benchmarks.tasks.systems import BUDGET, SYSTEMS
from m6rec_jax.artifacts.atomic import write_json
from m6rec_jax.errors import InputError


def answered(problem: Problem, name: str, seed: int, options: Namespace) -> dict[str, Any]:
    """What a system says of the test split with the settings that validation chose: `test`, and settings, tried (how many
    were), valid (its figure), seconds, commit."""
    chosen = chosen_settings(problem, name, options)
    one = run_one(problem, name, chosen["settings"], seed, options)
    return one | {"tried": chosen["tried"], "settings": chosen["settings"]}


def chosen_settings(problem: Problem, name: str, options: Namespace) -> dict[str, Any]:
    """The settings that are best on validation with the first seed, of BUDGET at most; of one alone nothing is asked."""
    tries = SYSTEMS[name].settings(problem)[: 1 if options.quick else BUDGET]
    if len(tries) == 1:
        return {"settings": tries[0], "tried": 1}
    found = [run_one(problem, name, settings, options.seeds[0], options)["valid"] for settings in tries]
    return {"settings": tries[int(np.argmax(found))], "tried": len(tries)}


def run_one(problem: Problem, name: str, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, Any]:
    """The answer with given settings and seed, run unless it is kept. Raises InputError where what is kept was asked otherwise."""
    said = "-".join(str(value) for value in settings.values())
    folder = options.work / "answers" / problem.name
    path = folder / "-".join(filter(None, (name, said, str(seed))))
    head = path.with_suffix(path.suffix + ".json")
    asked = _asked(problem, name, settings)
    if head.is_file():
        about = json.loads(head.read_text(encoding="utf-8"))
        if about.pop("asked", "") != asked:
            raise InputError(
                f"{head}: an answer to other rows, or by another recipe; remove it, or name another --work"
            )
        return about | {"test": _load(path)}
    start = time.monotonic()
    found = SYSTEMS[name].fit(problem, settings, seed, options)
    valid = figures(problem, "valid", found["valid"])["metrics"][problem.metric] if "valid" in found else None
    folder.mkdir(parents=True, exist_ok=True)
    _save(path, found["test"])
    about = {"valid": valid, "seconds": round(time.monotonic() - start, 1), "commit": options.commit}
    write_json(head, about | {"asked": asked})
    return about | {"test": found["test"]}


def _asked(problem: Problem, name: str, settings: dict[str, Any]) -> str:
    """A digest of what is asked, as a reader sees it, and of our systems of how their run is made."""
    made = behind(problem, settings) if name.startswith("m6rec") else ()
    return xxhash.xxh3_64_hexdigest("\n".join([*problem.texts("test"), repr(made)]).encode("utf-8", "surrogatepass"))


def _save(path: Path, answer: Any) -> None:
    if isinstance(answer, list):
        path.with_suffix(path.suffix + ".txt").write_text(json.dumps(answer, ensure_ascii=False), encoding="utf-8")
    else:
        np.save(path.with_suffix(path.suffix + ".npy"), answer)


def _load(path: Path) -> Any:
    texts = path.with_suffix(path.suffix + ".txt")
    if texts.is_file():
        return json.loads(texts.read_text(encoding="utf-8"))
    return np.load(path.with_suffix(path.suffix + ".npy"))
