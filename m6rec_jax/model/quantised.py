"""Weights kept as int8 with a float scale a channel, multiplied out where they are used (qwix, extra `quant`).

Multiplied out a layer at a time, so that a program never holds all weights in full. Products stay in floating point: int8
on both sides makes XLA's programs for a CPU several times slower.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from m6rec_jax.errors import InputError

WEIGHTS = ("full", "int8")

# Axes whose numbers share a scale: those that a product sums over. Every other place (a layer, an output channel, a row
# of a token table) has its own, so that one large channel costs no other its digits. Not named here and left as they
# are: norms and routers, which are few numbers, and projections of content, which every item of a catalogue passes through.
SUMMED = {
    "query": (1,), "key": (1,), "value": (1,), "output": (1, 2, 3), "gate": (1,), "up": (1,), "down": (1,),
    "expert_gate": (2,), "expert_up": (2,), "expert_down": (2,), "tables": (1,),
}  # fmt: skip


def check_weights(weights: str) -> None:
    """InputError unless weights can be kept like this: one of `WEIGHTS`, with the package that it needs."""
    if weights not in WEIGHTS:
        raise InputError(f"weights={weights}: unknown; one of {', '.join(WEIGHTS)}")
    if weights == "int8" and importlib.util.find_spec("qwix") is None:
        raise InputError("weights=int8 needs the package qwix: pip install 'm6rec-jax[quant]'")


def kept_as(params: Any, weights: str, dtype: str = "float32") -> Any:
    """Parameters (a tree whose keys are a model's names) kept as one of `WEIGHTS`; what is int8 already stays so.

    int8: symmetric, the largest number of a channel at 127.5 scales: no number moves by more than half a scale. full: as
    they are, the layers' matrices in `dtype`, that of the model's products, so that no program has to round them first.
    Raises InputError as `check_weights`.
    """
    check_weights(weights)

    def keep(path: tuple, x: Any) -> Any:
        names = {getattr(key, "key", None) for key in path}
        summed = next((axes for name, axes in SUMMED.items() if name in names), None)
        if _is_quantised(x) and weights == "full":
            raise InputError(
                "these parameters are int8 and weights=full: assign those of the checkpoint, or take weights=int8"
            )
        if summed is None or _is_quantised(x):
            return x
        if weights == "full":
            return x.astype(dtype) if "block" in names else x
        return _int8(x, summed)

    return jax.tree_util.tree_map_with_path(keep, params, is_leaf=_is_quantised)


def dense(x: Any) -> jax.Array:
    """The array that int8 and scales stand for, in the type of the scales; any other array as it is."""
    if not _is_quantised(x):
        return x
    import qwix

    return qwix.dequantize(x)


def parameter_bytes(params: Any) -> int:
    """Bytes of all arrays, scales among them."""
    return sum(x.nbytes for x in jax.tree.leaves(params))


def _is_quantised(x: Any) -> bool:
    return hasattr(x, "qvalue")  # a qwix.QArray, told without importing qwix


@partial(jax.jit, static_argnums=1)
def _int8(x: jax.Array, summed: tuple[int, ...]) -> Any:
    import qwix

    return qwix.quantize(x, jnp.int8, channelwise_axes=sorted(set(range(x.ndim)) - set(summed)))
