"""Settings of rows and packing, and of the mixture of tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from m6rec_jax.config.checks import above_zero, at_least, check


@dataclass(frozen=True)
class DataConfig:
    """How examples become rows (data/).

    Args:
        length: tokens in a row (T); 0 = fitted to the histories of the datasets (training/fit).
        rows: rows in a global batch (B), over all devices and accumulation steps; 0 = as many as hold 1,024 tokens a
            device (training/fit).
        mask_rate: share of a sequence that the masked objectives hide.
        replace_rate: share of a sequence that a generator may replace, where that is to be found out (`replaced`).
        block: plan entries shuffled and packed together.
        threads: reader threads; 0 = the training thread reads.
        bad_records: damaged records that each process leaves out and counts; one more stops the run and names file and
            record. 0 = the first one stops it.
    """

    length: int = 256
    rows: int = 32
    mask_rate: float = 0.3
    replace_rate: float = 0.15
    block: int = 4096
    threads: int = 2
    bad_records: int = 0

    def __post_init__(self) -> None:
        check(
            self.length == 0 or self.length >= 16, f"data.length={self.length}: must be at least 16, or 0 to be fitted"
        )
        above_zero("data", self, "block")
        at_least(0, "data", self, "rows", "threads", "bad_records")
        for name in ("mask_rate", "replace_rate"):
            value = getattr(self, name)
            check(0 < value < 1, f"data.{name}={value}: must lie between 0 and 1")

    def rate(self, objective: str) -> float:
        """The share of a sequence that an objective hides."""
        return self.replace_rate if objective == "replaced" else self.mask_rate


@dataclass(frozen=True)
class MixtureConfig:
    """Which tasks are trained together.

    Args:
        tasks: task name to its share of the target tokens (normalised to 1).
        temperature: 0 takes the shares as they are; T > 0 multiplies each by (records of the task)^(1/T).
    """

    tasks: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_MIXTURE))
    temperature: float = 0.0

    def __post_init__(self) -> None:
        check(bool(self.tasks), "mixture.tasks is empty: name at least one task")
        for name, weight in self.tasks.items():
            fits = 0 <= weight < math.inf
            check(fits, f"mixture.tasks.{name}={weight}: a share is a number from 0 on; 0 leaves the task out")
        check(any(w > 0 for w in self.tasks.values()), "mixture.tasks: every share is 0; give one task a share above 0")
        at_least(0, "mixture", self, "temperature")


DEFAULT_MIXTURE = {
    "next-item": 0.55,
    "behaviour-masked": 0.07,
    "behaviour-seq2seq": 0.07,
    "text-causal": 0.07,
    "text-infill": 0.06,
    "text-to-codes": 0.06,
    "codes-to-text": 0.06,
}
