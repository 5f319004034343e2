"""Settings of the training loop and of what it keeps."""

from __future__ import annotations

from dataclasses import dataclass

from m6rec_jax.config.checks import above_zero, at_least, check

BEST = "ndcg@10"


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept under `run/checkpoints/`.

    Args:
        every: steps between saves.
        keep: newest checkpoints kept; the best one by validation is kept beside them.
    """

    every: int = 200
    keep: int = 2

    def __post_init__(self) -> None:
        above_zero("checkpoint", self, "every", "keep")


@dataclass(frozen=True)
class TrainConfig:
    """The loop (training/loop).

    Args:
        steps: optimiser steps; with `epochs`, at most so many.
        epochs: passes over the histories after which training ends (training/fit: some more over few); 0 = `steps`
            alone decides.
        accumulate: slices of a batch whose gradients are added before one step; must divide data.rows.
        log_every: steps between lines in metrics.jsonl.
        eval_every: steps between validations; 0 = only at the end. With `epochs`, at most so many, and an eighth of the run.
        best: figure of validation that chooses the best checkpoint, without `valid/`: of the ranking (ndcg@10, recall@10), a
            loss such as loss/next-item, or one of a task of the dataset's own such as auc/click; of losses the smaller is the better one.
        patience: validations without a better figure of that name before training stops; 0 = never.
        seed: of parameters, data order and dropout.
        explode: a step whose gradient norm is above so many times the running mean changes nothing; 0 = only where it is
            not finite.
        max_skips: steps in a row that change nothing before training stops.
        spike: a loss above the running median by so many times the usual distance from it, for some steps, is rewound
            (training/guards); 0 = never, so that every plan entry is used exactly once.
        rewinds: how often, before training stops.
        hang_seconds: without a finished step, validation or save before the process writes its stacks and ends with exit code 70;
            0 = waits for ever.
        profile: steps START:STOP whose trace is written under run/profile; empty = none.
    """

    steps: int = 1000
    epochs: float = 0.0
    accumulate: int = 1
    log_every: int = 20
    eval_every: int = 200
    best: str = BEST
    patience: int = 0
    seed: int = 0
    explode: float = 100.0
    max_skips: int = 10
    spike: float = 0.0
    rewinds: int = 3
    hang_seconds: float = 1800.0
    profile: str = ""

    def __post_init__(self) -> None:
        above_zero("train", self, "steps", "accumulate", "log_every", "max_skips")
        at_least(0, "train", self, "epochs", "eval_every", "patience", "spike", "rewinds", "hang_seconds")
        check(bool(self.best.strip()), f"train.best={self.best!r}: must name a figure of validation, such as {BEST}")
        check(self.explode == 0 or self.explode > 1, f"train.explode={self.explode}: must be above 1, or 0 for never")
        start, colon, stop = self.profile.partition(":")
        fits = not self.profile or (colon and start.isdigit() and stop.isdigit() and 0 < int(start) < int(stop))
        check(bool(fits), f"train.profile={self.profile}: give the steps as START:STOP, such as 100:110, START from 1")
        check(0 <= self.seed < 2**32, f"train.seed={self.seed}: must be at least 0 and below 2^32")
