"""Groups of uneven size against one product a group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.model import grouped

SIZES = {"even": (4, 4, 4), "uneven": (1, 0, 9), "none": (0, 0, 0), "one gets all": (0, 13, 0), "some are left": (3, 2, 1)}  # fmt: skip


@pytest.mark.parametrize("block", [1, 4, 5, 128])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients_are_those_of_one_product_a_group(monkeypatch, sizes, block):
    monkeypatch.setattr(grouped, "BLOCK", block)
    rng, ends = np.random.default_rng(0), np.cumsum(sizes)
    rows, matrices, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((13, 3), (3, 3, 6), (13, 6)))

    def slow(rows, matrices):
        parts = [rows[end - n : end] @ w for n, end, w in zip(sizes, ends, matrices, strict=True)]
        return jnp.concatenate([*parts, jnp.zeros((13 - ends[-1], 6))])

    run = lambda f: jax.vjp(f, rows, matrices)  # noqa: E731
    (found, back), (right, slow_back) = run(lambda *x: grouped.grouped(*x, jnp.array(sizes))), run(slow)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), (found, back(g)), (right, slow_back(g)))


def test_rows_are_not_multiplied_by_every_matrix():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((512, 16), (32, 16, 48))]
    loss = lambda rows, w: jnp.sum(grouped.grouped(rows, w, jnp.full(32, 16)) ** 2)  # noqa: E731
    used = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis()
    assert used.temp_size_in_bytes < 4 * 32 * 512 * 48  # what one product of all by all would hold
