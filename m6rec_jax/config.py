"""Configuration of a training run: frozen dataclasses, checked when made, written beside every run.

Layered YAML and dotted overrides are read in `settings`. A value outside its range, and one that two settings
contradict, raises here, when it is made, and is named.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from m6rec_jax.errors import InputError

DType = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]
Attention = Literal["auto", "xla", "splash", "tokamax"]
Routing = Literal["dropless", "capacity"]


def check(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless `condition`."""
    if not condition:
        raise InputError(message)


def at_least(least: int, section: str, config: Any, *names: str) -> None:
    """Raise InputError unless these settings are finite numbers, `least` or above."""
    for name in names:
        value = getattr(config, name)
        check(least <= value < math.inf, f"{section}.{name}={value}: must be at least {least}")


def above_zero(section: str, config: Any, *names: str) -> None:
    """Raise InputError unless these settings are finite numbers above 0."""
    for name in names:
        value = getattr(config, name)
        check(0 < value < math.inf, f"{section}.{name}={value}: must be above 0")


def below_one(section: str, config: Any, *names: str) -> None:
    """Raise InputError unless these settings are at least 0 and below 1."""
    for name in names:
        value = getattr(config, name)
        check(0 <= value < 1, f"{section}.{name}={value}: must be at least 0 and below 1")


