"""The loop. Its order is fixed: dispatch the step, read the step before, validate and save, pull the next batch."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from m6rec_jax.artifacts.checkpoints import BEST_METRIC
from m6rec_jax.config import Config
from m6rec_jax.errors import Requeue
from m6rec_jax.model.experts import Routing
from m6rec_jax.model.items import Catalogues
from m6rec_jax.progress import note, stage
from m6rec_jax.training.checkpoint import CheckpointWriter, Position
from m6rec_jax.training.metrics import Labels, MetricsLog, by_label, read_rows
from m6rec_jax.training.sharding import place_batch
from m6rec_jax.training.state import TrainState
from m6rec_jax.training.step import StepMetrics

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
    batches: Iterator[dict[str, np.ndarray]]
    cursor: Callable[[int], tuple[int, int]]
    learning_rate: optax.Schedule
    validate: Evaluator
    writer: CheckpointWriter


def train_loop(loop: Loop, state: TrainState, rows: int) -> TrainState:
    """Train from `state` (with `rows` consumed) to the last step, or until validation stops improving.

    Raises Requeue after SIGTERM and KeyboardInterrupt after Ctrl-C, both once the state is saved.
    """
    config, first = loop.config, int(state.step)
    log = MetricsLog(loop.run, first) if jax.process_index() == 0 else None
    best, since_best = _best_so_far(loop.run, first)
    if config.train.patience and since_best >= config.train.patience and first < config.train.steps:
        note(
            f"stopped at step {first} in an earlier run: no better {BEST_METRIC} than {best:.4f} in {since_best} validations"
        )
        return state
    stop = _StopSignals()
    reader = _Reader(loop)
    try:
        with stop, stage("train", config.train.steps, "steps", done=first) as bar:
            batch = next(loop.batches, None) if first < config.train.steps else None
            for done in range(first + 1, config.train.steps + 1):
                with jax.set_mesh(loop.mesh):
                    state, measured = loop.step(
                        state, place_batch(loop.mesh, batch, config.train.accumulate), loop.items
                    )
                rows += config.data.rows

                reader.take(measured)
                bar.advance(1, **reader.shown)

                last = done == config.train.steps
                stopping = stop.asked()
                figures: dict[str, float] = {}
                validating = last or (config.train.eval_every and done % config.train.eval_every == 0)
                if validating or done % config.train.log_every == 0:
                    row = reader.row(done)
                    if log:
                        log.write(row)
                if validating:
                    figures = loop.validate(state.served)
                    if log:
                        log.write({"step": done, **{f"valid/{name}": value for name, value in figures.items()}})
                    if figures.get(BEST_METRIC, -1.0) > best:
                        best, since_best = figures[BEST_METRIC], 0
                    else:
                        since_best += 1
                    reader.restart()
                enough = bool(config.train.patience) and since_best >= config.train.patience
                if last or enough or stopping or figures or done % config.checkpoint.every == 0:
                    loop.writer.save(state, Position(rows, *loop.cursor(rows)), figures)
                if stopping:
                    loop.writer.wait()
                    stop.leave(done)
                if enough:
                    note(f"no better {BEST_METRIC} than {best:.4f} in {since_best} validations; stopped at step {done}")
                    break
                if not last:
                    batch = next(loop.batches)
        loop.writer.wait()
        if reader.positions:
            note(f"packing: {reader.tokens / reader.positions:.1%} of {reader.positions:,} positions carried a token")
    finally:
        if log:
            log.close()
    return state


class _Reader:
    """Reads measurements one step late, so that the device never waits for the host, and sums them up a logged row."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self.shown: dict[str, Any] = {}
        self.tokens = self.positions = 0  # since this process began
        self._held: StepMetrics | None = None
        self.restart()

    def restart(self) -> None:
        """Begin a row: what passes before this is not counted as training time."""
        self._since, self._steps, self._tokens, self._norm, self._skipped = time.perf_counter(), 0, 0, 0.0, 0
        self._loss = self._weight = np.zeros(len(self.loop.labels))
        self._routing: Routing | None = None

    def take(self, measured: StepMetrics | None) -> None:
        """Hold the step just dispatched and add up the one before it."""
        held, self._held = self._held, measured
        if held is None:
            return
        self._loss = self._loss + np.asarray(held.losses.loss)
        self._weight = self._weight + np.asarray(held.losses.weight)
        if (routing := held.losses.routing) is not None:
            self._routing = jax.tree.map(np.add, self._routing or Routing(0, 0, 0, 0), jax.device_get(routing))
        self._steps, self._tokens = self._steps + 1, self._tokens + int(held.tokens)
        self._norm, self._skipped = self._norm + float(held.grad_norm), int(held.skipped)
        config = self.loop.config.data
        self.tokens, self.positions = self.tokens + int(held.tokens), self.positions + config.rows * config.length
        rate = self._tokens / (time.perf_counter() - self._since)
        mean = self._loss.sum() / max(self._weight.sum(), 1)
        self.shown |= {"loss": f"{mean:.3f}", "tokens/s": f"{rate:,.0f}"}

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

    def asked(self) -> bool:
        """Whether any process was told to stop; all processes agree at the same step. A signal that comes while they
        exchange is kept for the next step."""
        told = self._signal or 0
        if jax.process_count() > 1:
            told = int(np.max(multihost_utils.process_allgather(np.array(told))))
        if told:
            self._signal = told
        return bool(told)

    def leave(self, step: int) -> None:
        """Raise what the signal means, once the state is safe."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise Requeue(f"saved step {step}; the same command continues from there")


def _best_so_far(run: Path, step: int) -> tuple[float, int]:
    """The best validation figure up to `step`, and how many validations came after it."""
    name = f"valid/{BEST_METRIC}"
    scores = [row[name] for row in read_rows(run) if row["step"] <= step and name in row]
    if not scores:
        return -1.0, 0
    best = int(np.argmax(scores))
    return scores[best], len(scores) - 1 - best
