"""The mixture of experts compiled for devices that are not here: what multiplies groups, and what travels."""

import platform
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.config import ModelConfig
from m6rec_jax.model import experts
from m6rec_jax.model.sharding import AXES, spec
from m6rec_jax.topologies import compiled, topology

for package in ("libtpu", "jax_cuda13_plugin"):  # of the extra aot
    pytest.importorskip(package)
pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="the compilers of the extra aot are for Linux x86-64",
)
SIZES = ModelConfig(width=256, heads=4, experts=8, expert_ffn=512, experts_per_token=2, dtype="bfloat16")
B, T, D, E, F = 4, 256, SIZES.width, SIZES.experts, SIZES.expert_width


def gradient(name, routing):
    """Forward and backward of one layer's experts, compiled: experts over two devices, their columns over two."""
    at = topology(name)
    sizes = dict.fromkeys(AXES, 1) | {"expert": 2, "tensor": 2}
    kinds = (jax.sharding.AxisType.Explicit,) * len(AXES)
    mesh = jax.sharding.Mesh(np.array(at.devices[:4]).reshape(tuple(sizes.values())), AXES, axis_types=kinds)

    def shape(sizes, dtype, *axes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.NamedSharding(mesh, spec(*axes)))

    def loss(y, w):
        out, told = experts.feed_forward(y, None, w, SIZES, ("batch", None), dropless=routing == "dropless")
        return out.astype(jnp.float32).sum() + told.balance

    shapes = ((E, D, F), (E, D, F), (E, F, D))
    w = {n: shape(s, jnp.bfloat16, *axes) for n, s, axes in zip(experts.WEIGHTS, shapes, experts.GATHERED, strict=True)}
    w["router"] = shape((D, E), jnp.float32, None, None)
    with jax.set_mesh(mesh):
        y = shape((B, T, D), jnp.bfloat16, "batch", None, None)
        return compiled(at, jax.jit(jax.grad(loss, (0, 1))), y, w).as_text()


EVERY = rf"\[(?:{E}|{E // 2}),{B * T * 2},(?:{D}|{F // 2})\]"  # each choice beside each expert


def test_a_tpu_multiplies_groups_of_uneven_size_by_its_own_kernel():
    program = gradient("tpu:v5p:2x2x1", "dropless")
    assert len(re.findall(r'custom_call_target="tpu_custom_call".*ragged-dot', program)) >= 3
    assert not re.findall(EVERY, program)


def test_a_gpu_does_not_multiply_every_token_by_every_expert():
    program = gradient("gpu:h100:1x4", "dropless")
    assert "reduce-scatter" in program and not re.findall(EVERY, program)


def test_with_capacity_places_travel_to_their_expert_and_back():
    program = gradient("tpu:v5p:2x2x1", "capacity")
    assert len(re.findall(r"all-to-all(?:-start)?\(", program)) >= 4  # there and back, forward and backward
