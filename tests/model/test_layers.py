"""Parts of a layer that write their own gradients: those of the plain formula, from arguments as they came."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.model.layers import rms_norm, rope, rope_turns, swiglu

SHAPE, EPS = (3, 5, 8), 1e-3


def plain_swiglu(gate, up):
    return gate / (1 + jnp.exp(-gate)) * up


def plain_norm(x, gain):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * (1 + gain)


CASES = {
    "swiglu": (swiglu, plain_swiglu, (SHAPE, SHAPE)),
    "rms_norm": (lambda x, gain: rms_norm(x, gain, EPS), plain_norm, (SHAPE, SHAPE[-1:])),
}
MOST = {
    "swiglu": 0.1,
    "rms_norm": 3.5,
}  # float32 arrays of an activation's size that a program in bfloat16 may hold at one time


def drawn(shapes):
    return [2 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_formula(name):
    ours, plain, shapes = CASES[name]
    arguments, cotangent = drawn(shapes), jnp.cos(jnp.arange(120.0)).reshape(SHAPE)
    results = [(value, *back(cotangent)) for value, back in (jax.vjp(f, *arguments) for f in (ours, plain))]
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_backward_keeps_no_array_wider_than_the_arguments(name):
    """In bfloat16 nothing of the size of an activation is kept in float32."""
    ours, _, shapes = CASES[name]
    arguments = [x.astype(jnp.bfloat16) if x.shape == SHAPE else x for x in drawn(shapes)]
    _, back = jax.vjp(ours, *arguments)
    kept = [x for x in jax.tree.leaves(back) if x.size >= np.prod(SHAPE)]
    assert kept
    assert all(x.dtype == jnp.bfloat16 for x in kept)


def test_rope_turns_pairs():
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    positions = jnp.arange(12).reshape(2, 6)
    angles = positions[..., None] * 100.0 ** (-jnp.arange(4) / 4)
    wanted = (x[..., :4] + 1j * x[..., 4:]) * jnp.exp(1j * angles)
    got = rope(x, rope_turns(positions, 8, 100.0))
    np.testing.assert_allclose(got, jnp.concatenate([wanted.real, wanted.imag], -1), rtol=1e-5, atol=1e-5)


def test_ropes_gradient_is_that_of_the_formula():
    x, cotangent = (jax.random.normal(jax.random.key(i), (2, 6, 3, 8)) for i in range(2))
    turns = rope_turns(jnp.arange(12).reshape(2, 6), 8, 100.0).over(1)

    def plain(x):
        turned = (x[..., :4] + 1j * x[..., 4:]) * (turns.cos + 1j * turns.sin)
        return jnp.concatenate([turned.real, turned.imag], -1)

    (got,), (wanted,) = (jax.vjp(f, x)[1](cotangent) for f in (lambda x: rope(x, turns), plain))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_sines_are_taken_once_however_often_they_turn():
    def loss(x, positions):
        turns = rope_turns(positions, 8, 100.0)
        return jnp.sum(jnp.sin(rope(rope(x, turns) ** 2, turns)))

    x, positions = jnp.ones((2, 64, 8)), jnp.zeros((2, 64), jnp.int32)
    program = jax.jit(jax.grad(loss)).lower(x, positions).compile().as_text()
    assert len(re.findall(r"f32\[2,64,4\]\S* (?:sine|cosine)\(", program)) == 2


@pytest.mark.parametrize("name", CASES)
def test_on_a_cpu_gradients_in_bfloat16_are_near_and_hold_little_in_float32(name):
    """Of the arrays of an activation's size that a program holds for a gradient, hardly any are wider than what came in."""
    ours, plain, shapes = CASES[name]
    wide = (64, 128, 256)
    shapes = [wide if shape == SHAPE else wide[-1:] for shape in shapes]
    arguments, cotangent = drawn(shapes), jax.random.normal(jax.random.key(9), wide)
    rounded = [x.astype(jnp.bfloat16) if x.ndim > 1 else x for x in arguments]

    def both(x, cotangent):
        value, back = jax.vjp(ours, *x)
        return value, back(cotangent)

    program = jax.jit(both).lower(rounded, cotangent.astype(jnp.bfloat16)).compile()
    assert program.memory_analysis().temp_size_in_bytes < MOST[name] * np.prod(wide) * 4
    _, got = program(rounded, cotangent.astype(jnp.bfloat16))
    exact = jax.vjp(plain, *arguments)[1](cotangent)
    for ours_, theirs in zip(got, exact, strict=True):
        assert jnp.linalg.norm(ours_.astype(jnp.float32) - theirs) < 0.01 * jnp.linalg.norm(theirs)
