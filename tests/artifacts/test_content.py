"""Digests of what arrays hold: any bit and any place counts, a layout does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec_jax.artifacts.content import content, differing, digests

TYPES = ("float32", "bfloat16", "int32", "uint8", "bool")


def some(dtype: str, shape: tuple[int, ...] = (3, 4, 5)) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.asarray(jnp.asarray(rng.standard_normal(shape) * 100).astype(dtype))


def of(x: np.ndarray) -> str:
    return digests(content({"x": x}))["['x']"]


@pytest.mark.parametrize("dtype", TYPES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_bit_counts(dtype, data):
    x = some(dtype)
    if dtype == "bool":
        flipped = x.copy()
        place = data.draw(st.integers(0, x.size - 1))
        flipped.reshape(-1)[place] ^= True
    else:
        raw = bytearray(x.tobytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        flipped = np.frombuffer(bytes(raw), x.dtype).reshape(x.shape)
    assert of(flipped) != of(x)
    assert differing({"x": flipped}, digests(content({"x": x}))) == ["['x']"]


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(60)))
def test_every_place_counts(order):
    x = np.arange(60, dtype=np.float32)
    moved = x[list(order)]
    assert (of(moved.reshape(3, 4, 5)) == of(x.reshape(3, 4, 5))) == bool((moved == x).all())


def test_axes_count_and_what_is_no_number_has_a_digest_too():
    x = some("float32")
    assert len({of(x), of(x.reshape(4, 3, 5)), of(x.reshape(60)), of(x.reshape(3, 20))}) == 4
    nan = np.full((2, 2), np.nan, np.float32)
    assert of(nan) == of(nan.copy()) != of(-nan)
    assert of(np.int32(3)) != of(np.int32(4)) and of(np.zeros((0, 3), np.float32)) == "0" * 16


def test_a_digest_is_of_this_definition_on_every_machine():
    """By hand, number by number: what is written today must be readable in years."""

    def mixed(h):
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    x = some("float32", (3, 4))
    first = second = 0
    for i, j in np.ndindex(x.shape):
        place = (mixed((0x9E3779B9 + i * 0x27D4EB2F) % 2**32) + j * 0x27D4EB2F) % 2**32
        one = mixed(int(x[i, j].view(np.uint32)) ^ place)
        first, second = first + one, second + mixed((one + place * 0x27D4EB2F) % 2**32)
    assert of(x) == f"{first % 2**32:08x}{second % 2**32:08x}"


def test_arrays_that_are_missing_or_new_differ():
    said = digests(content({"a": some("float32"), "b": some("int32")}))
    assert differing({"a": some("float32")}, said) == ["['b']"]
    assert differing({"a": some("float32"), "b": some("int32"), "c": some("bool")}, said) == ["['c']"]
    assert differing(jax.tree.map(jnp.asarray, {"a": some("float32"), "b": some("int32")}), said) == []
