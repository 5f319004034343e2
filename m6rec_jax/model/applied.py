"""What a tuned task's numbers do within the layers of a frozen backbone, of one task for all rows or of a task a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m6rec_jax.model.kernels import attend


class Applied(NamedTuple):
    """Tuned numbers as `Transformer.routed` takes them, of one task for all rows or of a task a row.

    `prompts [B, P, D]`, of which a row uses its last `used [B]`; `layers`: arrays `[N, ...]`, or `[N, K, ...]` of K tasks
    among which `select [B]` picks within each layer: nothing of the backbone is copied.
    """

    prompts: Float[Array, "B P D"] | None
    used: Int[Array, " B"]
    layers: dict[str, Array]
    select: Int[Array, " B"] | None = None

    def before(self, x: Array, view: Any) -> tuple[Array, Any]:
        """Soft prompts put in front of the tokens of unpacked rows, and the view of both, in which neither sees the other:
        `heard` is how tokens attend to prompts.

        Positions of tokens move up by the prompts there are. Prompts that a row does not use lie in front of all others.
        """
        if self.prompts is None:
            return x, view
        P = self.prompts.shape[1]
        slot, first = jnp.arange(P), (P - self.used)[:, None]
        there = slot >= first
        positions = jnp.concatenate([jnp.maximum(slot - first, 0), view.positions + self.used[:, None]], axis=1)
        k_start = jnp.concatenate([jnp.where(there, first, 0), view.k_start + P], axis=1)
        k_end = jnp.concatenate([jnp.where(there, P, 0), view.k_end + P], axis=1)
        return jnp.concatenate([self.prompts.astype(x.dtype), x], axis=1), type(view)(positions, k_start, k_end)

    def in_front(self, x: Array, view: Any, lengths: Array) -> tuple[Array, Any, Array]:
        """`before` for prefixes that later tokens attend to, which are right-padded: prompts that a row does not use go to
        its end. Rows, their view and lengths with the prompts."""
        if self.prompts is None:
            return x, view, lengths
        x, view = self.before(x, view)
        first = self.prompts.shape[1] - self.used
        at = jnp.arange(x.shape[1])
        x = jnp.take_along_axis(x, jnp.minimum(at + first[:, None], x.shape[1] - 1)[..., None], axis=1)
        lengths = lengths + self.used
        used = self.used[:, None]
        start, end = jnp.where(at < used, 0, used), jnp.where(at < used, used, jnp.minimum(at + 1, lengths[:, None]))
        return x, type(view)(jnp.broadcast_to(at, end.shape), start, end), lengths

    def after(self, x: Array) -> Array:
        """The states of the tokens alone."""
        return x if self.prompts is None else x[..., self.prompts.shape[1] :, :]


def layers_of(tuned: Applied | None) -> dict[str, Array]:
    """What `scan` slices beside the weights of the layers; nothing without tuning."""
    return {} if tuned is None else tuned.layers


def of_rows(layer: dict[str, Array], tuned: Applied | None) -> dict[str, Array]:
    """One layer's tuned numbers; of several tasks those of each row's own `[B, ...]`."""
    if tuned is None or tuned.select is None:
        return layer
    return {name: x[tuned.select] for name, x in layer.items()}


def add(made: Array, y: Float[Array, "B *T *I"], w: Mapping[str, Array], name: str) -> Array:
    """A product of `y` with the matrix `name`, and what LoRA adds to it where there is some: (y A) B."""
    if f"{name}_a" not in w:
        return made
    a, b = (w[f"{name}_{part}"].astype(y.dtype) for part in "ab")  # [I, r], [r, *out] of one task, or of each row's
    rows = "b" if a.ndim == 3 else ""
    out = "xyz"[: b.ndim - 1 - len(rows)]
    y = y.reshape(*made.shape[: made.ndim - len(out)], -1)
    lead = _lead(y)
    return made + jnp.einsum(f"{lead}r,{rows}r{out}->{lead}{out}", jnp.einsum(f"{lead}i,{rows}ir->{lead}r", y, a), b)


def heard(
    mixed: Float[Array, "B T K G h"],
    q: Float[Array, "B T K G h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    positions: Int[Array, "B T"],
    w: Mapping[str, Array],
    tuned: Applied | None,
    front: bool = False,
) -> Float[Array, "B T K G h"]:
    """What queries attended to, and beside it their attention to the row's own prompts, times the layer's gates.

    `k`, `v` begin with the P places of prompts, of which a row's own lie in `front` (`in_front`) or behind (`before`).
    Prompts among the queries, told by their positions, stay as they are. Nothing changes where there are no prompts.
    """
    if tuned is None or tuned.prompts is None:
        return mixed
    P, used = tuned.prompts.shape[1], tuned.used[:, None]
    start = jnp.zeros_like(positions) if front else jnp.zeros_like(positions) + P - used
    told = attend(q, k[:, :P], v[:, :P], start, start + used, "xla")
    gate = w["prompt_gate"].astype(mixed.dtype)[..., None]  # [K, G, 1] of one task, or of each row's
    gate = gate if tuned.select is None else gate[:, None]
    return mixed + jnp.where((positions >= used)[..., None, None, None], gate * told, 0)


def heard_by_beams(
    mixed: Float[Array, "B M T K G h"],
    q: Float[Array, "B M T K G h"],
    k: Float[Array, "B K S h"],
    v: Float[Array, "B K S h"],
    positions: Int[Array, "B M T"],
    w: Mapping[str, Array],
    tuned: Applied | None,
) -> Float[Array, "B M T K G h"]:
    """`heard` of beams over the prefix they share, as the cache keeps its keys and values: prompts in front."""
    if tuned is None or tuned.prompts is None:
        return mixed
    P = tuned.prompts.shape[1]
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])  # noqa: E731
    k, v = (jnp.swapaxes(x[:, :, :P], 1, 2) for x in (k, v))
    return heard(flat(mixed), flat(q), k, v, flat(positions), w, tuned, front=True).reshape(mixed.shape)


def opens(tuned: Applied | None, lengths: Int[Array, " B"]) -> Int[Array, " B"]:
    """Where the tokens of a prefix begin, behind the row's prompts, which tokens attend to by `heard` alone."""
    return jnp.zeros_like(lengths) if tuned is None else tuned.used


