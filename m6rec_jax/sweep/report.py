"""What a sweep leaves behind: trials.csv, best.yaml and the charts."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m6rec_jax.artifacts.atomic import write_text
from m6rec_jax.artifacts.best import best_of, gain
from m6rec_jax.config import Config, dump_config
from m6rec_jax.sweep.journal import settings_of
from m6rec_jax.sweep.space import Axis, Value, text, with_values

TABLE, BEST = "trials.csv", "best.yaml"
WORDS = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}


@dataclass(frozen=True)
class Row:
    """A trial: how it ended, its best validation figure (`train.best`, None before the first), seconds of training, settings."""

    trial: int
    state: str
    value: float | None
    step: int | None
    validations: int
    seconds: float | None
    values: dict[str, Value]
    error: str


def rows(study: Any, axes: Sequence[Axis], metric: str) -> list[Row]:
    """A row a trial, in order of number."""
    made = []
    for one in study.get_trials(deepcopy=False):
        found = list(one.intermediate_values.values())
        whole = set(one.params) == {axis.key for axis in axes}
        made.append(
            Row(
                one.number,
                WORDS.get(one.state.name, one.state.name.lower()),
                one.value if one.state.name == "COMPLETE" else found[best_of(metric, found)] if found else None,
                one.user_attrs.get("step"),
                len(found),
                one.user_attrs.get("seconds"),
                settings_of(one.params, axes) if whole else {},
                one.user_attrs.get("error", ""),
            )
        )
    return made


def best(table: Sequence[Row], metric: str) -> Row | None:
    """The trial of the best figure among those that ran to their end."""
    complete = [row for row in table if row.state == "complete" and row.value is not None]
    return max(complete, key=lambda row: (gain(metric, row.value or 0.0), -row.trial), default=None)


def write_table(path: Path, table: Sequence[Row], axes: Sequence[Axis], metric: str) -> None:
    """`path`, a line a trial; empty cells where there is nothing to tell."""
    keys = [axis.key for axis in axes]
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    lines.writerow(["trial", "state", f"valid/{metric}", "step", "validations", "seconds", *keys, "error"])
    for row in table:
        settings = [text(row.values[key]) if key in row.values else "" for key in keys]
        cells = [row.trial, row.state, row.value, row.step, row.validations, row.seconds, *settings, row.error]
        lines.writerow(["" if cell is None else cell for cell in cells])
    write_text(path, buffer.getvalue())


def write_best(path: Path, row: Row, base: Config, datasets: Sequence[str]) -> str:
    """The whole configuration of the best trial, for --config. Returns the command that trains it."""
    words = ["m6rec", "train", "--config", str(path)]
    for name in datasets:
        words += ["--dataset", name]
    command = shlex.join([*words, "--run", "runs/best"])
    head = (
        f"# trial {row.trial} of the sweep: valid/{base.train.best} {row.value:.4f} at step {row.step}\n# {command}\n\n"
    )
    write_text(path, head + dump_config(with_values(base, row.values)))
    return command
