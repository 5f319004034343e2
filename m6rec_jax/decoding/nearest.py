"""Items whose vectors have the largest products with a query's: all of them compared, a block at a time."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m6rec_jax.decoding.shapes import bucket
from m6rec_jax.errors import InputError

BLOCK = 1 << 15  # items compared with a batch of queries at a time
QUERIES = 512
By = Literal["device", "faiss"]


def nearest(
    queries: np.ndarray, items: np.ndarray, k: int, exclude: list[np.ndarray] | None = None, by: By = "device"
) -> tuple[np.ndarray, np.ndarray]:
    """The k items `[m, V]` with the largest products with each query `[n, V]`: rows int32 and products float32 `[n, k]`,
    best first, equal ones by row; -1 and -inf where there are no more.

    `exclude`: rows that each query shall not get. Exact, on the device or by faiss on the host. Raises InputError when
    faiss is asked for and not there.
    """
    if by == "faiss" and not _has_faiss():
        raise InputError("by=faiss needs the package faiss-cpu: pip install 'm6rec-jax[baselines]'")
    most = max((len(rows) for rows in exclude or ()), default=0)
    wide = min(k + most, len(items))
    rows, scores = np.full((len(queries), k), -1, np.int32), np.full((len(queries), k), -np.inf, np.float32)
    if not wide or not len(queries):
        return rows, scores
    found, products = (_by_faiss if by == "faiss" else _on_device)(queries, items, wide)
    if most:
        out = np.stack([np.pad(one, (0, most - len(one)), constant_values=-1) for one in exclude or ()])
        bad = (found[:, :, None] == out[:, None]).any(-1)
        order = np.argsort(bad, axis=1, kind="stable")
        found, products, bad = (np.take_along_axis(x, order, 1) for x in (found, products, bad))
        found, products = np.where(bad, -1, found), np.where(bad, -np.inf, products)
    n = min(k, wide)
    rows[:, :n], scores[:, :n] = found[:, :n], products[:, :n]
    return rows, scores


def _on_device(queries: np.ndarray, items: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    size = min(BLOCK, bucket(len(items), 128))
    blocks = -(-len(items) // size)
    padded = np.pad(np.asarray(items, np.float32), ((0, blocks * size - len(items)), (0, 0)))
    table = jnp.asarray(padded.reshape(blocks, size, -1))
    made = []
    for start in range(0, len(queries), QUERIES):
        some = np.asarray(queries[start : start + QUERIES], np.float32)
        wide = np.pad(some, ((0, bucket(len(some), 8) - len(some)), (0, 0)))
        made.append([np.asarray(x)[: len(some)] for x in _largest(k, wide, table, len(items))])
    rows, scores = zip(*made, strict=True)
    return np.concatenate(rows), np.concatenate(scores)


@partial(jax.jit, static_argnums=0)
def _largest(
    k: int, queries: Float[Array, "n V"], table: Float[Array, "b c V"], there: Int[Array, ""] | int
) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
    size = table.shape[1]

    def look(best, block):
        number, items = block
        at = number * size + jnp.arange(size)
        products = jnp.einsum("nv,cv->nc", queries, items, precision="highest")
        products = jnp.where(at < there, products, -jnp.inf)
        rows = jnp.concatenate([best[0], jnp.broadcast_to(at, products.shape)], axis=1)
        scores, places = jax.lax.top_k(jnp.concatenate([best[1], products], axis=1), k)
        return (jnp.take_along_axis(rows, places, axis=1), scores), None

    # What was found before stands first, so that of equal products the lower row stays.
    none = jnp.full((len(queries), k), -1, jnp.int32), jnp.full((len(queries), k), -jnp.inf)
    return jax.lax.scan(look, none, (jnp.arange(len(table)), table))[0]


def _by_faiss(queries: np.ndarray, items: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    index = faiss.IndexFlatIP(items.shape[1])
    index.add(np.ascontiguousarray(items, np.float32))
    scores, rows = index.search(np.ascontiguousarray(queries, np.float32), k)
    order = np.lexsort((rows, -scores), axis=1)
    return np.take_along_axis(rows, order, 1).astype(np.int32), np.take_along_axis(scores, order, 1)


def _has_faiss() -> bool:
    import importlib.util

    return importlib.util.find_spec("faiss") is not None