@dataclass(frozen=True)
class ModelConfig:
    """The Transformer (model/): sizes, regularisation, arithmetic.

    Args:
        layers: Transformer layers.
        width: size of the residual stream.
        heads: attention heads; must divide width.
        kv_heads: key/value heads (grouped-query attention); 0 = heads.
        ffn: inner size of SwiGLU; 0 = 8/3 of width, rounded up to a multiple of 64.
        experts: feed-forward networks in each layer, of which a router chooses for each token (model/experts); 0 = one, for all.
        experts_per_token: experts that a token is sent to.
        expert_ffn: inner size of an expert; 0 = that of `ffn`.
        shared_experts: experts that every token passes through beside its chosen ones.
        routing: of training: dropless, every token reaches its experts; capacity, an expert takes so many tokens of a row
            and those beyond pass it by. Serving is always dropless.
        capacity_factor: places in the experts for each choice of a token, with routing=capacity; 1 fits all when even.
        balance: weight of the loss that keeps experts evenly used (Fedus et al. 2022).
        router_z: weight of the loss that keeps the router's logits small (Zoph et al. 2022).
        dropout: share of residual-branch activations dropped in training.
        embed_dropout: share of input embedding entries dropped in training.
        id_dropout: share of item id parts dropped in training, so that content must carry them (DESIGN section 5).
        rope_theta: base wavelength of rotary positions.
        norm_eps: added inside RMSNorm.
        dtype: arithmetic of matrix products; parameters stay float32.
        remat: what backward recomputes: none, everything but matrix products (dots), or all (full).
        content: add projected item features to item tokens and to the atomic output table.
        attention: whose code attends (model/kernels): xla (any device), splash (TPU), tokamax (Hopper GPU or later; the extra `kernels`);
            auto = by device, and xla unless dtype is bfloat16.
        microbatches: parts of a slice's rows that flow through the stages of mesh.stage one behind another; 0 = as many as
            stages.
    """

    layers: int = 2
    width: int = 64
    heads: int = 2
    kv_heads: int = 0
    ffn: int = 0
    experts: int = 0
    experts_per_token: int = 2
    expert_ffn: int = 0
    shared_experts: int = 0
    routing: Routing = "dropless"
    capacity_factor: float = 1.25
    balance: float = 0.01
    router_z: float = 0.0
    dropout: float = 0.2
    embed_dropout: float = 0.3
    id_dropout: float = 0.1
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    dtype: DType = "float32"
    remat: Remat = "none"
    content: bool = True
    attention: Attention = "auto"
    microbatches: int = 0

    def __post_init__(self) -> None:
        above_zero(
            "model", self, "layers", "width", "heads", "rope_theta", "norm_eps", "experts_per_token", "capacity_factor"
        )
        at_least(
            0,
            "model",
            self,
            "kv_heads",
            "ffn",
            "experts",
            "expert_ffn",
            "shared_experts",
            "balance",
            "router_z",
            "microbatches",
        )
        below_one("model", self, "dropout", "embed_dropout", "id_dropout")
        for name, known in (("dtype", DType), ("remat", Remat), ("attention", Attention), ("routing", Routing)):
            value = getattr(self, name)
            check(value in get_args(known), f"model.{name}={value}: must be one of {', '.join(get_args(known))}")
        check(self.attention != "tokamax" or self.dtype == "bfloat16", f"model.attention=tokamax and model.dtype={self.dtype}: its kernels compute in bfloat16; change one of them")  # fmt: skip
        check(self.width % self.heads == 0, f"model.heads={self.heads} does not divide model.width={self.width}")
        check((self.width // self.heads) % 2 == 0, f"model.width={self.width} over model.heads={self.heads} gives an odd head size; rotary positions need an even one")  # fmt: skip
        check(not self.experts or self.experts_per_token <= self.experts, f"model.experts_per_token={self.experts_per_token} is more than model.experts={self.experts}")  # fmt: skip
        check(self.experts > 0 or self.shared_experts == 0, f"model.shared_experts={self.shared_experts} and model.experts=0: a dense model shares none; change one of them")  # fmt: skip
        check(self.heads % self.n_kv == 0, f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}")

    @property
    def n_kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def ffn_width(self) -> int:
        return self.ffn or -(-self.width * 8 // 3 // 64) * 64

    @property
    def expert_width(self) -> int:
        return self.expert_ffn or self.ffn_width

    @property
    def dense_width(self) -> int:
        """Inner size of what every token passes through: the feed-forward layer, or the shared experts as one."""
        return self.shared_experts * self.expert_width if self.experts else self.ffn_width


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that are left.

    Args:
        data: replicas of the parameters, each with its own rows.
        fsdp: rows and parameters sharded together.
        tensor: heads, feed-forward columns and vocabulary rows sharded.
        sequence: positions of a row sharded.
        expert: experts of the feed-forward layers sharded.
        stage: layers sharded, each device holding a run of them (a pipeline).
        dcn: of several slices (TPU slices, or machines of GPUs, joined by a slower network), over how many an axis reaches:
            {data: 4} puts four groups of replicas on four slices. The factors multiply to the number of slices; an axis
            that is not named stays within a slice.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    stage: int = 1
    dcn: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        axes = [name for name in self.__dataclass_fields__ if name != "dcn"]
        for name in axes:
            size = getattr(self, name)
            check(size > 0 or size == -1, f"mesh.{name}={size}: must be above 0, or -1 for all devices that are left")
        for name, factor in self.dcn.items():
            check(name in axes, f"mesh.dcn.{name}={factor}: unknown axis; known: {', '.join(axes)}")
            check(factor > 0, f"mesh.dcn.{name}={factor}: must be above 0")
            size = getattr(self, name)
            check(size == -1 or size % factor == 0, f"mesh.dcn.{name}={factor} does not divide mesh.{name}={size}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay (training/optim).

    Args:
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
        above_zero("optim", self, "learning_rate")
        at_least(0, "optim", self, "warmup", "weight_decay", "negatives")
        below_one("optim", self, "b1", "b2", "label_smoothing", "average")
        check(0 <= self.final <= 1, f"optim.final={self.final}: must lie between 0 and 1")
        check(self.clip > 0, f"optim.clip={self.clip}: must be above 0")  # .inf clips nothing


@dataclass(frozen=True)
class DataConfig:
    """How examples become rows (data/).

    Args:
        length: tokens in a row (T); 0 = fitted to the histories of the datasets (training/fit).
        rows: rows in a global batch (B), over all devices and accumulation steps; 0 = as many as hold 1,024 tokens a
            device (training/fit).
        mask_rate: share of a sequence that the masked objectives hide.
        block: plan entries shuffled and packed together.
        threads: reader threads; 0 = the training thread reads.
        bad_records: damaged records that each process leaves out and counts; one more stops the run and names file and
            record. 0 = the first one stops it.
    """

    length: int = 256
    rows: int = 32
    mask_rate: float = 0.3
    block: int = 4096
    threads: int = 2
    bad_records: int = 0

    def __post_init__(self) -> None:
        check(
            self.length == 0 or self.length >= 16, f"data.length={self.length}: must be at least 16, or 0 to be fitted"
        )
        above_zero("data", self, "block")
        at_least(0, "data", self, "rows", "threads", "bad_records")
        check(0 < self.mask_rate < 1, f"data.mask_rate={self.mask_rate}: must lie between 0 and 1")


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
        patience: validations without a better ndcg@10 before training stops; 0 = never.
        seed: of parameters, data order and dropout.
        explode: a step whose gradient norm is above so many times the running mean changes nothing; 0 = only where it is
            not finite.
        max_skips: steps in a row that change nothing before training stops.
        spike: a loss above the running median by so many times the usual distance from it, for some steps, is rewound
            (training/guards); 0 = never, so that every plan entry is used exactly once.
        rewinds: how often, before training stops.
        hang_seconds: without a finished step, validation or save before the process writes its stacks and ends with exit code 75;
            0 = waits for ever.
        profile: steps START:STOP whose trace is written under run/profile; empty = none.
    """

    steps: int = 1000
    epochs: float = 0.0
    accumulate: int = 1
    log_every: int = 20
    eval_every: int = 200
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
        check(self.explode == 0 or self.explode > 1, f"train.explode={self.explode}: must be above 1, or 0 for never")
        start, colon, stop = self.profile.partition(":")
        fits = not self.profile or (colon and start.isdigit() and stop.isdigit() and 0 < int(start) < int(stop))
        check(bool(fits), f"train.profile={self.profile}: give the steps as START:STOP, such as 100:110, START from 1")
        check(0 <= self.seed < 2**32, f"train.seed={self.seed}: must be at least 0 and below 2^32")


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
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check(
            self.data.rows % self.train.accumulate == 0,
            f"train.accumulate={self.train.accumulate} does not divide data.rows={self.data.rows}",
        )
        check(
            self.optim.warmup < self.train.steps,
            f"optim.warmup={self.optim.warmup} is not below train.steps={self.train.steps}",
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
