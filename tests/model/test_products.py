"""Products with weights: the gradients that jax derives, by dots that contract as a CPU multiplies fast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.model.products import product

CASES = {
    "btd,df->btf": ((2, 5, 8), (8, 12)),
    "btd,dkgh->btkgh": ((2, 5, 8), (8, 2, 1, 6)),
    "btf,fd->btd": ((2, 5, 12), (12, 8)),  # the weight's gradient is made turned
    "btkgh,kghd->btd": ((2, 5, 2, 1, 6), (2, 1, 6, 4)),
}


@pytest.mark.parametrize("subscripts", CASES)
def test_gradients_are_those_of_einsum(subscripts):
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(CASES[subscripts]))
    ours, theirs = (
        jax.grad(lambda x, w, f=f: jnp.sum(jnp.sin(f(subscripts, x, w))), (0, 1))(x, w) for f in (product, jnp.einsum)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


def test_a_weights_gradient_is_one_product_and_no_transpose():
    x, w = jnp.ones((2, 5, 8), jnp.bfloat16), jnp.ones((8, 12), jnp.bfloat16)
    loss = lambda w: jnp.sum(product("btd,df->btf", x, w).astype(jnp.float32))  # noqa: E731
    assert "transpose[" not in str(jax.make_jaxpr(jax.grad(loss))(w))


def test_of_a_weights_gradient_the_smaller_side_is_turned():
    """The turned side comes first and is summed over its leading letters: it never is the larger one."""
    x, w = jnp.ones((2, 5, 12)), jnp.ones((12, 8))
    text = str(jax.make_jaxpr(jax.grad(lambda w: jnp.sum(jnp.sin(product("btf,fd->btd", x, w)))))(w))
    assert "f32[8,12] = dot_general" in text
    assert "f32[12,8] = dot_general" not in text


def test_a_kept_side_is_turned_and_not_made_anew():
    """What went into a product is not scaled again, entry by entry, while it is turned for the weight's gradient."""
    x, scale, w = jnp.ones((2, 128, 64)), jnp.ones((2, 128, 1)), jnp.ones((64, 256))
    loss = lambda w, x, scale: jnp.sum(jnp.sin(product("btd,df->btf", x * scale, w)))  # noqa: E731
    program = jax.jit(jax.grad(loss)).lower(w, x, scale).compile().as_text()
    turned = [part for part in program.split("\n\n") if " copy(" in part]
    assert turned
    assert not any(" multiply(" in part for part in turned)
