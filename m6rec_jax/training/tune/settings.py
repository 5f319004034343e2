"""How a task is tuned: length, batches, learning rate and their defaults a method."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import jax
import optax

from m6rec_jax.config.checks import above_zero, at_least, below_one, check
from m6rec_jax.model.tuning import Tuned

# Few fresh numbers want large steps, everything at once small ones. Of option-adapter the best of four that were tried
# (docs/tuning.md), which the other low-rank methods share; those of prompts and of full are the usual ones.
LEARNING_RATES = {"prompt": 0.02, "option": 0.02, "adapter": 0.01, "option-adapter": 0.01, "lora": 0.01, "full": 0.0005}  # fmt: skip


@dataclass(frozen=True)
class TuneSettings:
    """The loop (training/tune/run).

    Args:
        learning_rate: at the end of the warm-up, which is linear; from there it falls linearly to 0.
        epochs: passes over the instances at most.
        rows: instances a step.
        every: steps between validations; 0 = an epoch, and 1,000 at most.
        patience: validations without a better figure before tuning stops; 0 = never.
        warmup: share of the steps.
        weight_decay: on low-rank matrices, gates of prompts (shut, towards the backbone) and, of full, matrices of the layers;
            never on prompts, heads, biases and norms.
        clip: global gradient norm above which gradients are scaled down.
        seed: of fresh numbers, data order and dropout.
    """

    learning_rate: float
    epochs: float = 16.0
    rows: int = 32
    every: int = 0
    patience: int = 4
    warmup: float = 0.06
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        above_zero("tune", self, "learning_rate", "epochs", "rows", "clip")
        at_least(0, "tune", self, "every", "patience", "weight_decay")
        below_one("tune", self, "warmup")
        check(0 <= self.seed < 2**32, f"tune.seed={self.seed}: must be at least 0 and below 2^32")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def rule(self) -> Rule:
        return Rule(self.clip, self.weight_decay)

    def steps(self, instances: int) -> int:
        """All steps, at least one."""
        return max(1, round(self.epochs * -(-instances // self.rows)))

    def validated_every(self, instances: int) -> int:
        return self.every or min(-(-instances // self.rows), 1000)


def learning_rate(settings: TuneSettings, steps: int) -> optax.Schedule:
    """Linear up over the warm-up, linear down to 0 at the last step."""
    up = round(settings.warmup * steps)
    peak = settings.learning_rate
    falls = optax.linear_schedule(peak, 0.0, max(steps - up, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, up), falls], [up]) if up else falls


@dataclass(frozen=True)
class Rule:
    """What of the settings is part of the program of a step."""

    clip: float
    weight_decay: float


def optimizer(rule: Rule) -> optax.GradientTransformation:
    """AdamW over a `Tuned`, gradients clipped by their global norm, before its learning rate: that is the step's argument."""
    return optax.chain(
        optax.clip_by_global_norm(rule.clip),
        optax.scale_by_adam(0.9, 0.98),
        optax.add_decayed_weights(rule.weight_decay, mask=decays),
    )


def decays(tuned: Tuned) -> Tuned:
    """True for what weight decay pulls on: matrices and gates of layers, each of which has an axis of layers in front."""

    def matrix(path: tuple, x: jax.Array) -> bool:
        where = jax.tree_util.keystr(path)
        return x.ndim > 2 and any(part in where for part in (".layers", ".added", "['block']"))

    return jax.tree_util.tree_map_with_path(matrix, tuned)
