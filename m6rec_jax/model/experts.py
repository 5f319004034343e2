"""Mixture of experts: a router sends each token to a few of a layer's many feed-forward networks (docs/experts.md).

Experts lie over the mesh axis `expert`, over which rows of a batch are dealt too. Nothing here adds by scatter, whose
order a device picks: tokens are moved by permutations, whose gradient is the permutation back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m6rec_jax.config import ModelConfig
from m6rec_jax.model import sharding
from m6rec_jax.model.grouped import grouped
from m6rec_jax.model.layers import swiglu

WEIGHTS = ("expert_gate", "expert_up", "expert_down")
GATHERED = (("experts", None, "ffn"), ("experts", None, "ffn"), ("experts", "ffn", None))  # their axes in use


class Routing(NamedTuple):
    """Sums over tokens and layers; each divided by `tokens` is a mean. Scalars; of several layers `[N]`.

    `balance`: 1 where experts are used evenly, at most their number (Fedus et al. 2022, eq. 4 to 6, over k choices); how
    often an expert was chosen and its mean probability are taken over all tokens of a batch slice. `router_z`: squared
    log-sum-exp of the logits (Zoph et al. 2022, eq. 5). `dropped`: share of a token's choices that found no place.
    """

    balance: Float[Array, "*n"]
    router_z: Float[Array, "*n"]
    dropped: Float[Array, "*n"]
    tokens: Float[Array, "*n"]

    def means(self) -> dict[str, float]:
        """The three means by name, of sums that are known; 0 without tokens."""
        tokens = max(float(self.tokens), 1.0)
        return {name: float(getattr(self, name)) / tokens for name in self._fields[:3]}


def penalty(config: ModelConfig, routing: Routing) -> Float[Array, ""]:
    """What routing adds to the training loss, as a sum over tokens and layers."""
    return config.balance * routing.balance + config.router_z * routing.router_z


def places(config: ModelConfig, length: int) -> int:
    """Tokens of a row of `length` that one expert takes, with capacity routing."""
    return max(1, round(config.capacity_factor * length * config.experts_per_token / config.experts))


def feed_forward(
    y: Float[Array, "B *T D"],
    real: Bool[Array, "B *T"] | None,
    w: dict[str, Array],
    config: ModelConfig,
    lead: tuple[str | None, ...],
    dropless: bool = True,
) -> tuple[Float[Array, "B *T D"], Routing]:
    """The chosen experts' outputs, weighted by a softmax over their logits (Jiang et al. 2024), and how tokens were routed.

    `w`: one layer's `router [D, E]`, `expert_gate` and `expert_up [E, D, F]`, `expert_down [E, F, D]`, gathered along
    fsdp; `lead`: logical axes of `y` but the last. Tokens that are not `real` (padding) go nowhere and count for nothing.
    """
    real = jnp.ones(y.shape[:-1], bool) if real is None else real
    over = sharding.along(*lead)
    axis = sharding.EXPERT if sharding.EXPERT in sharding.along("experts") else None
    tensor = sharding.along("ffn")

    def local(y: Array, real: Array, router: Array, *experts: Array) -> tuple[Array, Routing]:
        tokens = y.reshape(y.shape[0], -1, y.shape[-1])
        weights, chosen, routing = route(tokens, real.reshape(tokens.shape[:2]), router, config, over)
        if dropless:
            experts = [_vary(matrix, tuple(a for a in over if a != axis)) for matrix in experts]
            mixed = _dropless(_vary(tokens, tensor), weights, _vary(chosen, tensor), experts, axis)
        else:
            mixed, lost = _capacity(tokens, weights, chosen, experts, axis, config)
            lost = jax.lax.psum(lost, over) if over else lost
            routing = routing._replace(dropped=lost / config.experts_per_token)
        return (jax.lax.psum(mixed, tensor) if tensor else mixed).reshape(y.shape), routing

    stream = (*lead, None)
    run = sharding.per_shard(local, (stream, lead, (None, None), *GATHERED), (stream, Routing((), (), (), ())))
    return run(y, real, w["router"], *(w[name] for name in WEIGHTS))


def route(
    tokens: Float[Array, "B T D"],
    real: Bool[Array, "B T"],
    router: Float[Array, "D E"],
    config: ModelConfig,
    over: tuple[str, ...] = (),
) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"], Routing]:
    """Weights of each token's experts and which they are, best first; `E`, which is none, for a token that is not real.

    In float32 whatever the run computes in (Fedus et al. 2022, section 2.4). `over`: mesh axes that tokens are cut along.
    """
    E, k = config.experts, config.experts_per_token
    logits = jnp.einsum("btd,de->bte", tokens.astype(jnp.float32), router.astype(jnp.float32), precision="highest")
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(logits), k)
    one_hot = jax.nn.one_hot(chosen, E, dtype=jnp.float32) * real[..., None, None]
    weights = jax.nn.softmax(jnp.einsum("btke,bte->btk", one_hot, logits, precision="highest"), axis=-1)
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    seen = real.astype(jnp.float32)
    sums = (
        jnp.sum(one_hot, axis=(0, 1, 2)),
        jnp.sum(jnp.exp(logits - log_sum[..., None]) * seen[..., None], axis=(0, 1)),
        jnp.sum(jnp.square(log_sum) * seen),
        jnp.sum(seen),
    )
    times, mass, z, count = jax.lax.psum(sums, over) if over else sums
    balance = E * jnp.sum(times * mass) / (k * jnp.maximum(count, 1))
    return weights, jnp.where(real[..., None], chosen, E), Routing(balance, z, jnp.zeros_like(z), count)


def _dropless(
    tokens: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    chosen: Int[Array, "B T k"],
    experts: Sequence[Array],
    axis: str | None,
) -> Float[Array, "B T D"]:
    """Tokens sorted by expert and multiplied in groups of uneven size.

    Along a sharded expert axis every device gets all tokens and computes what its own experts are asked; sums go back
    to where the tokens came from. Whoever may get all tokens needs room for them, so nothing is gained by sending fewer.
    """
    gate, up, down = experts
    own = gate.shape[0]
    x, scales, asked = (part.reshape(-1, part.shape[-1]) for part in (tokens, weights, chosen))
    if axis:
        x, scales, asked = (jax.lax.all_gather(part, axis, tiled=True) for part in (x, scales, asked))
        asked = asked - jax.lax.axis_index(axis) * own
    here = (asked >= 0) & (asked < own)
    keys = jnp.where(here, asked, own).reshape(-1)
    many = len(keys)
    there = jnp.argsort(keys, stable=True)
    back = jnp.argsort(there).reshape(here.shape)
    sizes = jnp.sum(keys[:, None] == jnp.arange(own), axis=0, dtype=jnp.int32)
    # Rows past the groups belong to other devices' experts: what a kernel leaves in them is never read.
    there, back = jnp.where(jnp.arange(many) < jnp.sum(sizes), there, many), jnp.where(here, back, many)
    rows = send(x, there, back)
    inner = swiglu(grouped(rows, gate, sizes), grouped(rows, up, sizes))
    mixed = _mix(fetch(grouped(inner, down, sizes), there, back), scales)
    if axis:
        mixed = jax.lax.psum_scatter(mixed, axis, tiled=True)
    return mixed.reshape(tokens.shape)


def _capacity(
    tokens: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    chosen: Int[Array, "B T k"],
    experts: Sequence[Array],
    axis: str | None,
    config: ModelConfig,
) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
    """A fixed number of places for each row in each expert, and how many choices found none.

    First choices of all tokens go before second ones (Lepikhin et al. 2021), earlier tokens before later ones. A row is
    dealt with alone, so what is dropped does not depend on the mesh. Places travel to the experts' devices and back.
    """
    gate, up, down = experts
    (B, T, D), k, E = tokens.shape, chosen.shape[-1], config.experts
    C = places(config, T)
    queue = jnp.swapaxes(chosen, 1, 2).reshape(B, k * T)
    is_for = queue[..., None] == jnp.arange(E)
    rank = jnp.sum((jnp.cumsum(is_for, axis=1, dtype=jnp.int32) - 1) * is_for, axis=-1)
    rank = jnp.swapaxes(rank.reshape(B, k, T), 1, 2)
    kept = (chosen < E) & (rank < C)
    first = jnp.arange(B)[:, None, None] * (E * C)
    back = jnp.where(kept, first + chosen * C + rank, B * E * C).reshape(B * T, k)
    choices = jnp.arange(B * T * k).reshape(B * T, k)
    there = jnp.full(B * E * C, B * T * k, choices.dtype).at[back].set(choices, mode="drop", unique_indices=True)
    rows = send(tokens.reshape(-1, D), there, back).reshape(B, E, C, D)
    if axis:
        rows = jax.lax.all_to_all(rows, axis, 1, 0, tiled=True)
    inner = swiglu(*(jnp.einsum("becd,edf->becf", rows, matrix) for matrix in (gate, up)))
    out = jnp.einsum("becf,efd->becd", inner, down)
    if axis:
        out = jax.lax.all_to_all(out, axis, 0, 1, tiled=True)
    mixed = _mix(fetch(out.reshape(-1, D), there, back), weights.reshape(-1, k))
    return mixed.reshape(tokens.shape), jnp.sum((chosen < E) & ~kept).astype(jnp.float32)


def _vary(x: Array, axes: tuple[str, ...]) -> Array:
    """Marked as differing along mesh axes it is the same on, so that its gradient is summed there."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _mix(found: Float[Array, "n k D"], weights: Float[Array, "n k"]) -> Float[Array, "n D"]:
    """Each token's experts together, in float32 and rounded once."""
    return jnp.sum(found.astype(jnp.float32) * weights[..., None], axis=1).astype(found.dtype)


def _taken(x: Array, at: Array) -> Array:
    """Rows of `x`; zeros where there is no such row."""
    return x.at[at].get(mode="fill", fill_value=0)


@jax.custom_vjp
def send(x: Float[Array, "n D"], there: Int[Array, " m"], back: Int[Array, "n k"]) -> Float[Array, "m D"]:
    """Row i of the result is the token of choice `there[i]`, of k a token; `back`, its inverse, says where a choice went.

    `there[i] = n k` and `back[t, c] = m` mean nowhere.
    """
    return _taken(x, there // back.shape[1])


@jax.custom_vjp
def fetch(rows: Float[Array, "m D"], there: Int[Array, " m"], back: Int[Array, "n k"]) -> Float[Array, "n k D"]:
    """What became of each token's choices; the way back of `send`."""
    return _taken(rows, back)


def _send_back(where: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    return jnp.sum(_taken(g, where[1]), axis=1), None, None


def _fetch_back(where: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    return _taken(g.reshape(-1, g.shape[-1]), where[0]), None, None


send.defvjp(lambda x, there, back: (send(x, there, back), (there, back)), _send_back)
fetch.defvjp(lambda rows, there, back: (fetch(rows, there, back), (there, back)), _fetch_back)
