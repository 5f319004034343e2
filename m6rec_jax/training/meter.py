"""What steps measured, read one step late and summed up a logged row."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
import optax

from m6rec_jax.config import Config
from m6rec_jax.model.experts import Routing
from m6rec_jax.objectives.detection import Detection
from m6rec_jax.training.guards import Spike, SpikeWatch, check_skips
from m6rec_jax.training.metrics import Labels, by_label
from m6rec_jax.training.step import StepMetrics


class Meter:
    """Reads measurements one step late, so that the device never waits for the host, and sums them up a logged row."""

    def __init__(self, config: Config, labels: Labels, learning_rate: optax.Schedule):
        self.config, self.labels, self.learning_rate = config, labels, learning_rate
        self.shown: dict[str, Any] = {}
        self.tokens = self.positions = 0  # since this process began
        self.began = False  # whether a step was dispatched
        self._held: tuple[StepMetrics, int, int] | None = None
        self._spike: Spike | None = None
        self._spikes = SpikeWatch(config.train.spike)
        self.restart()

    def restart(self) -> None:
        """Begin a row: what passes before this is not counted as training time."""
        self._since, self._steps, self._tokens, self._norm, self._skipped = time.perf_counter(), 0, 0, 0.0, 0
        self._loss = self._weight = np.zeros(len(self.labels))
        self._routing: Routing | None = None
        self._relation = 0.0
        self._detection: Detection | None = None
        self._also: dict[str, float] = {}

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
        train = self.config.train
        check_skips(train, int(guard.in_a_row), at, float(held.grad_norm), float(guard.norm))
        spike = self._spikes.see(at, began, float(loss.sum() / max(weight.sum(), 1)))
        self._loss, self._weight = self._loss + loss, self._weight + weight
        if (routing := held.losses.routing) is not None:
            self._routing = jax.tree.map(np.add, self._routing or Routing(0, 0, 0, 0), jax.device_get(routing))
        self._steps, self._tokens = self._steps + 1, self._tokens + int(held.tokens)
        if (relation := held.losses.relation) is not None:
            self._relation += float(relation)
            self._also["loss/distill"] = self._relation / max(self._tokens, 1)
        if (detection := held.losses.detection) is not None:
            told = jax.device_get(detection)
            self._detection = told if self._detection is None else jax.tree.map(np.add, self._detection, told)
            self._also |= self._detection.means()
        if held.sparsity is not None:
            self._also["sparsity"] = float(held.sparsity)
        self._norm, self._skipped = self._norm + float(held.grad_norm), int(held.skipped)
        config = self.config.data
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
        config, seconds = self.config.data, time.perf_counter() - self._since
        pairs = by_label(self.labels, self._loss, self._weight)
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
            "learning_rate": float(self.learning_rate(step - 1)),
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
