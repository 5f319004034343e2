"""Layers of other people's models in our layout: the way back of `export.llama`."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from m6rec_jax.artifacts.tensors import FLOATS, Stored
from m6rec_jax.config import ModelConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model.export import INWARDS, NORMS, OUTWARDS
from m6rec_jax.model.load import Blueprint

# Computed as a Llama computes, where the tensors are those of a Llama: Qwen2 may have biases, which then are refused.
LLAMAS = ("llama", "mistral", "qwen2")
OTHERS = {
    "gpt2": "learned positions, LayerNorm and GELU, where this model has RoPE, RMSNorm and SwiGLU",
    "t5": "an encoder beside its decoder and relative position biases, where this model is one stack with RoPE",
    "mt5": "an encoder beside its decoder and relative position biases, where this model is one stack with RoPE",
    "bert": "learned positions, LayerNorm after each part and GELU, where this model has RoPE, RMSNorm and SwiGLU",
    "gemma": "scaled embeddings and GELU gates, where this model has plain embeddings and SwiGLU",
    "qwen3": "norms on queries and keys, which this model has not",
    "mixtral": "a mixture of experts, which is not read",
}
EMBEDDINGS, HEAD, LAST_NORM = "embed_tokens.weight", "lm_head.weight", "norm.weight"


def settings(described: Mapping[str, Any]) -> dict[str, int | float]:
    """The settings of `model` that a `config.json` of Hugging Face asks for; InputError when no Llama is described."""
    kind = described.get("model_type")
    if kind not in LLAMAS:
        why = f" has {OTHERS[kind]}" if kind in OTHERS else ": not computed as a Llama is"
        raise InputError(f"model_type={kind}{why}; weights are taken from {', '.join(LLAMAS)}")
    act = described.get("hidden_act", "silu")
    rope, scaling = (x if isinstance(x, dict) else {} for x in map(described.get, ("rope_parameters", "rope_scaling")))
    if act != "silu":
        raise InputError(f"hidden_act={act}: this model has SwiGLU, which is silu; weights of another are not taken")
    for one in (scaling, rope):
        way = one.get("rope_type", one.get("type", "default"))
        if way != "default":
            raise InputError(f"rope_type={way}: its rotary positions are stretched and this model's are not; take a model without rope scaling")  # fmt: skip
    try:
        width, heads = int(described["hidden_size"]), int(described["num_attention_heads"])
        found = {
            "layers": int(described["num_hidden_layers"]),
            "width": width,
            "heads": heads,
            "kv_heads": int(described.get("num_key_value_heads") or heads),
            "ffn": int(described["intermediate_size"]),
            "shared_layers": False,
            "embed": 0,
            "experts": 0,
            "rope_theta": float(rope.get("rope_theta", described.get("rope_theta", 10_000.0))),
            "norm_eps": float(described.get("rms_norm_eps", 1e-6)),
        }
        size = int(described.get("head_dim") or width // heads)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"config.json: {type(error).__name__}: {error}; a Llama's has it; fetch it again") from None
    if size * heads != width:
        raise InputError(f"head_dim={size} and num_attention_heads={heads} make {size * heads}, not its hidden_size={width}; this model's heads share the width out")  # fmt: skip
    return found


def to_change(config: ModelConfig, wanted: Mapping[str, int | float]) -> list[str]:
    """The settings that must change for weights with the settings `wanted`, as they are written on a command line."""
    # What is left open follows from the others once they are changed, and not from what they are now.
    after = ModelConfig(width=int(wanted["width"]), heads=int(wanted["heads"]))
    ours = {"kv_heads": config.kv_heads or after.n_kv, "ffn": config.ffn or after.ffn_width}
    return [f"--model.{n}={value}" for n, value in wanted.items() if ours.get(n, getattr(config, n)) != value]


def checked(blueprint: Blueprint, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of a Llama by their names without `model.`, once all are there, as large as they must be, and no more.

    Raises InputError naming what is missing, left over, of another shape, or stored as other than floats.
    """
    config = blueprint.config
    found = {name.removeprefix("model."): x for name, x in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    wanted, shapes = {LAST_NORM: (config.width,)}, _shapes(blueprint)
    for i in range(config.layers):
        for name, own in (INWARDS | OUTWARDS | NORMS).items():
            shape = shapes[own]
            split = 1 if name in INWARDS else len(shape) - 1
            wanted[f"layers.{i}.{name}.weight"] = shape if name in NORMS else (prod(shape[split:]), prod(shape[:split]))
    odd = sorted(found.keys() - wanted.keys() - {EMBEDDINGS, HEAD})
    if odd:
        what = "biases, and this model has none" if odd[0].endswith("bias") else "no place in this model"
        raise InputError(f"{odd[0]}{f' and {len(odd) - 1} more' if odd[1:] else ''}: {what}; weights are taken from models that have the tensors of a Llama alone")  # fmt: skip
    for name, shape in (wanted | {EMBEDDINGS: None}).items():
        if name not in found:
            raise InputError(f"no tensor {name} in its files; fetch the whole folder")
        one = found[name]
        if len(one.shape) != len(shape or (0, 0)) or one.shape != (shape or (one.shape[0], config.width)):
            raise InputError(f"{name} is {list(one.shape)}, and config.json says {list(shape or ('rows', config.width))}")  # fmt: skip
        if one.kind not in FLOATS:
            raise InputError(f"{name} is stored as {one.kind}; {', '.join(FLOATS)} are read: save it as one of them")
    return found


def layers(blueprint: Blueprint, found: Mapping[str, Stored]) -> dict[str, Any]:
    """`block` and `final_norm`, float32, of tensors that `checked` gave; one is read at a time."""
    N, block, shapes = blueprint.config.layers, {}, _shapes(blueprint)
    for name, own in (INWARDS | OUTWARDS | NORMS).items():
        shape = shapes[own]
        block[own] = np.empty((N, *shape), np.float32)
        for i in range(N):
            x = found[f"layers.{i}.{name}.weight"].read().astype(np.float32)
            block[own][i] = x - 1 if name in NORMS else x.T.reshape(shape)
    return {"block": block, "final_norm": found[LAST_NORM].read().astype(np.float32) - 1}


def _shapes(blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """The shapes of one layer's weights."""
    return {name: leaf.shape[1:] for name, leaf in blueprint.shapes()["block"].items()}
