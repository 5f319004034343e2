"""Settings of the optimiser and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from m6rec_jax.config.checks import above_zero, at_least, below_one, check

Optimiser = Literal["adamw", "muon", "adafactor", "sgd"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule (training/optim).

    Args:
        name: adamw; muon (orthogonal updates of layer matrices, AdamW for the rest); adafactor (second moments as rows and
            columns, no first); sgd (with momentum b1).
        schedule: after the warm-up cosine or linear down to `final`; constant; wsd = constant, then down over the last fifth.
        learning_rate: at the end of the warm-up.
        warmup: steps of linear warm-up.
        final: learning rate at the last step, as a share of learning_rate.
        weight_decay: on matrices; norms and embeddings are left alone.
        b1: decay of the first moment.
        b2: decay of the second moment.
        clip: global gradient norm above which gradients are scaled down.
        label_smoothing: share of every target's mass spread over its vocabulary slice in training.
        average: decay of a running mean of the parameters, which is then what is validated, kept and served beside those
            that are trained on (Polyak and Juditsky 1992); 0 = the parameters themselves.
        negatives: a vocabulary slice of more ids is normalised over so many drawn at random; 0 = always over all.
    """

    name: Optimiser = "adamw"
    schedule: Schedule = "cosine"
    learning_rate: float = 1e-3
    warmup: int = 100
    final: float = 0.05
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.98
    clip: float = 1.0
    label_smoothing: float = 0.1
    average: float = 0.0
    negatives: int = 0

    def __post_init__(self) -> None:
        for name, known in (("name", Optimiser), ("schedule", Schedule)):
            value = getattr(self, name)
            check(value in get_args(known), f"optim.{name}={value}: must be one of {', '.join(get_args(known))}")
        above_zero("optim", self, "learning_rate")
        at_least(0, "optim", self, "warmup", "weight_decay", "negatives")
        below_one("optim", self, "b1", "b2", "label_smoothing", "average")
        check(0 <= self.final <= 1, f"optim.final={self.final}: must lie between 0 and 1")
        check(self.clip > 0, f"optim.clip={self.clip}: must be above 0")  # .inf clips nothing
