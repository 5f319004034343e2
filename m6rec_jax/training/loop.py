"""The loop. Its order is fixed: dispatch the step, read the step before, validate and save, pull the next batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from m6rec_jax.artifacts.best import better, check_measured
from m6rec_jax.artifacts.checkpoints import step_folder, steps
from m6rec_jax.artifacts.manifest import MANIFEST
from m6rec_jax.config import Config
from m6rec_jax.data.records import BadRecords
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import Catalogues
from m6rec_jax.progress import note, stage
from m6rec_jax.signals import Signals
from m6rec_jax.training.checkpoint import CheckpointWriter, Position, disown, restore, sweep, unsaved
from m6rec_jax.training.feed import Batches, Feed
from m6rec_jax.training.goodput import Ledger, goodput
from m6rec_jax.training.guards import (  # fmt: skip
    Spike,
    TooManySkips,
    finite,
    read_rewinds,
    rewind_of,
    write_rewinds,
)
from m6rec_jax.training.meter import Meter
from m6rec_jax.training.metrics import Labels, MetricsLog, read_rows
from m6rec_jax.training.profiler import Profiler
from m6rec_jax.training.sharding import place_batch
from m6rec_jax.training.state import TrainState, abstract_state
from m6rec_jax.training.step import StepMetrics
from m6rec_jax.training.straggler import Stragglers
from m6rec_jax.training.together import agree
from m6rec_jax.training.watchdog import Watchdog

FAULT = 1000  # above every signal
Evaluator = Callable[[Any], dict[str, float]]  # parameters on the mesh -> named figures


@dataclass(frozen=True)
class Loop:
    """All that the loop needs, made by `run.train`. `validate` gives figures named as in metrics.jsonl, less `valid/`."""

    config: Config
    run: Path
    mesh: jax.sharding.Mesh
    labels: Labels
    step: Callable[..., tuple[TrainState, StepMetrics]]
    items: Catalogues
    batches: Batches
    bad: BadRecords
    cursor: Callable[[int], tuple[int, int]]
    learning_rate: optax.Schedule
    validate: Evaluator
    writer: CheckpointWriter
    ledger: Ledger


def train_loop(loop: Loop, state: TrainState, rows: int) -> TrainState:
    """Train from `state` (with `rows` consumed) to the last step, or until validation stops improving.

    Raises Requeue after SIGTERM and KeyboardInterrupt after Ctrl-C, both once the state is saved, and InputError when the
    guards give up or a record cannot be read in any process.
    """
    config, first, ledger = loop.config, int(state.step), loop.ledger
    speaking = jax.process_index() == 0
    log = MetricsLog(loop.run, first) if speaking else None
    best, since_best = _best_so_far(loop.run, config.train.best, first)
    looked_through = False  # whether a validation of this process was looked through for `train.best`
    if config.train.patience and since_best >= config.train.patience and first < config.train.steps:
        note(f"stopped at step {first} in an earlier run: {_said(config.train.best, best, since_best)}")
        return state
    stop, stragglers, profiler = (
        Signals("stopping after this step; saving"),
        Stragglers(),
        Profiler(loop.run, config.train.profile),
    )
    meter, feed = (
        Meter(config, loop.labels, loop.learning_rate),
        _feed(loop, Position(rows, *loop.cursor(rows)), first),
    )
    watch = Watchdog(loop.run, jax.process_index(), config.train.hang_seconds)
    done, look, keep = first, False, False  # the last two: a validation, a save is due
    try:
        with stop, watch, stage("train", config.train.steps, "steps", done=first) as bar:
            ledger.switch("data wait")
            batch = feed.pull() if first < config.train.steps else None
            while done < config.train.steps:
                done += 1
                profiler.before(done)
                with jax.set_mesh(loop.mesh):
                    with stragglers.own():
                        placed = place_batch(loop.mesh, batch, config.train.accumulate)
                    ledger.switch("step" if meter.began else "compile")
                    state, measured = loop.step(state, placed, loop.items)
                    ledger.switch("step")
                row, rows = feed.row, feed.row + config.data.rows

                spike = meter.take(measured, done, row)
                bar.advance(1, **meter.shown)
                watch.beat(f"step {done}")
                if profiler.after(done, done == config.train.steps):
                    jax.block_until_ready(measured)
                    jax.profiler.stop_trace()
                stopping = _asked(stop, feed.fault)
                stragglers.step()
                if spike is not None:
                    state, position, log = _go_back(loop, state, spike, rows, first, log)
                    ledger.lose(done - int(state.step), done - first)
                    best, since_best = _best_so_far(loop.run, config.train.best, int(state.step))
                    done, feed = int(state.step), _feed(loop, position, int(state.step))
                    meter.forget()
                    batch = feed.pull()
                    continue

                last = done == config.train.steps
                figures: dict[str, float] = {}
                look |= last or bool(config.train.eval_every and done % config.train.eval_every == 0)
                keep |= look or stopping or done % config.checkpoint.every == 0
                # What is due while steps are being skipped waits for one that counts.
                bad = keep and int(state.guard.in_a_row) > 0
                if look or done % config.train.log_every == 0:
                    line = meter.row(done) | _where(ledger) | _left_out(loop.bad)
                    if log:
                        log.write(line)
                        ledger.write(loop.run, first, done)
                if look and not bad:
                    look = False
                    ledger.switch("validate")
                    figures = loop.validate(state.served)
                    watch.beat(f"the validation of step {done}")
                    if log:
                        log.write({"step": done, **{f"valid/{name}": value for name, value in figures.items()}})
                    bad = not finite(figures)
                    if not bad and better(config.train.best, figures.get(config.train.best), best):
                        best, since_best = figures[config.train.best], 0
                    else:
                        since_best += 1
                    meter.restart()
                enough = bool(config.train.patience) and since_best >= config.train.patience
                ledger.switch("save")
                if keep and not bad:
                    keep = False
                    loop.writer.save(state, Position(rows, *loop.cursor(rows)), figures)
                    watch.beat(f"the save of step {done}")
                if figures and not (bad or looked_through):  # once what was learnt is saved
                    looked_through = True
                    check_measured(config.train.best, figures)
                if stopping or (keep and (last or enough)):
                    loop.writer.wait()
                    saved = unsaved(loop.run, done) if keep else f"saved step {done}"
                    if stopping:
                        stop.leave(saved)
                    note(saved)
                if enough:
                    note(f"{_said(config.train.best, best, since_best)}; stopped at step {done}")
                    break
                ledger.switch("data wait")
                if not last:
                    with stragglers.own():
                        batch = feed.pull()
            ledger.switch("save")
            loop.writer.wait()
        if meter.positions:
            note(f"packing: {meter.tokens / meter.positions:.1%} of {meter.positions:,} positions carried a token")
    except InputError as error:
        loop.writer.wait()  # the last good state is still being saved
        if isinstance(error, TooManySkips) and speaking:
            disown(loop.run, error.counted)
        raise
    finally:
        profiler.close()
        if log:
            log.close()
            if done > first:
                ledger.write(loop.run, first, done)
    return state


def _where(ledger: Ledger) -> dict[str, float]:
    """The ledger in a logged row."""
    ledger.switch(ledger.kind)
    return {f"seconds/{kind}": value for kind, value in ledger.seconds.items() if value} | {
        "goodput": goodput(ledger.seconds)
    }


def _go_back(
    loop: Loop, state: TrainState, spike: Spike, end_row: int, first: int, log: MetricsLog | None
) -> tuple[TrainState, Position, MetricsLog | None]:
    """Restore the newest step before a spike, of all processes together, and have its rows left out from now on."""
    loop.writer.wait()
    agree(lambda: None)  # the first process has given the last save its manifest
    config, done = loop.config.train, read_rewinds(loop.run)
    known = [step for step in steps(loop.run) if step >= first]
    rewind = agree(lambda: rewind_of(spike, end_row, known, done, config.rewinds), lambda made: {"rewind": str(made)})

    def settle() -> None:
        if jax.process_index() == 0:
            for step in known:
                if step > rewind.to:  # first: a crash here only lets the spike come again
                    (step_folder(loop.run, step) / MANIFEST).unlink()
            write_rewinds(loop.run, [*done, rewind])

    agree(settle)
    if jax.process_index() == 0:
        sweep(loop.run)
    with jax.set_mesh(loop.mesh):
        restored = restore(loop.run, abstract_state(state))
    assert restored is not None
    note(
        f"step {spike.last}: the loss spiked from {spike.usual:.4g} to {spike.loss:.4g}; back to step {rewind.to}, and rows "
        f"{rewind.first_row:,} to {end_row - 1:,} of the plan are left out ({len(done) + 1} of {config.rewinds} rewinds)"
    )
    if log:
        log.close()
        log = MetricsLog(loop.run, rewind.to)
        log.write({"step": rewind.to, **{f"rewind/{name}": value for name, value in asdict(rewind).items()}})
    return *restored, log


def _feed(loop: Loop, position: Position, step: int) -> Feed:
    return Feed(loop.config.data, loop.batches, position, step, read_rewinds(loop.run))


def _left_out(bad: BadRecords) -> dict[str, int]:
    """Damaged records left out by this process, where there are any, in a logged row."""
    return {"bad_records": len(bad)} if len(bad) else {}


def _asked(stop: Signals, fault: InputError | None) -> bool:
    """Whether any process was told to stop; all processes agree at the same step. A signal that comes while they
    exchange is kept for the next step. Raises InputError in all, in the same words, when one has a `fault`."""
    told = FAULT if fault else stop.number
    if jax.process_count() > 1:
        told = int(np.max(multihost_utils.process_allgather(np.array(told))))
    if told == FAULT:
        agree(lambda: _refuse(fault))
    if told:
        stop.number = told
    return bool(told)


def _refuse(fault: InputError | None) -> None:
    if fault is not None:
        raise fault


def _best_so_far(run: Path, name: str, step: int) -> tuple[float | None, int]:
    """The best figure `name` of the validations up to `step`, and how many of them came after it."""
    best, since = None, 0
    for row in read_rows(run):
        if row["step"] > step or f"valid/{name}" not in row:
            continue
        figures = {key: value for key, value in row.items() if key.startswith("valid/")}
        since += 1
        if finite(figures) and better(name, figures[f"valid/{name}"], best):
            best, since = figures[f"valid/{name}"], 0
    return best, since


def _said(name: str, best: float | None, since: int) -> str:
    """Why patience is over, in words."""
    return (
        f"no {name} in {since} validations"
        if best is None
        else f"no better {name} than {best:.4f} in {since} validations"
    )
