"""Exported weights, run by a Llama written down from its definition, give our logits."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.config import ModelConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model.export import llama
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import causal
from m6rec_jax.vocab import SPECIALS, Vocab

VOCAB = Vocab(len(SPECIALS) + 20, (6, 130, 6))
CONFIG = ModelConfig(layers=2, width=24, heads=6, kv_heads=2, ffn=40, rope_theta=500.0, norm_eps=1e-5, content=False)


def forward(described: dict, tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits float64 `[T, V]` of one sequence: Touvron et al. 2023 with the grouped queries of Ainslie et al. 2023."""
    w = {name.removeprefix("model.").removesuffix(".weight"): x.astype(np.float64) for name, x in tensors.items()}
    T, H, K, h = len(tokens), *(described[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + described["rms_norm_eps"]) * gain

    def rotated(x: np.ndarray) -> np.ndarray:  # entries i and i + h/2 as one complex number
        i = np.arange(h // 2)
        turn = np.exp(1j * np.arange(T)[:, None] * described["rope_theta"] ** (-2 * i / h))
        pairs = (x[:, : h // 2] + 1j * x[:, h // 2 :]) * turn
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    x = w["embed_tokens"][tokens]
    for i in range(described["num_hidden_layers"]):
        of = lambda name, i=i: w[f"layers.{i}.{name}"]  # noqa: E731
        y = norm(x, of("input_layernorm"))
        q, k, v = (y @ of(f"self_attn.{name}_proj").T for name in "qkv")
        heads = []
        for head in range(H):
            own, shared = slice(head * h, head * h + h), slice(head // (H // K) * h, head // (H // K) * h + h)
            scores = rotated(q[:, own]) @ rotated(k[:, shared]).T / np.sqrt(h)
            scores[np.triu_indices(T, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(heads, axis=1) @ of("self_attn.o_proj").T
        y = norm(x, of("post_attention_layernorm"))
        gate = y @ of("mlp.gate_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ of("mlp.up_proj").T)) @ of("mlp.down_proj").T
    return norm(x, w["norm"]) @ w["embed_tokens"].T


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_a_llama_with_our_weights_gives_our_logits(kv_heads: int):
    rng = np.random.default_rng(kv_heads)
    blueprint = Blueprint(replace(CONFIG, kv_heads=kv_heads), VOCAB, 1)
    drawn = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), blueprint.shapes())
    tokens = rng.integers(0, VOCAB.size, 17)
    described, tensors = llama(blueprint, drawn, 64)
    assert tensors["model.embed_tokens.weight"].shape == (described["vocab_size"], described["hidden_size"])
    theirs = forward(described, tensors, tokens)

    model, items = blueprint.bind(drawn), item_table(np.zeros((1, 1)), np.ones(1, bool))
    hidden = model.hidden(tokens[None], np.full((1, 17), -1), causal((1, 17), np.array([17])), items)
    for i, s in enumerate(VOCAB.slices):
        ours = np.asarray(model.logits(hidden[0], i, items))[:, : s.size]
        np.testing.assert_allclose(ours, theirs[:, s.offset : s.offset + s.size], atol=1e-4 * np.abs(theirs).max())


def test_experts_have_no_place_in_a_llama():
    with pytest.raises(InputError, match=r"model.experts=4: .* model.experts=0"):
        llama(Blueprint(replace(CONFIG, experts=4), VOCAB, 5), {}, 64)


def test_content_of_atomic_items_becomes_part_of_their_rows():
    rng = np.random.default_rng(5)
    vocab = Vocab(len(SPECIALS) + 20, (130,))
    blueprint = Blueprint(replace(CONFIG, content=True), vocab, 7)
    drawn = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), blueprint.shapes())
    items = item_table(rng.normal(size=(130, 7)), rng.random(130) < 0.7)
    assert not items.seen[:130].all()
    tokens = np.concatenate([rng.integers(0, vocab.pieces, 5), vocab.levels[0].offset + rng.integers(0, 130, 12)])
    rows = np.where(tokens >= vocab.levels[0].offset, tokens - vocab.levels[0].offset, -1)
    theirs = forward(*llama(blueprint, drawn, 64, [items]), tokens)
    model = blueprint.bind(drawn)
    hidden = model.hidden(tokens[None], rows[None], causal((1, 17), np.array([17])), items)
    for i, s in enumerate(vocab.slices):
        ours = np.asarray(model.logits(hidden[0], i, items))[:, : s.size]
        np.testing.assert_allclose(ours, theirs[:, s.offset : s.offset + s.size], atol=1e-4 * np.abs(theirs).max())


def test_content_of_spelled_items_has_no_place_in_a_llama():
    blueprint = Blueprint(replace(CONFIG, content=True), VOCAB, 5)
    with pytest.raises(InputError, match=r"model.content=true and items of several codes: .* model.content=false"):
        llama(blueprint, blueprint.shapes(), 64)


def test_another_architecture_is_named():
    params = Blueprint(CONFIG, VOCAB, 1).shapes()
    params["block"] = {**params["block"], "router": params["block"]["gate"]}
    with pytest.raises(InputError, match=r"parameters router: a Llama has no place"):
        llama(Blueprint(CONFIG, VOCAB, 1), params, 64)
