"""Which figure of a validation chooses the best checkpoint (`train.best`), and which way it is better."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from m6rec_jax.artifacts.run import RUN_FILE, read_run_file
from m6rec_jax.config.train import BEST
from m6rec_jax.errors import InputError

FALLING = ("loss", "log_loss", "ece")  # the smaller the better; every other measure: the larger
FLOOR = "unigram"  # what a loss is compared with: the same at every validation, so it chooses nothing


def smaller_is_better(name: str) -> bool:
    """Which way a figure `measure[/task][@domain]` is better."""
    return _measure(name) in FALLING


def gain(name: str, value: float) -> float:
    """The figure so that more is better."""
    return -value if smaller_is_better(name) else value


def best_of(name: str, values: Sequence[float]) -> int:
    """Where the best of them stands, the first of equals."""
    return max(range(len(values)), key=lambda at: gain(name, values[at]))


def better(name: str, new: float | None, old: float | None) -> bool:
    """Whether `new` takes the place of `old`; None: not measured."""
    return new is not None and (old is None or gain(name, new) > gain(name, old))


def check_measured(name: str, measured: Iterable[str]) -> None:
    """Raise InputError, naming what there is, unless `name` is among the figures that validation gives.

    The one that is set when nobody sets it may be missing (no user to validate on): the newest step then counts as best.
    """
    known = sorted({one for one in measured if _measure(one) != FLOOR})
    if name not in known and name != BEST:
        raise InputError(f"train.best={name}: validation does not measure it; name one of {', '.join(known) or BEST}")


def metric_of(run: Path | str) -> str:
    """The `train.best` that a run was last trained with; of a folder without `run.json`, and of runs of before the setting,
    what is set when nobody sets it."""
    if not (Path(run) / RUN_FILE).is_file():
        return BEST
    return str(read_run_file(run)["config"].get("train", {}).get("best", BEST))


def _measure(name: str) -> str:
    return re.split("[/@]", name, maxsplit=1)[0]
