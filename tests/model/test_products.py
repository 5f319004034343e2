"""Products with weights: the gradients that jax derives, by dots that contract as a CPU multiplies fast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.model.products import product

CASES = {"btd,df->btf": (8, 12), "btd,dkgh->btkgh": (8, 2, 1, 3)}


@pytest.mark.parametrize("subscripts", CASES)
def test_gradients_are_those_of_einsum(subscripts):
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    w = jax.random.normal(jax.random.key(1), CASES[subscripts])
    ours, theirs = (
        jax.grad(lambda x, w, f=f: jnp.sum(jnp.sin(f(subscripts, x, w))), (0, 1))(x, w) for f in (product, jnp.einsum)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


def test_a_weights_gradient_is_one_product_and_no_transpose():
    x, w = jnp.ones((2, 5, 8), jnp.bfloat16), jnp.ones((8, 12), jnp.bfloat16)
    loss = lambda w: jnp.sum(product("btd,df->btf", x, w).astype(jnp.float32))  # noqa: E731
    assert "transpose[" not in str(jax.make_jaxpr(jax.grad(loss))(w))
