"""The layers' weights, and one layer as functions over them: what every way through the Transformer walks."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx
from jax.extend.backend import get_default_device
from jaxtyping import Array

from m6rec_jax.config import ModelConfig
from m6rec_jax.model import applied, sharding
from m6rec_jax.model.experts import Routing, feed_forward
from m6rec_jax.model.layers import Part, Turns, dropout, rms_norm, rope, scale, swiglu, weight
from m6rec_jax.model.products import KEPT, product


class Block(nnx.Module):
    """All N layers at once: every weight carries a leading layer axis and `jax.lax.scan` walks it. With `shared_layers`
    that axis is 1 long, and the scan counts.

    Pre-norm residual layer: grouped-query attention with RoPE, then SwiGLU (Shazeer 2020), or a mixture of many
    (`experts`), beside which `gate`, `up` and `down` are those that all tokens share.
    """

    AXES = {
        "attention_norm": ("layers", None),
        "query": ("layers", "embed", "kv", None, None),
        "key": ("layers", "embed", "kv", None),
        "value": ("layers", "embed", "kv", None),
        "output": ("layers", "kv", None, None, "embed"),
        "ffn_norm": ("layers", None),
        "gate": ("layers", "embed", "ffn"),
        "up": ("layers", "embed", "ffn"),
        "down": ("layers", "ffn", "embed"),
        "router": ("layers", None, None),
        "expert_gate": ("layers", "experts", "embed", "ffn"),
        "expert_up": ("layers", "experts", "embed", "ffn"),
        "expert_down": ("layers", "experts", "ffn", "embed"),
    }

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        N, D, K, h, F = config.layer_sets, config.width, config.n_kv, config.head_dim, config.dense_width
        G = config.heads // K
        depth = 2 * config.layers  # residual branches that add up
        std, out_std = D**-0.5, (depth * D) ** -0.5
        make = lambda name, shape, std: weight(rngs, shape, self.AXES[name], std)  # noqa: E731
        self.attention_norm = scale((N, D), self.AXES["attention_norm"])
        self.query = make("query", (N, D, K, G, h), std)
        self.key = make("key", (N, D, K, h), std)
        self.value = make("value", (N, D, K, h), std)
        self.output = make("output", (N, K, G, h, D), out_std)
        self.ffn_norm = scale((N, D), self.AXES["ffn_norm"])
        if F:
            self.gate = make("gate", (N, D, F), std)
            self.up = make("up", (N, D, F), std)
            self.down = make("down", (N, F, D), (depth * F) ** -0.5)
        if config.experts:
            E, F = config.experts, config.expert_width
            self.router = make("router", (N, D, E), std)
            self.expert_gate = make("expert_gate", (N, E, D, F), std)
            self.expert_up = make("expert_up", (N, E, D, F), std)
            self.expert_down = make("expert_down", (N, E, F, D), (depth * F) ** -0.5)

    def stacked(self) -> dict[str, Array]:
        """The weights `[N, ...]` that `scan` slices a layer at a time."""
        return {name: getattr(self, name)[...] for name in self.AXES if hasattr(self, name)}


def first(w: dict[str, Array]) -> dict[str, Array]:
    """Of stacked weights those of the first layer, gathered along fsdp and not cast: their gradient is a sum over layers."""
    first = jax.tree.map(lambda x: x[0], w)
    return {name: sharding.gather_weight(x, *Block.AXES[name][1:]) for name, x in first.items()}


LEADING = {"bt": ("batch", "position"), "bmt": ("batch", None, None)}  # logical axes: of rows, and of beams


def project(
    x: Array, w: dict[str, Array], turns: Turns, config: ModelConfig, batch: str = "bt", quantise: str = "none"
) -> tuple[Array, ...]:
    """Normed input to rotated queries, rotated keys, and values. `batch`: einsum letters of the leading axes."""
    q, k, v = vectors(x, w, config, batch, quantise)
    return rope(q, turns.over(2)), rope(k, turns.over(1)), v


def vectors(
    x: Array, w: dict[str, Array], config: ModelConfig, batch: str = "bt", quantise: str = "none"
) -> tuple[Array, Array, Array]:
    """`project` before rotation."""
    lead = LEADING[batch]
    y = rms_norm(x, w["attention_norm"], config.norm_eps)
    q = product(f"{batch}d,dkgh->{batch}kgh", y, w["query"], sharding.out(*lead, "kv", None, None), quantise)
    k = product(f"{batch}d,dkh->{batch}kh", y, w["key"], sharding.out(*lead, "kv", None), quantise)
    v = product(f"{batch}d,dkh->{batch}kh", y, w["value"], sharding.out(*lead, "kv", None), quantise)
    return applied.add(q, y, w, "query"), applied.add(k, y, w, "key"), applied.add(v, y, w, "value")


def close(
    x: Array,
    mixed: Array,
    w: dict[str, Array],
    config: ModelConfig,
    keys: Array | None,
    batch: str = "bt",
    real: Array | None = None,
    part: Part = None,
    quantise: str = "none",
) -> tuple[Array, Routing | None]:
    """Attention output and feed-forward, each added to the residual stream; with experts, how tokens were routed.

    `real`: which tokens are no padding; None: all. Capacity, where that is configured, is of training (`keys`) alone.
    """
    lead = LEADING[batch]
    key_a, key_f = (None, None) if keys is None else keys
    to_stream = sharding.out(*lead, None)
    attention = product(f"{batch}kgh,kghd->{batch}d", mixed, w["output"], to_stream, quantise)
    attention = applied.add(attention, mixed, w, "output")
    x = x + dropout(attention, config.dropout, key_a, *lead, None, part=part)
    y = rms_norm(x, w["ffn_norm"], config.norm_eps)
    forward, routing = 0, None
    if "gate" in w:
        to_ffn = sharding.out(*lead, "ffn")
        of_y = lambda name: applied.add(product(f"{batch}d,df->{batch}f", y, w[name], to_ffn, quantise), y, w, name)  # noqa: E731
        inner = swiglu(of_y("gate"), of_y("up"))
        forward = applied.add(
            product(f"{batch}f,fd->{batch}d", inner, w["down"], to_stream, quantise), inner, w, "down"
        )
    if "router" in w:
        dropless = keys is None or config.routing == "dropless"
        of_experts, routing = feed_forward(y, real, w, config, lead, dropless)
        forward = forward + of_experts
    forward = applied.adapted(forward, y, w)
    return x + dropout(forward, config.dropout, key_f, *lead, None, part=part), routing


UNROLLED = 8  # layers


def unrolled(layers: int, policy: str) -> bool:
    """Whether a program has the layers one behind another, and not a loop over them: on a CPU, of few.

    What a loop keeps for the backward pass it copies into arrays of all layers and out again. Elsewhere longer programs gain
    nothing; and who keeps least (`remat: full`) wants the loop, whose layers share their memory.
    """
    return get_default_device().platform == "cpu" and layers <= UNROLLED and policy != "full"


def remat(layer, policy: str):
    """Named remat policies: what the backward pass computes again instead of keeping."""
    if policy == "none":
        return layer
    saved = {"dots": jax.checkpoint_policies.save_only_these_names(KEPT), "full": None}[policy]
    return partial(jax.checkpoint, prevent_cse=False, policy=saved)(layer)