def adapted(forward: Array | int, y: Float[Array, "B *T D"], w: Mapping[str, Array]) -> Array | int:
    """FFN'(Z) = FFN(Z) + lambda [sigma(Z W1 + b1) W2 + b2], sigma = GELU (M6-Rec, section 4.2), where there is an adapter."""
    if "adapter_in" not in w:
        return forward
    per_row = w["adapter_in"].ndim == 3
    rows, lead = "b" if per_row else "", _lead(y)
    wide = lambda x: x.reshape(x.shape[0], *(1,) * (y.ndim - 2), -1) if per_row else x  # noqa: E731
    one = {name: w[f"adapter_{name}"].astype(y.dtype) for name in ("in", "in_bias", "out", "out_bias", "scale")}
    inner = jax.nn.gelu(jnp.einsum(f"{lead}i,{rows}ir->{lead}r", y, one["in"]) + wide(one["in_bias"]))
    made = jnp.einsum(f"{lead}r,{rows}ro->{lead}o", inner, one["out"]) + wide(one["out_bias"])
    return forward + wide(one["scale"]) * made


def kept(
    before: Float[Array, "B *T D"], after: Float[Array, "B *T D"], w: Mapping[str, Array]
) -> Float[Array, "B *T D"]:
    """The state after a layer; of rows whose task does without the layer (`on [B]` is 0) that before it."""
    if "on" not in w:
        return after
    return jnp.where(w["on"].reshape(-1, *(1,) * (after.ndim - 1)) > 0, after, before)


def _lead(y: Array) -> str:
    """Einsum letters of the leading axes: of rows, or of beams."""
    return "bmt" if y.ndim == 4 else "bt"
