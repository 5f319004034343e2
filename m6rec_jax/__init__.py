"""m6rec_jax: pretrain generative recommenders in JAX and serve them."""

__version__ = "0.1.0"
