"""The loop. Its order is fixed: dispatch the step, read the step before, validate and save, pull the next batch."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from m6rec_jax.artifacts.checkpoints import BEST_METRIC, step_folder, steps
from m6rec_jax.artifacts.manifest import MANIFEST
from m6rec_jax.config import Config
from m6rec_jax.data.packing import ROW_ARRAYS
from m6rec_jax.data.records import BadRecords
from m6rec_jax.errors import InputError, Requeue
from m6rec_jax.model.experts import Routing
from m6rec_jax.model.items import Catalogues
from m6rec_jax.progress import note, stage
from m6rec_jax.training.checkpoint import CheckpointWriter, Position, disown, restore, sweep, unsaved
from m6rec_jax.training.goodput import Ledger, goodput
from m6rec_jax.training.guards import (  # fmt: skip
    Rewind,
    Spike,
    SpikeWatch,
    TooManySkips,
    check_skips,
    finite,
    past_holes,
    read_rewinds,
    rewind_of,
    write_rewinds,
)
from m6rec_jax.training.metrics import Labels, MetricsLog, by_label, read_rows
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
    batches: Callable[[Position, int, list[Rewind]], Iterator[dict[str, np.ndarray]]]  # from there, after that step
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
    best, since_best = _best_so_far(loop.run, first)
    if config.train.patience and since_best >= config.train.patience and first < config.train.steps:
        note(
            f"stopped at step {first} in an earlier run: no better {BEST_METRIC} than {best:.4f} in {since_best} validations"
        )
        return state
    stop, stragglers, profiler = _StopSignals(), Stragglers(), Profiler(loop.run, config.train.profile)
    reader, feed = _Reader(loop), _Feed(loop, Position(rows, *loop.cursor(rows)), first)
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
                    ledger.switch("step" if reader.began else "compile")
                    state, measured = loop.step(state, placed, loop.items)
                    ledger.switch("step")
                row, rows = feed.row, feed.row + config.data.rows

                spike = reader.take(measured, done, row)
                bar.advance(1, **reader.shown)
                watch.beat(f"step {done}")
                if profiler.after(done, done == config.train.steps):
                    jax.block_until_ready(measured)
                    jax.profiler.stop_trace()
                stopping = stop.asked(feed.fault)
                stragglers.step()
                if spike is not None:
                    state, position, log = _go_back(loop, state, spike, rows, first, log)
                    ledger.lose(done - int(state.step), done - first)
                    best, since_best = _best_so_far(loop.run, int(state.step))
                    done, feed = int(state.step), _Feed(loop, position, int(state.step))
                    reader.forget()
                    batch = feed.pull()
                    continue

                last = done == config.train.steps
                figures: dict[str, float] = {}
                look |= last or bool(config.train.eval_every and done % config.train.eval_every == 0)
                keep |= look or stopping or done % config.checkpoint.every == 0
                # What is due while steps are being skipped waits for one that counts.
                bad = keep and int(state.guard.in_a_row) > 0
                if look or done % config.train.log_every == 0:
                    line = reader.row(done) | _where(ledger) | feed.counted()
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
                    if not bad and figures.get(BEST_METRIC, -1.0) > best:
                        best, since_best = figures[BEST_METRIC], 0
                    else:
                        since_best += 1
                    reader.restart()
                enough = bool(config.train.patience) and since_best >= config.train.patience
                ledger.switch("save")
                if keep and not bad:
                    keep = False
                    loop.writer.save(state, Position(rows, *loop.cursor(rows)), figures)
                    watch.beat(f"the save of step {done}")
                if stopping or (keep and (last or enough)):
                    loop.writer.wait()
                    saved = unsaved(loop.run, done) if keep else f"saved step {done}"
                    if stopping:
                        stop.leave(saved)
                    note(saved)
                if enough:
                    note(f"no better {BEST_METRIC} than {best:.4f} in {since_best} validations; stopped at step {done}")
                    break
                ledger.switch("data wait")
                if not last:
                    with stragglers.own():
                        batch = feed.pull()
            ledger.switch("save")
            loop.writer.wait()
        if reader.positions:
            note(f"packing: {reader.tokens / reader.positions:.1%} of {reader.positions:,} positions carried a token")
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


class _Feed:
    """Batches from a position on; `row`: the plan row that the batch last pulled begins with."""

    def __init__(self, loop: Loop, position: Position, step: int):
        self.loop = loop
        self.fault: InputError | None = None
        self._rewinds = read_rewinds(loop.run)
        self.row = -1
        self._next = position.rows
        self._batches = loop.batches(position, step, self._rewinds)

    def pull(self) -> dict[str, np.ndarray]:
        """The next batch. What cannot be read is kept as `fault`, and an empty batch given: the step that the other
        processes take is taken, and then all stop together."""
        config = self.loop.config.data
        self.row = past_holes(self._next, self._rewinds)
        self._next = self.row + config.rows
        try:
            return next(self._batches)
        except InputError as error:
            if jax.process_count() == 1:
                raise
            self.fault = error
            shape = (config.rows // jax.process_count(), config.length)
            return {name: np.zeros(shape, kind) for name, kind in ROW_ARRAYS.items()}

    def counted(self) -> dict[str, int]:
        """Damaged records left out by this process, where there are any."""
        return {"bad_records": len(self.loop.bad)} if len(self.loop.bad) else {}


class _Reader:
    """Reads measurements one step late, so that the device never waits for the host, and sums them up a logged row."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self.shown: dict[str, Any] = {}
        self.tokens = self.positions = 0  # since this process began
        self.began = False  # whether a step was dispatched
        self._held: tuple[StepMetrics, int, int] | None = None
        self._spike: Spike | None = None
        self._spikes = SpikeWatch(loop.config.train.spike)
        self.restart()

    def restart(self) -> None:
        """Begin a row: what passes before this is not counted as training time."""
        self._since, self._steps, self._tokens, self._norm, self._skipped = time.perf_counter(), 0, 0, 0.0, 0
        self._loss = self._weight = np.zeros(len(self.loop.labels))
        self._routing: Routing | None = None
        self._relation, self._also = 0.0, {}

    def forget(self) -> None:
        """What was measured before a rewind counts no more."""
        self._held = self._spike = None
        self._spikes.restart()
        self.restart()

    def take(self, measured: StepMetrics | None, step: int = 0, row: int = 0) -> Spike | None:
        """Hold the step just dispatched, which began with plan row `row`, and add up the one before it; the spike that
        one completed. Raises InputError when too many steps in a row were skipped."""
        taken, self._held = self._held, None if measured is None else (measured, step, row)
        self.began = True
        found, self._spike = self._spike, None
        if taken is None:
            return found
        held, at, began = taken
        guard, loss, weight = held.guard, np.asarray(held.losses.loss), np.asarray(held.losses.weight)
        train = self.loop.config.train
        check_skips(train, int(guard.in_a_row), at, float(held.grad_norm), float(guard.norm))
        spike = self._spikes.see(at, began, float(loss.sum() / max(weight.sum(), 1)))
        self._loss, self._weight = self._loss + loss, self._weight + weight
        if (routing := held.losses.routing) is not None:
            self._routing = jax.tree.map(np.add, self._routing or Routing(0, 0, 0, 0), jax.device_get(routing))
        self._steps, self._tokens = self._steps + 1, self._tokens + int(held.tokens)
        if (relation := held.losses.relation) is not None:
            self._relation += float(relation)
            self._also["loss/distill"] = self._relation / max(self._tokens, 1)
        if held.sparsity is not None:
            self._also["sparsity"] = float(held.sparsity)
        self._norm, self._skipped = self._norm + float(held.grad_norm), int(held.skipped)
        config = self.loop.config.data
        self.tokens, self.positions = self.tokens + int(held.tokens), self.positions + config.rows * config.length
        rate = self._tokens / (time.perf_counter() - self._since)
        mean = self._loss.sum() / max(self._weight.sum(), 1)
        self.shown |= {"loss": f"{mean:.3f}", "tokens/s": f"{rate:,.0f}"}
        if measured is None:  # read for a logged row: the next step answers
            self._spike = spike
            return None
        return spike or found

    def row(self, step: int) -> dict[str, Any]:
        """Means over the steps since the last row, the one just dispatched included; begins the next row."""
        self.take(None)
        config, seconds = self.loop.config.data, time.perf_counter() - self._since
        pairs = by_label(self.loop.labels, self._loss, self._weight)
        row = {
            "step": step,
            "loss": float(self._loss.sum() / max(self._weight.sum(), 1)),
            **{f"loss/{task}": float(loss / weight) for task, loss, weight in pairs if weight > 0},
            **{f"targets/{task}": float(weight / max(self._weight.sum(), 1)) for task, _, weight in pairs},
            **({} if self._routing is None else self._routing.means()),
            **self._also,
            "tokens_per_s": self._tokens / seconds,
            "padding": 1 - self._tokens / (self._steps * config.rows * config.length),
            "step_seconds": seconds / self._steps,
            "grad_norm": self._norm / self._steps,
            "learning_rate": float(self.loop.learning_rate(step - 1)),
            "skipped": self._skipped,
        }
        self.restart()
        by_task = " ".join(f"{task}={row[f'loss/{task}']:.2f}" for task, _, weight in pairs if weight > 0)
        self.shown |= {
            "by task": by_task,
            "padding": f"{row['padding']:.1%}",
            "ms/step": f"{1000 * row['step_seconds']:,.0f}",
            "grad": f"{row['grad_norm']:.2f}",
            "lr": f"{row['learning_rate']:.1e}",
        }
        return row


