"""Settings of the Transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from m6rec_jax.config.checks import above_zero, at_least, below_one, check

DType = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]
Quantise = Literal["none", "int8", "fp8"]
Attention = Literal["auto", "xla", "splash", "tokamax"]
Routing = Literal["dropless", "capacity"]


@dataclass(frozen=True)
class ModelConfig:
    """The Transformer (model/): sizes, regularisation, arithmetic.

    Args:
        layers: Transformer layers.
        shared_layers: one set of weights, walked `layers` times (Lan et al. 2020, ALBERT).
        width: size of the residual stream.
        embed: size of a row of the token tables, between which and the width one matrix turns; 0 = width, without one.
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
        quantise: eight bits for the layers' matrix products while training (docs/training-speed.md; the extra `quant`): int8, or fp8.
            What is validated and served is never rounded.
        remat: what backward recomputes: none, everything but matrix products (dots), or all (full).
        content: add projected item features to item tokens and to the atomic output table.
        attention: whose code attends (model/kernels): xla (any device), splash (TPU), tokamax (Hopper GPU or later; the extra `kernels`);
            auto = by device, and xla unless dtype is bfloat16.
        late: last layers in which the fine parts of an example with options meet; in those before, each part is read alone
            (model/interaction). 0 = they meet from the first layer on.
        exits: train every layer to answer tasks with options, layer k of L with weight 2k / (L (L + 1)), so that easy rows may
            leave early (decoding/exits).
        vectors: width of the vectors that queries and items get for retrieval (docs/scoring.md; 128 in M6-Rec); 0: none.
        microbatches: parts of a slice's rows that flow through the stages of mesh.stage one behind another; 0 = as many as
            stages.
    """

    layers: int = 2
    shared_layers: bool = False
    width: int = 64
    embed: int = 0
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
    quantise: Quantise = "none"
    remat: Remat = "none"
    content: bool = True
    attention: Attention = "auto"
    late: int = 0
    exits: bool = False
    vectors: int = 0
    microbatches: int = 0

    def __post_init__(self) -> None:
        above_zero(
            "model", self, "layers", "width", "heads", "rope_theta", "norm_eps", "experts_per_token", "capacity_factor"
        )
        at_least(
            0,
            "model",
            self,
            "embed",
            "kv_heads",
            "ffn",
            "experts",
            "expert_ffn",
            "shared_experts",
            "balance",
            "router_z",
            "late",
            "vectors",
            "microbatches",
        )
        below_one("model", self, "dropout", "embed_dropout", "id_dropout")
        for name, known in (
            ("dtype", DType),
            ("quantise", Quantise),
            ("remat", Remat),
            ("attention", Attention),
            ("routing", Routing),
        ):
            value = getattr(self, name)
            check(value in get_args(known), f"model.{name}={value}: must be one of {', '.join(get_args(known))}")
        check(self.attention != "tokamax" or self.dtype == "bfloat16", f"model.attention=tokamax and model.dtype={self.dtype}: its kernels compute in bfloat16; change one of them")  # fmt: skip
        check(self.embed <= self.width, f"model.embed={self.embed} is more than model.width={self.width}; make it smaller, or 0 for tables of that width")  # fmt: skip
        check(self.width % self.heads == 0, f"model.heads={self.heads} does not divide model.width={self.width}")
        check((self.width // self.heads) % 2 == 0, f"model.width={self.width} over model.heads={self.heads} gives an odd head size; rotary positions need an even one")  # fmt: skip
        check(not self.experts or self.experts_per_token <= self.experts, f"model.experts_per_token={self.experts_per_token} is more than model.experts={self.experts}")  # fmt: skip
        check(self.experts > 0 or self.shared_experts == 0, f"model.shared_experts={self.shared_experts} and model.experts=0: a dense model shares none; change one of them")  # fmt: skip
        check(self.quantise == "none" or not self.experts, f"model.quantise={self.quantise} and model.experts={self.experts}: products of experts are not rounded; change one of them")  # fmt: skip
        check(self.late <= self.layers, f"model.late={self.late} is more than model.layers={self.layers}")
        check(
            not self.exits or self.layers > 1,
            "model.exits=true and model.layers=1: there is no layer to leave early from; change one of them",
        )
        check(not (self.late and self.exits), f"model.late={self.late} and model.exits=true: a layer that reads parts alone cannot answer; change one of them")  # fmt: skip
        check(self.heads % self.n_kv == 0, f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}")

    @property
    def layer_sets(self) -> int:
        """How many layers have weights of their own."""
        return 1 if self.shared_layers else self.layers

    @property
    def table_width(self) -> int:
        return self.embed or self.width

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
