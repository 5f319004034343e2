"""Parts of other people's models that the ablation table tries and the product does without.

A variant stands in for the Transformer while `variant(name)` is open, in training and in ranking alike. Atomic codes
only: a beam's further tokens would ask for state that no cache here keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from m6rec_jax.config import ModelConfig
from m6rec_jax.model import load, sharding
from m6rec_jax.model.items import Embeddings
from m6rec_jax.model.layers import scale, weight
from m6rec_jax.model.transformer import Transformer
from m6rec_jax.vocab import BOS

BEFORE = 2  # inputs that the convolution reads beside the present one


class ConvolvedEmbeddings(Embeddings):
    """A causal depthwise convolution over the input vectors of each example; the identity at first."""

    def __init__(self, config: ModelConfig, *args: Any, rngs: nnx.Rngs):
        super().__init__(config, *args, rngs=rngs)
        self.taps = scale((BEFORE, config.width), (None, None))

    def read(self, tokens: jax.Array, item_rows: jax.Array, items: Any, key: jax.Array | None) -> jax.Array:
        x = super().read(tokens, item_rows, items, key)
        rows = tokens.ndim == 2  # of training; a look back needs the whole of them
        if rows:
            x, tokens = sharding.place(x, "batch", None, None), sharding.place(tokens, "batch", None)
        example, made = jnp.cumsum(tokens == BOS, axis=-1), x
        for back in range(1, BEFORE + 1):
            before = jnp.pad(x, ((0, 0), (back, 0), (0, 0)))[:, :-back]
            same = jnp.pad(example, ((0, 0), (back, 0)), constant_values=-1)[:, :-back] == example
            made = made + jnp.where(same[..., None], before, 0) * self.taps[...][back - 1]
        return sharding.place(made, "batch", "position", None) if rows else made


class WithConvolution(Transformer):
    """A short look back ahead of attention, as state-space and convolutional recommenders have it."""

    def __init__(self, *args: Any, rngs: nnx.Rngs):
        super().__init__(*args, rngs=rngs)
        self.embeddings = ConvolvedEmbeddings(*args, rngs=rngs)


class WithHead(Transformer):
    """Two more matrices between the last state and the output table, beside a skip connection."""

    def __init__(self, *args: Any, rngs: nnx.Rngs):
        super().__init__(*args, rngs=rngs)
        D = self.config.width
        self.head_in = weight(rngs, (D, 2 * D), ("embed", "ffn"), D**-0.5)
        self.head_out = weight(rngs, (2 * D, D), ("ffn", "embed"), (2 * D) ** -0.5 / 4)

    def routed(self, *args: Any, **options: Any) -> tuple[jax.Array, Any]:
        x, routing = super().routed(*args, **options)
        return self._head(x, "bt"), routing

    def prefill(self, *args: Any, **options: Any) -> tuple[jax.Array, Any]:
        x, kv = super().prefill(*args, **options)
        return self._head(x, "b"), kv

    def _head(self, x: jax.Array, batch: str) -> jax.Array:
        """`batch`: einsum letters of the leading axes."""
        lead = ("batch", *(None,) * (len(batch) - 1))
        into = sharding.gather_weight(self.head_in[...], "embed", "ffn")
        back = sharding.gather_weight(self.head_out[...], "ffn", "embed")
        inner = jax.nn.silu(jnp.einsum(f"{batch}d,df->{batch}f", x, into, out_sharding=sharding.out(*lead, "ffn")))
        return x + jnp.einsum(f"{batch}f,fd->{batch}d", inner, back, out_sharding=sharding.out(*lead, None))


VARIANTS: dict[str, type[Transformer]] = {"short causal convolution": WithConvolution, "MLP head": WithHead}


@contextmanager
def variant(name: str) -> Iterator[None]:
    """While open, every model made is the variant; a name that is none leaves the Transformer as it is."""
    whole = load.Transformer
    load.Transformer = VARIANTS.get(name, whole)  # type: ignore[misc]
    try:
        yield
    finally:
        load.Transformer = whole  # type: ignore[misc]
