"""Weights kept as int8: how far each number may move, what keeps its scale, and what is left alone."""

from __future__ import annotations

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m6rec_jax.config import ModelConfig
from m6rec_jax.decoding import programs
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.quantised import check_weights, dense, kept_as, parameter_bytes
from m6rec_jax.vocab import Vocab

SIZES = ModelConfig(layers=3, width=16, heads=4, kv_heads=2, ffn=24, experts=4, shared_experts=1)
BLUEPRINT = Blueprint(SIZES, Vocab(52, (90, 6)), 5)
# Axes of each weight, and which of them the Transformer's products (and the logits) sum over.
AXES = {
    "query": ("ndkgh", "d"), "key": ("ndkh", "d"), "value": ("ndkh", "d"), "output": ("nkghd", "kgh"),
    "gate": ("ndf", "d"), "up": ("ndf", "d"), "down": ("nfd", "f"), "tables": ("vd", "d"),
    "expert_gate": ("nedf", "d"), "expert_up": ("nedf", "d"), "expert_down": ("nefd", "f"),
}  # fmt: skip
LEFT_ALONE = {"router", "attention_norm", "ffn_norm", "final_norm", "content"}


def drawn(blueprint: Blueprint, seed: int = 0) -> nnx.State:
    """Normal weights, of which layers, channels and rows differ in size by up to a thousand times, and one row is 0."""
    rng = np.random.default_rng(seed)

    def draw(x: jax.ShapeDtypeStruct) -> jax.Array:
        sizes = [10 ** rng.uniform(-1, 0.5, n).reshape([-1, *[1] * (x.ndim - 1 - axis)]) for axis, n in enumerate(x.shape)]  # fmt: skip
        value = rng.normal(size=x.shape) * np.prod(np.broadcast_arrays(*sizes), axis=0)
        value[0] *= x.ndim > 2
        return jnp.asarray(value, x.dtype)

    return nnx.split(blueprint.bind(jax.tree.map(draw, blueprint.shapes())))[1]


def leaves(params: nnx.State) -> dict[str, object]:
    """Arrays by the last name of their path; tables by `tables`."""
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: hasattr(x, "qvalue"))
    names = [[key.key for key in path if isinstance(key, jax.tree_util.DictKey)] for path, _ in flat]
    whole = [x[...] if isinstance(x, nnx.Variable) else x for _, x in flat]
    return {"/".join(path): x for path, x in zip(names, whole, strict=True)}


@pytest.fixture(scope="module")
def both() -> tuple[dict, dict]:
    pytest.importorskip("qwix")
    params = drawn(BLUEPRINT)
    return leaves(params), leaves(kept_as(params, "int8"))


def summed(name: str) -> tuple[int, ...] | None:
    found = next((axes for key, axes in AXES.items() if key in name.split("/")), None)
    return None if found is None else tuple(map(found[0].index, found[1]))


def test_no_number_moves_by_more_than_half_a_scale_of_its_own_channel(both):
    full, int8 = both
    assert set(full) == set(int8)
    for name, x in full.items():
        if (axes := summed(name)) is None:
            continue
        x, kept = np.asarray(x, np.float64), int8[name]
        channel = np.abs(x).max(axes, keepdims=True)  # its largest number, for each place a product does not sum over
        np.testing.assert_allclose(kept.scale, np.where(channel > 0, channel / 127.5, 1), rtol=1e-5)
        assert (np.abs(np.asarray(dense(kept)) - x) <= channel / 255 * (1 + 1e-4)).all(), name
        assert np.asarray(dense(kept))[np.broadcast_to(channel == 0, x.shape)].sum() == 0
        assert len(np.unique(kept.scale)) > 1


def test_all_but_norms_routers_and_content_is_int8_and_a_quarter_of_the_bytes(both):
    full, int8 = both
    for name, kept in int8.items():
        if name.split("/")[-1] in LEFT_ALONE:
            assert kept.dtype == jnp.float32 and np.array_equal(kept, full[name])
        else:
            assert kept.qvalue.dtype == jnp.int8 and kept.qvalue.shape == full[name].shape
    assert {name.split("/")[-1] for name, kept in int8.items() if not hasattr(kept, "qvalue")} == LEFT_ALONE
    wide = kept_as(drawn(Blueprint(ModelConfig(layers=2, width=64, heads=2), Vocab(52, (90,)), 5)), "int8")
    before = sum(4 * np.prod(x.shape) for x in leaves(wide).values())
    assert parameter_bytes(wide) < 0.3 * before
    assert parameter_bytes(wide) == sum(x.nbytes for x in jax.tree.leaves(wide))


def test_what_is_int8_already_stays_so_and_full_weights_are_not_touched():
    pytest.importorskip("qwix")
    params = drawn(BLUEPRINT)
    assert all(a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(kept_as(params, "full")), strict=True))
    once = kept_as(params, "int8")
    again = kept_as(once, "int8")
    assert jax.tree.structure(once) == jax.tree.structure(again)
    assert all(a is b for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True))


def test_full_weights_of_a_bfloat16_model_are_rounded_once_and_answer_the_same():
    blueprint = replace(BLUEPRINT, config=replace(BLUEPRINT.config, dtype="bfloat16"))
    full = drawn(blueprint)
    kept = kept_as(full, "full", "bfloat16")
    kinds = {name: x.dtype for name, x in leaves(kept).items()}
    assert {name for name, kind in kinds.items() if kind == jnp.bfloat16} == {
        f"block/{w}" for w in AXES if w != "tables"
    }
    items = item_table(np.zeros((90, 5)), np.ones(90, bool))
    define = nnx.split(blueprint.bind(blueprint.init(0)))[0]
    tokens = np.arange(12).reshape(2, 6) % 50
    ask = lambda params: programs.states(define, params, items, tokens, np.full_like(tokens, -1), np.array([6, 4]))  # noqa: E731
    np.testing.assert_array_equal(ask(full), ask(kept))


def test_a_program_holds_a_layer_in_full_and_not_all_of_them():
    pytest.importorskip("qwix")
    blueprint = Blueprint(ModelConfig(layers=12, width=64, heads=2, content=False), Vocab(52, (6, 6)), 1)
    params = drawn(blueprint)
    define = nnx.split(blueprint.bind(blueprint.init(0)))[0]
    items = item_table(np.zeros((6, 1)), np.ones(6, bool))
    tokens = np.zeros((1, 8), np.int32)

    def held(params: nnx.State) -> int:
        """Bytes that the program asks for beside its arguments."""
        made = programs.states.lower(define, params, items, tokens, tokens - 1, np.full(1, 8, np.int32)).compile()
        return made.memory_analysis().temp_size_in_bytes

    layers = sum(x.nbytes for name, x in leaves(params).items() if name.startswith("block"))
    assert held(kept_as(params, "int8")) < held(params) + layers / 4


@pytest.mark.parametrize("wrong", ["int4", "", "INT8"])
def test_an_unknown_way_to_keep_weights_is_one_line_with_the_choices(wrong):
    with pytest.raises(InputError, match=f"weights={wrong}: unknown; one of full, int8"):
        check_weights(wrong)


def test_a_missing_extra_is_named_and_full_weights_do_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    check_weights("full")
    with pytest.raises(InputError, match=r"weights=int8 needs the package qwix: pip install 'm6rec-jax\[quant\]'"):
        check_weights("int8")
