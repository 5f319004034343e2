"""Programs compiled for TPUs and GPUs that are not here: which kernel is in them, and what is not."""

import platform
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m6rec_jax.config import MeshConfig, ModelConfig, OptimConfig
from m6rec_jax.data.packing import ROW_ARRAYS
from m6rec_jax.decoding import programs
from m6rec_jax.decoding.trie import allowed_under, build_trie
from m6rec_jax.errors import InputError
from m6rec_jax.model import kernels
from m6rec_jax.model.items import ITEM_AXES, ItemTable, item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.sharding import AXES, spec
from m6rec_jax.topologies import GPUS, TPUS, compiled, topology
from m6rec_jax.training import sharding as meshes
from m6rec_jax.training.optim import make_optimizer
from m6rec_jax.training.sharding import BATCH_AXES
from m6rec_jax.training.state import TrainState
from m6rec_jax.training.step import make_train_step
from m6rec_jax.vocab import Vocab

for package in ("libtpu", "jax_cuda13_plugin", "tokamax"):  # of the extras aot and kernels
    pytest.importorskip(package)

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="the compilers of the extra aot are for Linux x86-64",
)
TARGETS = {"tpu:v5p:2x2x1": "tpu_custom_call", "gpu:h100:1x4": "mosaic_gpu_v2"}
T, HEAD = 512, 64


def calls(program):
    """Custom calls of a compiled program, as often as it has them."""
    return re.findall(r'custom_call_target="([^"]*)"', program.as_text())


def squares(program):
    """Arrays of a compiled program with an entry for each pair of tokens."""
    return re.findall(rf"\w+\[(?:\d+,)*{T},{T}\]", program.as_text())


def mesh_of(at, sizes):
    sizes = (*sizes, *(1,) * (len(AXES) - len(sizes)))
    devices = np.array(at.devices[: int(np.prod(sizes))]).reshape(sizes)
    return jax.sharding.Mesh(devices, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))


def shape(mesh, sizes, dtype, *axes):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.NamedSharding(mesh, spec(*axes)))


def gradient_of_attention(name, choice="auto", dtype=jnp.bfloat16, sizes=(2, 1, 2), mesh=None):
    """Forward and backward of grouped attention, rows over two chips and heads over two, compiled."""
    at = topology(name)
    mesh = mesh or mesh_of(at, sizes)
    rows = ("batch", "position")
    one = lambda *sizes: shape(mesh, (4, T, 2, *sizes, HEAD), dtype, *rows, "kv", *(None,) * len(sizes), None)  # noqa: E731
    ends = shape(mesh, (4, T), jnp.int32, *rows)

    def loss(*arrays):
        return kernels.attend(*arrays, choice).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        return compiled(at, jax.jit(jax.grad(loss, (0, 1, 2))), one(2), one(), one(), ends, ends)


@pytest.mark.parametrize("name", TARGETS)
def test_attention_in_training_is_the_kernel_and_holds_neither_scores_nor_mask(name):
    program = gradient_of_attention(name)
    assert calls(program).count(TARGETS[name]) == 3  # forward, and backward for queries and for keys and values
    assert not squares(program)


@pytest.mark.parametrize("name", TARGETS)
def test_positions_over_devices_are_the_kernel_too_with_the_keys_of_all(name):
    program = gradient_of_attention(name, sizes=(1, 1, 2, 2))
    assert calls(program).count(TARGETS[name]) == 3
    assert "all-gather" in program.as_text()
    assert not re.findall(rf"\w+\[(?:\d+,)*{T // 2},{T}\]", program.as_text())  # the scores of a device


