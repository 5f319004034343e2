"""A kernel of a library on a mesh: each device runs it for its own rows and heads."""

import jax
import jax.numpy as jnp
import numpy as np

from m6rec_jax.config import MeshConfig
from m6rec_jax.model import attention, kernels
from m6rec_jax.model.sharding import spec
from m6rec_jax.training.sharding import make_mesh
from tests.model.test_kernels import EVERY_KIND, B, G, K, agree, drawn, h, packed, ranges, value_and_gradients

MESH = MeshConfig(2, 1, 2)
HEADS, ROWS, WIDE = ("batch", None, "kv", None), ("batch", "position"), ("batch", "position", "kv", None, None)


def by_splash(*arrays):
    return kernels.attend(*arrays, "splash")


def placed(mesh, x, axes):
    return jax.device_put(x, jax.NamedSharding(mesh, spec(*axes)))


def test_splash_on_a_mesh_attends_as_xla_on_one_device():
    q, k, v, cotangent = drawn(0)
    arrays = (q, k, v, *ranges([packed(EVERY_KIND), packed(EVERY_KIND[::-2])]), cotangent)
    expected = value_and_gradients(attention.attend, *arrays)
    mesh = make_mesh(MESH, devices=4)
    with jax.set_mesh(mesh):
        on = [placed(mesh, x, axes) for x, axes in zip(arrays, (WIDE, HEADS, HEADS, ROWS, ROWS, WIDE), strict=True)]
        found = value_and_gradients(by_splash, *on)
    assert {x.sharding.spec for x in found} == {spec(*WIDE), spec(*HEADS)}
    agree(found, expected, atol=2e-5, rtol=2e-5)


def test_beams_over_a_prefix_on_a_mesh():
    rng, P, M, slots = np.random.default_rng(0), 140, 8, 2
    lanes, kept = ("batch", None, None, "kv", None), ("batch", "kv", None, None)
    axes = ((*WIDE[:1], None, *WIDE[1:]), (kept, kept), ("batch",), ("batch",), (lanes, lanes), ("batch", None, None))
    normal = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    asked = (
        normal(B, M, 1, K, G, h), (normal(B, K, P, h), normal(B, K, P, h)), jnp.array([0, 9]), jnp.array([P, 57]),
        (normal(B, slots, M, K, h), normal(B, slots, M, K, h)), jnp.asarray(rng.integers(0, M, (B, M, slots))),
    )  # fmt: skip
    expected = attention.attend_prefix(*asked, 1)
    mesh = make_mesh(MESH, devices=4)
    with jax.set_mesh(mesh):
        on = jax.tree.map(lambda x, a: placed(mesh, x, a), asked, axes)
        found = jax.jit(lambda *x: kernels.attend_prefix(*x, 1, "splash"))(*on)
    assert found.sharding.spec == spec("batch", None, None, "kv", None, None)
    agree([found], [expected], atol=1e-5)
