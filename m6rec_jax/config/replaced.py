"""Settings of replaced-token detection."""

from __future__ import annotations

from dataclasses import dataclass

from m6rec_jax.config.checks import above_zero, at_least, check


@dataclass(frozen=True)
class ReplacedConfig:
    """Replaced-token detection (docs/augmentation.md), of a mixture with a task of it; data.replace_rate says how much is replaced.

    Args:
        weight: of a token's detection beside a target of another task (ELECTRA has 50; docs/augmentation.md).
        layers: of the generator, which proposes what stands in a token's place and is trained beside the model.
        width: of the generator, with as many heads as the model; 0 = half of model.width.
        reward: weight, beside the generator's own loss, of being taken for real by the model; 0 = it only learns to fill in.
        augment: share of the histories of left-to-right tasks that are read with tokens of the generator in them.
    """

    weight: float = 5.0
    layers: int = 1
    width: int = 0
    reward: float = 0.0
    augment: float = 0.0

    def __post_init__(self) -> None:
        above_zero("replaced", self, "weight", "layers")
        at_least(0, "replaced", self, "width", "reward")
        check(0 <= self.augment <= 1, f"replaced.augment={self.augment}: must lie between 0 and 1")
