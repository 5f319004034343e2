"""Prefixes that stay on the device between requests, so that a new event costs its own tokens and not the history's.

Keys and values lie in pages of `PAGE` tokens; a user holds as many pages as the prefix needs. A prefix is reused when
the request begins with all of it under the same parameters, and the tokens behind it are appended; anything else (an
edited history, a window that slid, another checkpoint) is read anew into the same user's pages. Who was asked for
longest ago gives up pages first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jaxtyping import Array, Float, Int

from m6rec_jax.config import ModelConfig
from m6rec_jax.decoding.cache import Prefix, check_causal
from m6rec_jax.decoding.shapes import PAGE, Prompt
from m6rec_jax.model.transformer import KeyValues

Pages = tuple[Float[Array, "N pages K page h"], Float[Array, "N pages K page h"]]


@dataclass
class _Held:
    """One user's prefix: what it was read from, how many tokens, and the pages in order."""

    digest: bytes
    length: int
    pages: list[int]


class PrefixCache:
    """Which users' prefixes lie in which pages: at most `budget` tokens, the least recently used leave first.

    A bookkeeper on the host: `arrays` are the pages on the device, made when first asked for and replaced by every
    program that writes them (they are donated to it, and changed in place). Hold `lock` from `ready` until then.
    `device`: where the programs run (None: where jax puts things).
    Raises ValueError when the budget is negative.
    """

    def __init__(self, config: ModelConfig, budget: int, device: jax.Device | None = None) -> None:
        if budget < 0:
            raise ValueError(f"cache_tokens={budget}: tokens kept on the device; 0 keeps none")
        self.config, self.budget, self.device = config, budget, device
        self.size = budget // PAGE
        self.lock = threading.RLock()
        self.arrays: Pages | None = None
        self.clear()

    def clear(self) -> None:
        """Forget every prefix; the arrays stay."""
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()
        self._free = list(range(self.size))[::-1]

    @property
    def tokens(self) -> int:
        """Tokens of all pages in use; never above the budget."""
        return PAGE * (self.size - len(self._free))

    @property
    def users(self) -> list[Hashable]:
        """Whose prefixes are held, least recently used first."""
        return list(self._held)

    def ready(self) -> None:
        """Make the arrays where there are none: at first, and after a program failed that they had been given to."""
        if self.arrays is None:
            self.clear()
            c = self.config
            shape = (c.layers, self.size, c.n_kv, PAGE, c.head_dim)
            # Placed as a program leaves them, or the first one would be compiled again for the second request.
            self.arrays = jnp.zeros(shape, c.dtype, device=self.device), jnp.zeros(shape, c.dtype, device=self.device)

    def give(self) -> Pages:
        """The arrays, for a program that replaces them (`arrays = ...`); until it has, there are none."""
        assert self.arrays is not None, "ready() comes first"
        pages, self.arrays = self.arrays, None
        return pages

    def known(self, user: Hashable, version: int, prompt: Prompt) -> int:
        """How many tokens at the start of a prompt need not be read again; 0: all must be.

        Less than the whole prompt, because the state behind its last token is what predicts. Counts as a use.
        """
        held = self._held.get(user)
        if held is None or held.length > len(prompt[0]):
            return 0
        if held.digest != _digest(version, prompt, held.length):
            return 0
        self._held.move_to_end(user)
        return min(held.length, len(prompt[0]) - 1)

    def pages_of(self, users: Sequence[Hashable], shape: tuple[int, int]) -> Int[np.ndarray, "B pages"]:
        """The pages that hold each user's prefix, in order; `size`, which is none, behind the last."""
        return self._table([self._held[user].pages for user in users], shape)

    def claim(
        self,
        users: Sequence[Hashable],
        version: int,
        prompts: Sequence[Prompt],
        shape: tuple[int, int],
        spared: Collection[Hashable] = (),
    ) -> Int[np.ndarray, "B pages"]:
        """Pages `[B, T / PAGE]` for the whole prompts of different users, who are held from now on.

        `shape` is that of the program, (B, T). A user's own pages come first and stay in their places. Prefixes of
        `users` and `spared` are not given up for others; whoever finds no room is not held, and has no pages (`size`).
        """
        kept = {*users, *spared}
        claimed = []
        for user, prompt in zip(users, prompts, strict=True):
            pages = self._room(user, -(-len(prompt[0]) // PAGE), kept)
            if pages:
                self._held[user] = _Held(_digest(version, prompt, len(prompt[0])), len(prompt[0]), pages)
                self._held.move_to_end(user)
            claimed.append(pages)
        return self._table(claimed, shape)

    def _room(self, user: Hashable, count: int, kept: Collection[Hashable]) -> list[int]:
        """`count` pages, the user's own first; none, and the user forgotten, when they cannot be had."""
        held = self._held.get(user)
        pages = [] if held is None else held.pages
        self._free += pages[count:]
        pages = pages[:count]
        while len(pages) < count <= self.size and (self._free or self._give_up(kept)):
            pages.append(self._free.pop())
        if len(pages) < count:
            self._held.pop(user, None)
            self._free += pages
            return []
        return pages

    def _give_up(self, kept: Collection[Hashable]) -> bool:
        """Free the pages of the least recently used prefix outside `kept`; whether there was one."""
        victim = next((user for user in self._held if user not in kept), None)
        if victim is None:
            return False
        self._free += self._held.pop(victim).pages
        return True

    def nowhere(self, shape: tuple[int, int]) -> Int[np.ndarray, "B pages"]:
        """A table of no pages: what is written there is dropped."""
        return self._table([], shape)

    def _table(self, pages: Sequence[list[int]], shape: tuple[int, int]) -> np.ndarray:
        B, T = shape
        table = np.full((B, T // PAGE), self.size, np.int32)
        for i, some in enumerate(pages):
            table[i, : len(some)] = some
        return table


def _digest(version: int, prompt: Prompt, length: int) -> bytes:
    """What stands for the first tokens of a prompt under the parameters of a version."""
    return xxhash.xxh3_128_digest(np.stack([part[:length] for part in prompt]).astype(np.int32).tobytes(), seed=version)


# -- inside a program ----------------------------------------------------------------------------------------------


def read_pages(pages: Pages, table: Int[Array, "B n"], known: Int[Array, " B"]) -> KeyValues:
    """Keys and values `[N, B, K, n * PAGE, h]` of the first `known` tokens of each row, zeros behind them.

    What lies behind may be another user's, or the NaN of a broken checkpoint, which no mask of the attention stops.
    """
    N, _, K, _, h = pages[0].shape
    B, n = table.shape
    there = (jnp.arange(n * PAGE) < known[:, None])[:, None, :, None]

    def read(x: Array) -> Array:
        found = jnp.swapaxes(x.at[:, table].get(mode="clip"), 2, 3)  # [N, B, K, n, PAGE, h]
        return jnp.where(there, found.reshape(N, B, K, n * PAGE, h), 0)

    return read(pages[0]), read(pages[1])


def write_pages(pages: Pages, table: Int[Array, "B n"], prefix: Prefix) -> Pages:
    """The pages with whole prefixes written to the places of `table`; rows without pages are dropped."""
    check_causal(prefix)
    N, B, K, _, h = prefix.kv[0].shape
    cut = lambda x: jnp.swapaxes(x.reshape(N, B, K, -1, PAGE, h), 2, 3)  # noqa: E731
    first, second = (old.at[:, table].set(cut(new), mode="drop") for old, new in zip(pages, prefix.kv, strict=True))
    return first, second


def write_tail(pages: Pages, table: Int[Array, "B n"], prefix: Prefix, known: Int[Array, " B"], most: int) -> Pages:
    """The pages with the tokens behind the first `known` of each prefix, at most `most` (static), written."""
    check_causal(prefix)
    size = pages[0].shape[1]
    place = known[:, None] + jnp.arange(most)  # [B, t]
    inside = place < prefix.lengths[:, None]
    place = jnp.where(inside, place, 0)
    page = jnp.where(inside, jnp.take_along_axis(table, place // PAGE, axis=1), size)
    rows = jnp.arange(len(table))[:, None]
    first, second = (
        old.at[:, page, :, place % PAGE].set(new[:, rows, :, place], mode="drop")
        for old, new in zip(pages, prefix.kv, strict=True)
    )
    return first, second