def test_a_mesh_over_two_slices_keeps_what_is_not_named_within_one():
    name = "tpu:v5p:2x2x1*2"
    at = topology(name)
    assert [device.slice_index for device in at.devices] == [0] * 4 + [1] * 4
    mesh = meshes.mesh_of(MeshConfig(data=4, tensor=2, dcn={"data": 2}), at.devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(4, 2)
    assert slices.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert calls(gradient_of_attention(name, mesh=mesh)).count("tpu_custom_call") == 3
    with pytest.raises(InputError, match="mesh.dcn names no axis and there are 2"):
        meshes.mesh_of(MeshConfig(), at.devices)


@pytest.mark.parametrize("name", TARGETS)
def test_float32_and_the_choice_of_xla_leave_attention_to_the_compiler(name):
    for options in ({"dtype": jnp.float32}, {"choice": "xla"}):
        program = gradient_of_attention(name, **options)
        assert TARGETS[name] not in calls(program)


@pytest.mark.parametrize("name", TARGETS)
def test_the_search_after_a_prefix_runs_the_kernel_in_prefill_and_over_the_prefix(name):
    rng, levels, B = np.random.default_rng(0), 2, 2
    codes = np.stack(np.unravel_index(rng.choice(64, 40, replace=False), (8,) * levels), 1).astype(np.int32)
    trie = build_trie(codes)
    blueprint = Blueprint(
        ModelConfig(layers=2, width=128, heads=2, kv_heads=1, dtype="bfloat16"), Vocab(300, (8,) * levels), 5
    )
    define, params = nnx.split(blueprint.bind(blueprint.shapes()))
    whole, real = (lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)), (lambda *s: jax.ShapeDtypeStruct(s, jnp.float32))
    asked = programs.Asked(whole(B, T), whole(B, T), whole(B), whole(B, 8), whole(B, 16), real(B, 16), real(B), real(B))
    items = item_table(np.zeros((40, 5)), np.ones(40, bool))
    settings = programs.Settings(4, 8, "level")
    together = jax.jit(programs.recommend, static_argnums=(0, 1, 2))
    program = compiled(
        topology(name), together, define, settings, False, params, items, trie, allowed_under(trie), asked
    )
    assert calls(program).count(TARGETS[name]) == 2  # the scanned layers of prefill, and those of the second level
    assert not squares(program)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 1, 1, 2, 1, 2)], ids=["data, tensor", "sequence, stage"])
def test_a_whole_training_step_on_a_mesh(name, sizes):
    at = topology(name)
    mesh = mesh_of(at, sizes)
    still = {"dropout": 0.0, "embed_dropout": 0.0, "id_dropout": 0.0}  # random bits take most of the compiler's time
    config = ModelConfig(layers=2, width=128, heads=4, kv_heads=2, dtype="bfloat16", remat="dots", **still)
    blueprint, optimizer = Blueprint(config, Vocab(300, (100,)), 6), make_optimizer(OptimConfig(), 100)
    with jax.set_mesh(mesh):
        placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, s))  # noqa: E731
        params = jax.tree.map(placed, blueprint.shapes(), blueprint.specs())
        zero = jax.ShapeDtypeStruct((), jnp.int32)
        state = TrainState(params, jax.eval_shape(optimizer.init, params), zero, zero)
        batch = {x: shape(mesh, (1, 4, T), d, *BATCH_AXES) for x, d in ROW_ARRAYS.items()}
        parts = zip(ITEM_AXES, ((128, 6), (128,)), (jnp.float32, jnp.bool_), strict=True)
        items = ItemTable(*(shape(mesh, s, d, *axes) for axes, s, d in parts))
        program = compiled(at, make_train_step(blueprint, optimizer, 1, 0), state, batch, items)
    # Once more than in attention alone: remat computes the forward again.
    assert calls(program).count(TARGETS[name]) == 4
    assert not squares(program)


@pytest.mark.parametrize(
    ("name", "devices"), [("tpu:v5p:8x8x8", 512), ("tpu:v6e:16x16", 256), ("gpu:h100:4x8", 32), ("gpu:a100-40:2x8", 16)]
)
def test_a_topology_has_as_many_devices_as_its_name_says(name, devices):
    at = topology(name)
    assert len(at.devices) == devices
    assert at.memory == (GPUS[name.split(":")[1]].memory if name.startswith("gpu") else None)


@pytest.mark.parametrize("chip", TPUS)
def test_every_listed_tpu_can_be_had(chip):
    assert topology(f"tpu:{chip}:{TPUS[chip]}").devices[0].platform == "tpu"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "v5p",
        "tpu:v9:2x2",
        "gpu:h100:8",
        "gpu:v5p:2x2",
        "tpu:v5p:3x3x3",
        "tpu:v5p:2x0x1",
        "tpu:v5p:2x2x1*0",
        "gpu:h100:1x8*2",
    ],
)
def test_an_unknown_topology_names_those_that_are_known(name):
    with pytest.raises(InputError, match=f"^{re.escape(name)}: ") as error:
        topology(name)
    assert all(word in str(error.value) for word in (*TPUS, *GPUS)) and "\n" not in str(error.value)
