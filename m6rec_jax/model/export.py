"""Our weights under the names and in the layouts of other people's models; arrays in, arrays out, no file is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m6rec_jax.errors import InputError
from m6rec_jax.model.items import ItemTable
from m6rec_jax.model.load import Blueprint
from m6rec_jax.vocab import BOS, EOS, OPTIONS, PAD, domain_prefix

PARTS = {"embeddings", "block", "final_norm"}
# The matrices of a layer into heads and inner units, those out of them, and the gains of its norms; by their name there.
INWARDS = {"self_attn.q_proj": "query", "self_attn.k_proj": "key", "self_attn.v_proj": "value",
           "mlp.gate_proj": "gate", "mlp.up_proj": "up"}  # fmt: skip
OUTWARDS = {"self_attn.o_proj": "output", "mlp.down_proj": "down"}
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
LAYER = {*INWARDS.values(), *OUTWARDS.values(), *NORMS.values()}


def llama(
    blueprint: Blueprint, params: Mapping[str, Any], positions: int, items: Sequence[ItemTable] = ()
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The `config.json` and the float32 tensors of a Hugging Face `LlamaForCausalLM` with these parameters.

    `params` is the nested dict that checkpoints hold; `positions` the longest sequence it shall read. Ids stay what
    they are (`vocab`), spare rows among them: probabilities are equal once logits are cut to a slice's ids in use.
    `items`: the facts of each domain's catalogue, which a model that reads item content needs. Where a code is an item,
    its content becomes part of the row of its token. Where an item has several codes, what its last token means hangs
    on those before it, which no row of a table can hold: InputError.
    """
    config, vocab = blueprint.config, blueprint.vocab
    if config.experts:
        raise InputError(f"model.experts={config.experts}: a Llama has one feed-forward network a layer; train with model.experts=0 to export one, or take --format safetensors")  # fmt: skip
    if set(params) != PARTS or set(params["block"]) != LAYER:
        odd = sorted(set(params) ^ PARTS) or sorted(set(params["block"]) ^ LAYER)
        raise InputError(f"parameters {', '.join(odd)}: a Llama has no place for this architecture; --format safetensors exports it")  # fmt: skip
    if config.content and not all(s.atomic or s.name == OPTIONS for s in vocab.slices[1:]):
        raise InputError("model.content=true and items of several codes: what a Llama reads at a token cannot hang on the tokens before it; train with model.content=false to export one, or take --format safetensors")  # fmt: skip
    if config.content and len(items) != vocab.domains:
        raise InputError(f"model.content=true: the catalogue of each of the {vocab.domains} domains is needed, {len(items)} given")  # fmt: skip
    N, D, H, F = config.layers, config.width, config.heads, config.ffn_width
    tables = folded(blueprint, params, items)
    block = {name: np.asarray(x, np.float32) for name, x in params["block"].items()}
    tensors = {
        "model.embed_tokens.weight": np.concatenate(tables),
        "model.norm.weight": 1
        + np.asarray(params["final_norm"], np.float32),  # a gain is stored as its distance from 1
    }
    # torch keeps matrices as [out, in]. Query head k * G + g reads key/value head k there as here, and both rotate the
    # pairs (i, i + h/2), so that heads and their entries keep their order.
    for i in range(N):
        at = 0 if config.shared_layers else i
        layer = {name: block[own][at].reshape(D, -1).T for name, own in INWARDS.items()}
        layer |= {name: block[own][at].reshape(-1, D).T for name, own in OUTWARDS.items()}
        layer |= {name: 1 + block[own][at] for name, own in NORMS.items()}
        tensors |= {f"model.layers.{i}.{name}.weight": np.ascontiguousarray(x) for name, x in layer.items()}
    described = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
        "vocab_size": vocab.size, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": N,
        "num_attention_heads": H, "num_key_value_heads": config.n_kv, "head_dim": config.head_dim,
        "hidden_act": "silu", "rms_norm_eps": config.norm_eps, "attention_bias": False, "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}, "rope_theta": config.rope_theta,
        "max_position_embeddings": positions, "tie_word_embeddings": True,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
    }  # fmt: skip
    return described, tensors


def folded(blueprint: Blueprint, params: Mapping[str, Any], items: Sequence[ItemTable]) -> list[np.ndarray]:
    """One table float32 `[padded, D]` a vocabulary slice; id part and content part of atomic items added up."""
    made, embeddings = [], params["embeddings"]
    for s in blueprint.vocab.slices:
        table = np.asarray(embeddings["tables"][s.name], np.float32)
        if s.atomic and blueprint.config.content:
            facts = items[s.domain]
            matrix = (
                embeddings["more_content"][f"{domain_prefix(s.domain)}content"] if s.domain else embeddings["content"]
            )
            rows = len(table)
            table = np.where(np.asarray(facts.seen)[:rows, None], table, 0)
            table = table + np.asarray(facts.content)[:rows] @ np.asarray(matrix, np.float32)
        made.append(table @ np.asarray(embeddings["projection"], np.float32) if blueprint.config.embed else table)
    return made
