"""Configuration of a training run: frozen dataclasses, checked when made, written beside every run.

Layered YAML and dotted overrides are read in `settings`. A value outside its range, and one that two settings
contradict, raises here, when it is made, and is named.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from m6rec_jax.config.checks import check
from m6rec_jax.config.compress import DistillConfig, PruneConfig
from m6rec_jax.config.data import DataConfig, MixtureConfig
from m6rec_jax.config.mesh import MeshConfig
from m6rec_jax.config.model import ModelConfig
from m6rec_jax.config.optim import OptimConfig
from m6rec_jax.config.replaced import ReplacedConfig
from m6rec_jax.config.train import CheckpointConfig, TrainConfig


@dataclass(frozen=True)
class Config:
    """Everything that decides a training run, apart from its data sets.

    Args:
        model: the Transformer.
        mesh: devices along each axis.
        optim: optimiser and schedule.
        data: rows and packing.
        mixture: tasks and their shares.
        checkpoint: what is saved and kept.
        train: length of training, validation, seed.
        distill: what is learnt from a teacher.
        prune: weights that become zero.
        replaced: detection of tokens that a generator wrote.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    replaced: ReplacedConfig = field(default_factory=ReplacedConfig)

    def __post_init__(self) -> None:
        check(
            self.data.rows % self.train.accumulate == 0,
            f"train.accumulate={self.train.accumulate} does not divide data.rows={self.data.rows}",
        )
        check(
            self.optim.warmup < self.train.steps,
            f"optim.warmup={self.optim.warmup} is not below train.steps={self.train.steps}",
        )
        check(
            not self.prune.sparsity or self.prune.end <= self.train.steps,
            f"prune.end={self.prune.end} is beyond train.steps={self.train.steps}: prune.sparsity would not be reached",
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Config:
        """Raises InputError on an unknown key, naming it and the known ones."""
        parts = {name: f.default_factory for name, f in cls.__dataclass_fields__.items()}  # type: ignore[union-attr]
        made = {}
        for name, values in data.items():
            check(name in parts, f"{name}: unknown configuration key; known: {', '.join(parts)}")
            kind = type(parts[name]())
            known = kind.__dataclass_fields__
            for key in values:
                check(key in known, f"{name}.{key}: unknown configuration key; known: {', '.join(known)}")
            made[name] = kind(**values)
        return cls(**made)


def dump_config(config: Config) -> str:
    """YAML that `settings.load_config` reads back as the same Config."""
    import yaml

    return yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True, width=120)
