"""The sweep under way: starts trials, reads their validations, prunes, records how each ended, and stops them on a signal.

A trial is a run folder, DIR/trials/NNNN, which `m6rec train` fills in a process of its own. What is known of it lies in
the run's metrics.jsonl and in the journal, so that the same command goes on after a crash of either.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m6rec_jax.artifacts.best import best_of
from m6rec_jax.config import Config
from m6rec_jax.errors import InputError, Requeue
from m6rec_jax.progress import Stage, note, stage
from m6rec_jax.signals import Signals
from m6rec_jax.sweep.journal import distributions, settings_of
from m6rec_jax.sweep.launch import LEAVE_SECONDS, STOPPED, Job, Launcher
from m6rec_jax.sweep.space import Axis, Value, overrides, text, with_values
from m6rec_jax.training.guards import finite
from m6rec_jax.training.metrics import read_rows

POLL_SECONDS = 1.0
SAVED = 75  # of `m6rec train`: saved after a signal, or ended by its watchdog
RESTARTS = 5  # of a training that ended so without being asked to
HOPELESS = 5  # failures in a row after which the fault is hardly the trials'
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Sweep:
    """All that the loop needs."""

    out: Path
    base: Config
    axes: Sequence[Axis]
    datasets: Sequence[str]  # as --dataset of `m6rec train` takes them
    trials: int
    jobs: int
    launcher: Launcher
    study: Any

    @property
    def metric(self) -> str:
        """The figure that trials are compared by: what chooses the best checkpoint of each."""
        return self.base.train.best

    def run(self, number: int) -> Path:
        return self.out.absolute() / "trials" / f"{number:04d}"

    def log(self, number: int) -> Path:
        return self.run(number).with_suffix(".log")

    def command(self, number: int, values: dict[str, Value]) -> list[str]:
        """What trains a trial, and goes on with one that was interrupted."""
        words = [sys.executable, "-m", "m6rec_jax.cli", "train", "--config", str(self.out.absolute() / CONFIG)]
        for name in self.datasets:
            words += ["--dataset", name]
        return [*words, "--run", str(self.run(number)), *overrides(values)]


@dataclass
class Under:
    """A trial under way."""

    trial: Any  # of Optuna
    values: dict[str, Value]
    job: Job
    slot: int
    since: float  # when its process was started
    restarts: int = 0
    pruned_at: float = 0.0  # when it was told to stop; 0: it was not

    @property
    def number(self) -> int:
        return self.trial.number


def validations(run: Path, metric: str) -> list[tuple[int, float]]:
    """`(step, figure)` of each validation of a run so far that training itself counts: all of its figures are numbers."""
    name = f"valid/{metric}"
    rows = (row for row in read_rows(run) if name in row)
    figures_of = lambda row: {key: value for key, value in row.items() if key.startswith("valid/")}  # noqa: E731
    return [(int(row["step"]), float(row[name])) for row in rows if finite(figures_of(row))]


def run_sweep(sweep: Sweep, tell: Callable[[], None]) -> None:
    """Train until there are `sweep.trials` trials, whatever they ended as; `tell` writes the table after each.

    Raises KeyboardInterrupt after Ctrl-C and Requeue after SIGTERM, both once every trial has saved and ended, and
    InputError when trials fail one after another.
    """
    loop = _Loop(sweep, tell)
    with (
        Signals("stopping: the trials under way save and end") as told,
        stage("sweep", sweep.trials, "trials", done=loop.ended()) as bar,
    ):
        try:
            while not told.number:
                loop.fill(bar)
                if not loop.under:
                    return
                time.sleep(POLL_SECONDS)
                for one in list(loop.under):
                    loop.look(one, bar)
        finally:
            loop.leave()
            tell()
        if told.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Requeue(
            f"{loop.ended()} of {sweep.trials} trials have ended, the others are saved; the same command goes on"
        )


class _Loop:
    def __init__(self, sweep: Sweep, tell: Callable[[], None]):
        from optuna.trial import Trial, TrialState

        self.sweep, self.study, self.tell, self.state = sweep, sweep.study, tell, TrialState
        self.space = distributions(sweep.axes)
        self.under: list[Under] = []
        self.failures = 0  # in a row
        self.waiting = [
            Trial(self.study, one._trial_id) for one in self.study.get_trials(deepcopy=False) if one.state == TrialState.RUNNING
        ]  # fmt: skip

    def ended(self) -> int:
        return sum(one.state.is_finished() for one in self.study.get_trials(deepcopy=False))

    def fill(self, bar: Stage) -> None:
        """Give every free worker a trial: first those that an earlier sweep left unfinished."""
        while len(self.under) < self.sweep.jobs:
            if self.waiting:
                trial = self.waiting.pop(0)
                if set(trial.params) != set(self.space):
                    self.fail(trial, "the sweep ended before its settings were drawn")
                    bar.advance(1, **self.figures())
                    continue
                note(f"trial {trial.number}: taken up where it stopped")
            elif len(self.study.get_trials(deepcopy=False)) < self.sweep.trials:
                trial = self.study.ask(self.space)
            else:
                return
            values = settings_of(trial.params, self.sweep.axes)
            try:
                with_values(self.sweep.base, values)
            except InputError as error:
                self.fail(trial, str(error))
                bar.advance(1, **self.figures())
                continue
            slot = min(set(range(self.sweep.jobs)) - {one.slot for one in self.under})
            before = trial.user_attrs.get("job")
            log, run = self.sweep.log(trial.number), self.sweep.run(trial.number)
            job = self.sweep.launcher.adopt(before, log, run) if before else None
            self.under.append(Under(trial, values, job or self.start(trial, values, slot), slot, time.monotonic()))

    def start(self, trial: Any, values: dict[str, Value], slot: int) -> Job:
        job = self.sweep.launcher.start(self.sweep.command(trial.number, values), self.sweep.log(trial.number), slot)
        trial.set_user_attr("job", job.name)
        return job

    def look(self, one: Under, bar: Stage) -> None:
        """Report new validations of a trial, prune it, or record how it ended."""
        trial, code = one.trial, one.job.code()  # the code first: what was measured before the end is then all there
        found = validations(self.sweep.run(one.number), self.sweep.metric)
        known = self.reported(trial)
        # Validations are counted: trials whose row lengths differ validate at different steps.
        for count, (_, value) in enumerate(found, 1):
            if count not in known:
                trial.report(value, count)
        if code is None:
            if one.pruned_at:
                if time.monotonic() - one.pruned_at > LEAVE_SECONDS:
                    one.job.kill()
                    one.pruned_at = time.monotonic()
            elif len(found) > len(known) and trial.should_prune():
                one.pruned_at = time.monotonic()
                one.job.stop()
            return
        if code in (SAVED, STOPPED, -signal.SIGTERM) and not one.pruned_at and one.restarts < RESTARTS:
            one.restarts += 1
            note(f"trial {one.number}: its training was stopped from outside (exit code {code}); starting it again")
            one.job = self.start(trial, one.values, one.slot)
            return
        self.under.remove(one)
        self.spent(one)
        shown = ", ".join(f"{key}={text(value)}" for key, value in one.values.items())
        if code == 0 and found:
            step, value = found[best_of(self.sweep.metric, [figure for _, figure in found])]
            trial.set_user_attr("step", step)
            self.study.tell(trial, value)
            self.failures = 0
            best = " (the best so far)" if self.study.best_trial.number == one.number else ""
            note(f"trial {one.number}: {self.sweep.metric} {value:.4f}{best}; {shown}")
        elif one.pruned_at:
            self.study.tell(trial, state=self.state.PRUNED)
            self.failures = 0
            note(
                f"trial {one.number}: pruned at {self.sweep.metric} {found[-1][1]:.4f} after step {found[-1][0]:,}; {shown}"
            )
        else:
            self.fail(trial, error_line(one.job.said(), code))
        bar.advance(1, **self.figures())
        self.tell()
        if self.failures >= HOPELESS:
            raise InputError(f"{self.failures} trials failed one after another, the last with: {trial.user_attrs['error']}; mend that, and give the same command with more --trials")  # fmt: skip

    def reported(self, trial: Any) -> set[int]:
        return set(self.study._storage.get_trial(trial._trial_id).intermediate_values)

    def fail(self, trial: Any, error: str) -> None:
        trial.set_user_attr("error", error)
        self.study.tell(trial, state=self.state.FAIL)
        self.failures += 1
        note(f"trial {trial.number}: failed: {error}")

    def spent(self, one: Under) -> None:
        """Add the seconds of this process to those of the trial."""
        seconds = time.monotonic() - one.since
        one.trial.set_user_attr("seconds", round(one.trial.user_attrs.get("seconds", 0.0) + seconds, 1))

    def figures(self) -> dict[str, Any]:
        """What the bar shows beside the count."""
        trials = self.study.get_trials(deepcopy=False)
        values = [one.value for one in trials if one.state == self.state.COMPLETE]
        counted = {
            name: sum(one.state == state for one in trials)
            for name, state in (("pruned", self.state.PRUNED), ("failed", self.state.FAIL))
        }
        metric = self.sweep.metric
        return ({f"best {metric}": values[best_of(metric, values)]} if values else {}) | counted

    def leave(self) -> None:
        """Have every trial under way save and end; it stays unfinished in the journal, and is taken up next time."""
        for one in self.under:
            one.job.stop()
        try:
            until = time.monotonic() + LEAVE_SECONDS
            while any(one.job.code() is None for one in self.under) and time.monotonic() < until:
                time.sleep(0.1)
        finally:  # a second Ctrl-C
            for one in self.under:
                if one.job.code() is None:
                    one.job.kill()
                self.spent(one)


def error_line(said: str, code: int) -> str:
    """What a training that failed said last: its own line, or the last one there is; how it ended where it said nothing."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    own = [line.removeprefix("m6rec: ") for line in lines if line.startswith("m6rec: ")]
    ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    last = (own or lines or [""])[-1]
    return f"{ended}: {last}" if last else f"{ended}, and it said nothing"