class _StopSignals:
    """Turns SIGTERM and the first Ctrl-C into a request that the loop answers after the step; a second Ctrl-C is obeyed
    at once."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        note("stopping after this step; saving (Ctrl-C again to stop at once)")

    def asked(self, fault: InputError | None) -> bool:
        """Whether any process was told to stop; all processes agree at the same step. A signal that comes while they
        exchange is kept for the next step. Raises InputError in all, in the same words, when one has a `fault`."""
        told = FAULT if fault else self._signal or 0
        if jax.process_count() > 1:
            told = int(np.max(multihost_utils.process_allgather(np.array(told))))
        if told == FAULT:
            agree(lambda: _refuse(fault))
        if told:
            self._signal = told
        return bool(told)

    def leave(self, saved: str) -> None:
        """Raise what the signal means, once the state is safe."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise Requeue(f"{saved}; the same command continues from there")


def _refuse(fault: InputError | None) -> None:
    if fault is not None:
        raise fault


def _best_so_far(run: Path, step: int) -> tuple[float, int]:
    """The best validation figure up to `step`, and how many validations came after it."""
    name = f"valid/{BEST_METRIC}"
    scores = [row[name] for row in read_rows(run) if row["step"] <= step and name in row]
    if not scores:
        return -1.0, 0
    best = int(np.argmax(scores))
    return scores[best], len(scores) - 1 - best
