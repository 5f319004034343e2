"""A prefix: what was read of a user, with the keys and values that later tokens attend to.

A causal prefix grows by appending; nothing in it changes when an event arrives. `prefill` and `append` are pure, for
use inside a jitted program.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m6rec_jax.model.items import ItemTable
from m6rec_jax.model.transformer import KeyValues, Transformer


@dataclass(frozen=True)
class Prefix:
    """B right-padded prefixes with room for P tokens each.

    `hidden [B, D]` is the state of the last token, the one that predicts what comes next. `causal`: no token sees a
    later one, so that the prefix may be appended to.
    """

    tokens: Int[Array, "B P"]
    item_rows: Int[Array, "B P"]
    lengths: Int[Array, " B"]
    kv: KeyValues
    hidden: Float[Array, "B D"]
    causal: bool = field(default=True, metadata={"static": True})

    @property
    def room(self) -> int:
        """Tokens that fit (P)."""
        return self.tokens.shape[1]

    def lanes(self, slots: int, lanes: int) -> tuple[Float[Array, "N B S M K h"], Float[Array, "N B S M K h"]]:
        """Empty keys and values of beams behind these prefixes, as `Transformer.extend` writes them."""
        N, B, K, _, h = self.kv[0].shape
        empty = jnp.zeros((N, B, slots, lanes, K, h), self.kv[0].dtype)
        return empty, empty


jax.tree_util.register_dataclass(Prefix)


def prefill(
    model: Transformer,
    items: ItemTable,
    tokens: Int[Array, "B T"],
    item_rows: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    room: int = 0,
    both_ways: bool = False,
) -> Prefix:
    """Read right-padded histories (each at least one token) once; `room` leaves space for that many more tokens.
    `both_ways`: tokens see later ones too."""
    hidden, kv = model.prefill(tokens, item_rows, lengths, items, both_ways=both_ways)
    spare = ((0, 0), (0, room))
    return Prefix(
        tokens=jnp.pad(tokens, spare),
        item_rows=jnp.pad(item_rows, spare, constant_values=-1),
        lengths=lengths,
        kv=tuple(jnp.pad(x, ((0, 0), (0, 0), *spare, (0, 0))) for x in kv),
        hidden=hidden,
        causal=not both_ways,
    )


def append(
    model: Transformer,
    items: ItemTable,
    prefix: Prefix,
    tokens: Int[Array, "B T"],
    item_rows: Int[Array, "B T"],
    counts: Int[Array, " B"],
) -> Prefix:
    """The prefix with `counts [B]` of the T new tokens of each row at its end (0 leaves a row as it was).

    It equals a prefill of the longer history. Tokens that do not fit the room are lost, so callers keep to it.
    """
    B, T = tokens.shape
    place = prefix.lengths[:, None] + jnp.arange(T)
    k, v = prefix.kv
    hidden, (new_k, new_v) = model.extend(
        tokens[:, None], item_rows[:, None], place[:, None], items, prefix.kv, prefix.lengths,
        prefix.lanes(T, 1), jnp.zeros((B, 1, T), jnp.int32), 0,
    )  # fmt: skip
    rows = jnp.arange(B)[:, None]
    place = jnp.where(jnp.arange(T) < counts[:, None], place, prefix.room)  # past the end: dropped
    put = lambda old, new: old.at[:, rows, :, place].set(jnp.moveaxis(new[:, :, :, 0], 0, 2), mode="drop")  # noqa: E731
    last = jnp.take_along_axis(hidden[:, 0], jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return replace(
        prefix,
        tokens=prefix.tokens.at[rows, place].set(tokens, mode="drop"),
        item_rows=prefix.item_rows.at[rows, place].set(item_rows, mode="drop"),
        lengths=prefix.lengths + counts,
        kv=(put(k, new_k), put(v, new_v)),
        hidden=jnp.where((counts > 0)[:, None], last, prefix.hidden),
    )  # fmt: skip


def check_causal(prefix: Prefix) -> None:
    """Raise ValueError unless what is read later leaves the prefix as it is."""
    if not prefix.causal:
        raise ValueError("this prefix is not causal: its tokens see later ones, so a new event means a new prefill")
