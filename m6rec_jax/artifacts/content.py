"""A digest of each array of a state, over what it holds and not over how it lies on disk or on a mesh.

The storage layer restores arrays whose bits have flipped without noticing, and a digest of files says nothing of what
happened before they were written. This one is taken on the devices, of the arrays that are saved, and again of the arrays
that were loaded: on another mesh, by another number of processes, it is the same.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

_WIDTHS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_ODD = 0x27D4EB2F


@jax.jit
def content(tree: Any) -> Any:
    """For each array of a tree two uint32: sums, modulo 2^32, over its elements of a hash of their bits and their place.

    A sum does not ask for an order, so every shard adds up its own. A changed element always changes both sums, elements
    that swap their places change them but for a chance of 2^-64. Arrays of up to 2^32 entries an axis, of 1, 2 or 4 bytes
    an element.
    """
    return jax.tree.map(_of_array, tree)


def digests(tree: Any) -> dict[str, str]:
    """`path -> 16 hex digits` of every array, from what `content` gives for a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x).astype(">u4").tobytes().hex() for path, x in leaves}


def differing(tree: Any, expected: dict[str, str]) -> list[str]:
    """The paths of arrays whose content is not what `expected` says, and of those that it does not name."""
    found = digests(content(tree))
    return sorted(path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path))


def _of_array(x: Array) -> UInt32[Array, " 2"]:
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, _WIDTHS[x.dtype.itemsize])
    bits = bits.astype(jnp.uint32)
    rows = jnp.full((1,) * x.ndim, 0x9E3779B9, jnp.uint32)
    for axis in range(x.ndim - 1):
        rows = _mixed(rows + _numbered(x, axis))
    # Made once, not again for each element of a row; and what a lane adds is mixed in with the bits.
    place = jax.lax.optimization_barrier(rows) + (_numbered(x, x.ndim - 1) if x.ndim else 0)
    first = _mixed(bits ^ place)
    second = _mixed(first + place * jnp.uint32(_ODD))
    return jnp.stack([jnp.sum(h, dtype=jnp.uint32) for h in (first, second)])


def _numbered(x: Array, axis: int) -> Array:
    """0, 1, ... along an axis, far apart."""
    shape = [-1 if a == axis else 1 for a in range(x.ndim)]
    return jnp.arange(x.shape[axis], dtype=jnp.uint32).reshape(shape) * jnp.uint32(_ODD)


def _mixed(h: Array) -> Array:
    """The finaliser of MurmurHash3 (Appleby 2011): one to one, and every bit in reaches every bit out."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
