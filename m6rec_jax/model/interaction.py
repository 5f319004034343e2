"""Late interaction: the fine parts of an example are read alone in the first layers and meet in the last ones.

M6-Rec (arXiv 2205.08084), multi-segment late interaction: "Male." "Clicked X." "Will click Z?" each run alone, positions
beginning anew, through all layers but the last `model.late`. What a part looks like there depends on the part only, so it
is computed once and kept (`decoding/late`); a request pays for the last layers.

Only an example with a frame is cut: one that begins `<s> <source>` or `<s> <target>` and whose source is bidirectional.
Behaviour, plain text and everything that is read left to right (as decoding does) is one part and goes through all
layers as it does without late interaction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m6rec_jax.model import sharding
from m6rec_jax.vocab import END_SOURCE, SEP, SOURCE, TARGET

MOST_PARTS = 64  # part embeddings; parts further from the end of their example share the last one
OPENS = (SEP, END_SOURCE, TARGET)  # tokens that a part begins with; the first part begins with its example
FRAMES = (SOURCE, TARGET)  # second token of an example that is cut


class Parts(NamedTuple):
    """Of every token: its position in its part, what it sees there, and its part's number, counted from the example's end.

    The request ("Will click Z?") is number 0 and the newest event always has the same number, however long the history.
    """

    positions: Int[Array, "B T"]
    k_start: Int[Array, "B T"]
    k_end: Int[Array, "B T"]
    number: Int[Array, "B T"]


def cut(
    tokens: Int[Array, "B T"], positions: Int[Array, "B T"], k_start: Int[Array, "B T"], k_end: Int[Array, "B T"]
) -> Parts:
    """The parts of packed rows, from the rows and their view (positions count from 0 in every example)."""

    def local(tokens: Array, positions: Array, k_start: Array, k_end: Array) -> Parts:
        T = tokens.shape[1]
        at = jnp.broadcast_to(jnp.arange(T), tokens.shape)
        pick = lambda x, index: jnp.take_along_axis(x, jnp.clip(index, 0, T - 1), axis=1)  # noqa: E731
        behind = lambda x: jnp.concatenate([x[:, 1:], jnp.ones_like(x[:, :1])], axis=1)  # noqa: E731
        first = positions == 0
        framed = _any_of(pick(tokens, k_start + 1), FRAMES) & (pick(k_end, k_start) > k_start + 1) & (k_end > k_start)
        begins = first | (framed & _any_of(tokens, OPENS))
        start = jax.lax.cummax(jnp.where(begins, at, 0), axis=1)
        end = jax.lax.cummin(jnp.where(behind(begins), at + 1, T), axis=1, reverse=True)
        last = jax.lax.cummin(jnp.where(behind(first), at, T - 1), axis=1, reverse=True)  # of the example
        so_far = jnp.cumsum(begins, axis=1)
        number = jnp.minimum(pick(so_far, last) - so_far, MOST_PARTS - 1)
        return Parts(at - start, jnp.maximum(k_start, start), jnp.minimum(k_end, end), number)

    rows = ("batch", None)  # a part may reach over the border between two devices of a row
    found = sharding.per_shard(local, (rows,) * 4, Parts(*(rows,) * 4))(tokens, positions, k_start, k_end)
    return Parts(*(sharding.place(x, "batch", "position") for x in found))


def part_starts(tokens: np.ndarray) -> np.ndarray:
    """Where the parts of one framed example `[T]` begin: what `cut` finds in it, on the host."""
    begins = _any_of(tokens, OPENS)
    begins[0] = True
    return np.flatnonzero(begins)


def opens(tokens: np.ndarray) -> int:
    """Tokens of an instance before its request, which begins at the last `<target>`: they see each other."""
    found = np.flatnonzero(tokens == TARGET)
    return int(found[-1]) if len(found) else len(tokens)


def part_numbers(lengths: np.ndarray) -> np.ndarray:
    """The part number of every token of one example, from the lengths of its parts in order."""
    return np.repeat(np.minimum(np.arange(len(lengths))[::-1], MOST_PARTS - 1), lengths)


def embedded(table: Float[Array, "P D"], number: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """The embedding of each token's part."""
    chosen = jax.nn.one_hot(number, table.shape[0], dtype=dtype)
    table = sharding.gather_weight(table, None, "embed").astype(dtype)
    return jnp.einsum("btp,pd->btd", chosen, table, out_sharding=sharding.out("batch", "position", None))


def meet(x: Array, depth: Array, joined: Any, alone: Any, parts: Array) -> tuple[Array, Any]:
    """The stream into a layer and what its tokens see: `alone` below depth 0, where parts meet and are told apart."""
    seen = jax.tree.map(lambda own, all: jnp.where(depth < 0, own, all), alone, joined)
    return x + jnp.where(depth == 0, parts, 0), seen


def _any_of(tokens: Any, some: tuple[int, ...]) -> Any:
    found = tokens == some[0]
    for token in some[1:]:
        found = found | (tokens == token)
    return found
