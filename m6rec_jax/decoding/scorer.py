"""The engine's face for items that are given: how likely they are, what the model says on the way, its states and vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from m6rec_jax.decoding import given, programs
from m6rec_jax.decoding.beam import Normalise
from m6rec_jax.decoding.devices import Devices
from m6rec_jax.decoding.lists import Lists
from m6rec_jax.decoding.prompts import Parts, Prompts, Queries
from m6rec_jax.decoding.requests import Requests
from m6rec_jax.decoding.shapes import batches, bucket, pad
from m6rec_jax.decoding.steps import Steps
from m6rec_jax.decoding.trie import Trie, codes_of, spelled_ranks
from m6rec_jax.decoding.wave import Wave
from m6rec_jax.model.items import ItemTable
from m6rec_jax.vocab import Vocab


class Scorer(ABC):
    """What an `Engine` says of items that it is given; nothing is searched for. What is read here is the engine's."""

    codes: np.ndarray
    prompts: Prompts
    vocab: Vocab
    devices: Devices
    items: ItemTable
    _define: Any
    _width: int
    _trie_host: Trie

    @property
    @abstractmethod
    def catalogue(self) -> int:
        """Items in the catalogue."""

    @property
    @abstractmethod
    def params(self) -> nnx.State:
        """The model's parameters, on the device."""

    @abstractmethod
    def _wave(self, k: int, beams: int | None, normalise: Normalise, allowed: np.ndarray | None) -> Wave:
        """One call's way through the device."""

    def rank(
        self,
        histories: Sequence[np.ndarray],
        candidates: Sequence[np.ndarray],
        *,
        times: Parts = None,
        kinds: Parts = None,
        queries: Sequence[Queries] | None = None,
        memory: tuple[np.ndarray, np.ndarray] | None = None,
        gate: np.ndarray | None = None,
        temperature: float | np.ndarray = 1.0,
    ) -> Lists:
        """Every user's own candidates (distinct catalogue rows), best first: what `recommend` lists when it allows no
        others and leaves none out. Lists are as wide as the most candidates there are.

        Nothing is pruned, so `exact` holds for all. Raises ValueError when arrays disagree in shape or a row is outside
        the catalogue.
        """
        given.check_rows(candidates, len(histories), self.catalogue)
        prompts = self.prompts(histories, times, kinds, queries)
        requests = Requests.of(prompts, self.catalogue, None, memory, gate, temperature)
        made = Lists.empty(len(histories), max(map(len, candidates), default=0))
        rank = self._trie_host.rank
        found = given.score(self._wave(1, None, "level", None), self._trie_host, self.vocab, requests, candidates)
        for u, (rows, (score, logp, logmass)) in enumerate(zip(candidates, found, strict=True)):
            order = np.lexsort((rank[rows], -score))
            n = len(order)
            made.rows[u, :n], made.scores[u, :n] = np.asarray(rows)[order], score[order]
            made.model_logp[u, :n], made.memory_logp[u, :n] = logp[order], logmass[order]
        made.exact[:] = True
        return made

    def logp(
        self,
        histories: Sequence[np.ndarray],
        rows: Sequence[np.ndarray],
        *,
        times: Parts = None,
        kinds: Parts = None,
        queries: Sequence[Queries | None] | None = None,
        temperature: float | np.ndarray = 1.0,
    ) -> list[np.ndarray]:
        """The model's log-probability of each of some catalogue rows after each history, in the order given.

        Each history is read once; raises what `rank` raises.
        """
        given.check_rows(rows, len(histories), self.catalogue)
        prompts = self.prompts(histories, times, kinds, queries)
        requests = Requests.of(prompts, self.catalogue, None, None, None, temperature)
        found = given.score(self._wave(1, None, "level", None), self._trie_host, self.vocab, requests, rows)
        return [logp for _, logp, _ in found]

    def steps(
        self,
        histories: Sequence[np.ndarray],
        rows: np.ndarray,
        *,
        times: Parts = None,
        kinds: Parts = None,
        queries: Sequence[Queries | None] | None = None,
        temperature: float | np.ndarray = 1.0,
        exclude: Sequence[np.ndarray] | None = None,
        allowed: np.ndarray | None = None,
        candidates: Sequence[np.ndarray] | None = None,
        others: int = 3,
    ) -> Steps:
        """Code by code, the way to each user's listed `rows [U, J]` (-1 = none), with the likeliest `others` beside it.

        `exclude` and `allowed` are those of `recommend`; or `candidates`, distinct rows of each user, as `rank` takes them.
        """
        given.check_rows([one[one >= 0] for one in rows], len(histories), self.catalogue)
        prompts = self.prompts(histories, times, kinds, queries)
        requests = Requests.of(prompts, self.catalogue, exclude, None, None, temperature)
        return given.walk(self._wave(1, None, "level", allowed), self.vocab, requests, rows, candidates, others)

    def score(
        self,
        histories: Sequence[np.ndarray],
        targets: np.ndarray,
        *,
        times: Sequence[np.ndarray] | None = None,
        kinds: Sequence[np.ndarray] | None = None,
        queries: Sequence[Queries] | None = None,
        temperatures: Sequence[float] | None = None,
    ) -> np.ndarray:
        """The model's log-probability of one target row a user after its history, by its likeliest spelling: float32 `[U]`.

        With `temperatures`, n numbers that the logits are divided by in turn: `[U, n]`.
        """
        targets = np.asarray(targets)
        if targets.shape != (len(histories),) or targets.min(initial=0) < 0 or targets.max(initial=0) >= self.catalogue:
            raise ValueError(f"targets {list(targets.shape)}: one row of 0..{self.catalogue - 1} a history is needed")
        prompts = self.prompts(histories, times, kinds, queries)
        heats = np.array([1.0] if temperatures is None else temperatures, np.float32)
        result = np.full((len(histories), len(heats)), -np.inf, np.float32)
        params = self.params  # one checkpoint for the whole call
        ranks, user = spelled_ranks(self._trie_host, targets)
        for chosen, T, B in batches([len(prompts[u][0]) for u in user], devices=self.devices.count):
            codes = np.pad(codes_of(self._trie_host, ranks[chosen]), ((0, B - len(chosen)), (0, 0)))
            own = (*pad([prompts[u] for u in user[chosen]], B, T), codes)
            logp = self.devices.run(programs.score, (self._define,), (params, self.items, heats), own)
            np.maximum.at(result, user[chosen], np.asarray(logp)[: len(chosen)])
        return result[:, 0] if temperatures is None else result

    def states(
        self,
        histories: Sequence[np.ndarray],
        *,
        times: Sequence[np.ndarray] | None = None,
        kinds: Sequence[np.ndarray] | None = None,
        queries: Sequence[Queries] | None = None,
    ) -> np.ndarray:
        """The state after each history, the one that scores the next item: float32 `[U, D]`."""
        prompts = self.prompts(histories, times, kinds, queries)
        result = np.zeros((len(histories), self._width), np.float32)
        params = self.params  # one checkpoint for the whole call
        for chosen, T, B in batches([len(tokens) for tokens, _ in prompts], devices=self.devices.count):
            own = pad([prompts[u] for u in chosen], B, T)
            states = self.devices.run(programs.states, (self._define,), (params, self.items), own)
            result[chosen] = np.asarray(states)[: len(chosen)]
        return result

    def item_vectors(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of catalogue rows float32 `[n, D]`: the mean of what the model reads at the codes of each item, the
        last of which brings its content. With one level that is its row of the output table: times a state, a logit."""
        rows = np.asarray(rows, np.int32)
        count = self.devices.count
        size = count * bucket(-(-max(len(rows), 1) // count), 64)
        padded = np.pad(rows, (0, size - len(rows)), mode="edge") if len(rows) else np.zeros(size, np.int32)
        shared = self.params, self.items
        made = self.devices.run(programs.item_vectors, (self._define,), shared, (self.codes[padded], padded))
        return np.asarray(made)[: len(rows)]
