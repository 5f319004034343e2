"""One call's way through the device: users in batches of one shape each, those who are known after what is kept of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from m6rec_jax.decoding import programs
from m6rec_jax.decoding.beam import Found
from m6rec_jax.decoding.cache import Prefix
from m6rec_jax.decoding.devices import Devices
from m6rec_jax.decoding.programs import Asked, Settings
from m6rec_jax.decoding.requests import Requests
from m6rec_jax.decoding.reuse import PrefixCache
from m6rec_jax.decoding.shapes import batches, bucket, full_batch, rows_of
from m6rec_jax.decoding.trie import Trie
from m6rec_jax.model.items import ItemTable

APPEND_MOST = 64  # more new tokens than this are not appended; the whole prefix is read anew
BATCH_CHILDREN = 1 << 25  # candidate children weighed by one step of one program

Lot = tuple[np.ndarray, Found]  # which users, and their lists


@dataclass(frozen=True)
class Wave:
    """All that requests of one call share: one checkpoint, one filter, one setting, from the first batch to the last.

    `version` tells the parameters from all others there were; `event` is the most tokens of an event;
    `both_ways`: tokens of a prefix see each other, of which nothing is kept.
    """

    define: Any
    params: Any
    version: int
    items: ItemTable
    trie: Trie
    under: jax.Array
    settings: Settings
    cache: PrefixCache
    event: int
    devices: Devices
    both_ways: bool = False

    @property
    def most(self) -> int:
        """Most users of one program on one device."""
        width = self.trie.width
        return BATCH_CHILDREN // max(width[0], *(self.settings.lanes * some for some in width[1:]), 1)

    @property
    def _first(self) -> tuple[Any, ItemTable, Trie, jax.Array]:
        """What all users share, on the device where prefixes are kept."""
        return self.devices.first((self.params, self.items, self.trie, self.under))

    def search(self, requests: Requests, who: np.ndarray, users: Sequence[Hashable] | None) -> list[Lot]:
        """Lists of the requests in `who`, batch by batch; `users` name those whose prefixes are kept (None: nobody)."""
        found: list[Lot] = []
        if users is not None and self.cache.size:
            # Of a user who is asked for twice the last request is kept: a program must not write a page twice.
            last = {users[u]: u for u in who.tolist() if users[u] is not None}
            named = np.array(list(last.values()), np.int64)
            with self.cache.lock:
                self.cache.ready()
                try:
                    found += self._search_known(requests, named, users)
                except BaseException:
                    self.cache.arrays = None  # some are held whose pages were never written: all are read again
                    raise
            who = np.setdiff1d(who, named)
        for chosen, T, B in batches(requests.lengths[who], self.most, self.devices.count):
            found.append((who[chosen], self.read(requests.asked(who[chosen], B, T))))
        return found

    def _search_known(self, requests: Requests, who: np.ndarray, users: Sequence[Hashable]) -> list[Lot]:
        """Prefixes that are kept are read on, by how much is new, before any of them is given up for others."""
        lengths, prompts = requests.lengths, requests.prompts
        known = np.array([self.cache.known(users[u], self.version, prompts[u]) for u in who.tolist()], np.int32)
        new = np.array([bucket(n, self.event, 4) for n in (lengths[who] - known).tolist()], np.int64)
        warm = (known > 0) & (new <= APPEND_MOST)
        spared = {users[u] for u in who[warm].tolist()}
        found: list[Lot] = []
        for most in np.unique(new[warm]).tolist():
            some, start = who[warm & (new == most)], known[warm & (new == most)]
            for chosen, T, B in batches(lengths[some], self.most):
                names, texts = [users[u] for u in some[chosen]], [prompts[u] for u in some[chosen]]
                table = self.cache.pages_of(names, (B, T))
                kept = self.cache.claim(names, self.version, texts, (B, T), spared)
                begin = np.pad(start[chosen], (0, B - len(chosen)))
                found.append((some[chosen], self.append(requests.asked(some[chosen], B, T), most, table, kept, begin)))
        some = who[~warm]
        for chosen, T, B in batches(lengths[some], self.most):
            names, texts = [users[u] for u in some[chosen]], [prompts[u] for u in some[chosen]]
            table = self.cache.claim(names, self.version, texts, (B, T))
            found.append((some[chosen], self.keep(requests.asked(some[chosen], B, T), table)))
        return found

    def read(self, asked: Asked) -> Found:
        """Whole prefixes, of which nothing is kept."""
        shared = self.params, self.items, self.trie, self.under
        return self.devices.run(programs.recommend, (self.define, self.settings, self.both_ways), shared, (asked,))

    def keep(self, asked: Asked, table: np.ndarray) -> Found:
        """Whole prefixes, kept in the pages of `table`."""
        params, items, *_ = self._first
        prefix = programs.read(
            self.define, params, items, asked.tokens, asked.item_rows, asked.lengths, both_ways=False
        )
        self.cache.arrays = programs.keep(self.cache.give(), table, prefix)
        return self._find(prefix, asked)

    def append(self, asked: Asked, most: int, table: np.ndarray, kept: np.ndarray, known: np.ndarray) -> Found:
        """Prefixes whose first `known` tokens lie in the pages of `table`; the others, at most `most`, go to `kept`."""
        params, items, *_ = self._first
        prefix, self.cache.arrays = programs.read_on(
            self.define, most, params, items, asked, self.cache.give(), table, kept, known
        )
        return self._find(prefix, asked)

    def _find(self, prefix: Prefix, asked: Asked) -> Found:
        """Lists after prefixes that lie on the first device."""
        return programs.find(self.define, self.settings, *self._first, prefix, asked)

    def shape(self, users: int, T: int, known: bool) -> tuple[int, int]:
        """(B, T) of the program for so many users with prefixes of T padded tokens; `known` ones are one device's."""
        return rows_of(users, full_batch(T, self.most), 1 if known else self.devices.count), T

    def warm_up(self, B: int, T: int, excluded: int, supported: int, known: bool) -> None:
        """Run the programs of a shape once, so that they are compiled: that of strangers, or those of `known` users."""
        asked = Requests.blank(B, T, excluded, supported).asked(np.arange(B), B, T)
        if not known:
            self.read(asked)
            return
        with self.cache.lock:
            self.cache.ready()
            nowhere = self.cache.nowhere((B, T))
            self.keep(asked, nowhere)
            self.append(asked, self.event, nowhere, nowhere, np.full(B, T - self.event, np.int32))
