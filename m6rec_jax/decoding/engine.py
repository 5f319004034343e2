"""The engine: histories in, lists of real items out; prompts in, text out. Batches by length, one program a shape.

Parameters are arguments of every program, so a new checkpoint (`engine.params = ...`) compiles nothing again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from m6rec_jax.decoding import programs
from m6rec_jax.decoding.beam import Found, lanes_of
from m6rec_jax.decoding.prompts import Prompts, Queries
from m6rec_jax.decoding.sampling import Sampling
from m6rec_jax.decoding.shapes import batches, bucket, pad, rectangle
from m6rec_jax.decoding.trie import allowed_under, build_trie
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import ItemTable, item_table
from m6rec_jax.model.transformer import Transformer
from m6rec_jax.vocab import Vocab

BEAMS = 20
BATCH_CHILDREN = 1 << 25  # candidate children weighed by one step of one program


@dataclass(frozen=True)
class Lists:
    """Ranked lists of U users: `rows` int32 `[U, k]`, -1 where nothing is left to show.

    `scores` are log-probabilities, falling along a list; `model_logp` and `memory_logp` their two parts before the
    gate. `exact [U]`: nothing that was pruned could have been in the list.
    """

    rows: np.ndarray
    scores: np.ndarray
    model_logp: np.ndarray
    memory_logp: np.ndarray
    exact: np.ndarray


class Engine:
    """A model with its catalogue, ready to decode.

    `codes [C, L]`, `content [C, Dc]`, `seen [C]` are the dataset's; `timed` and `n_kinds` say how its histories are
    spelled; `length` is the longest prefix read, <s> included. Raises InputError when codes and model disagree.
    """

    def __init__(self, model: Transformer, codes: np.ndarray, content: np.ndarray, seen: np.ndarray, *,
                 timed: bool = False, n_kinds: int = 0, length: int = 256) -> None:  # fmt: skip
        self.vocab: Vocab = model.vocab
        self.codes = np.asarray(codes)
        _check_codes(self.codes, self.vocab)
        self.prompts = Prompts(self.vocab, self.codes, timed, n_kinds, length)
        self._define, self.params = nnx.split(model)
        self._width = model.config.width
        self._trie_host = build_trie(self.codes)
        self.trie = jax.device_put(self._trie_host)
        self.items: ItemTable = jax.device_put(item_table(content, seen))

    @property
    def catalogue(self) -> int:
        return len(self.codes)

    @property
    def params(self) -> nnx.State:
        """The model's parameters, on the device; assign those of another checkpoint to swap it."""
        return self._params

    @params.setter
    def params(self, params: nnx.State) -> None:
        self._params = jax.device_put(params)

    def recommend(
        self,
        histories: Sequence[np.ndarray],
        *,
        times: Sequence[np.ndarray] | None = None,
        kinds: Sequence[np.ndarray] | None = None,
        queries: Sequence[Queries] | None = None,
        memory: tuple[np.ndarray, np.ndarray] | None = None,
        gate: np.ndarray | None = None,
        temperature: float | np.ndarray = 1.0,
        exclude: Sequence[np.ndarray] | None = None,
        allowed: np.ndarray | None = None,
        k: int = 10,
        beams: int | None = None,
    ) -> Lists:
        """The k best items after each history of catalogue rows, oldest first (-1 = an event without an item).

        `times`, `kinds`, `queries`: as `spell_history` takes them, one a user. `memory`: rows and mass `[U, J]` of
        each user's support (-1 pads), mixed in with weight `gate [U]`; `temperature`, one for
        all or `[U]`, divides the model's logits.
        `exclude`: rows a user shall not get;
        `allowed` bool `[C]` filters for all. `beams` below k count as k. Histories are cut to the newest whole events
        that fit. Raises ValueError when arrays disagree in shape or a row is outside the catalogue.
        """
        users, n = len(histories), min(k, self.catalogue)
        if k < 1:
            raise ValueError(f"k={k}: must be at least 1")
        rows, mass = memory if memory is not None else (np.full((users, 1), -1, np.int32), np.zeros((users, 1)))
        gate = np.zeros(users, np.float32) if gate is None else np.asarray(gate, np.float32)
        heat = np.broadcast_to(np.asarray(temperature, np.float32), users)
        exclude = [np.zeros(0, np.int32)] * users if exclude is None else exclude
        if not len(rows) == len(mass) == len(gate) == len(exclude) == users:
            raise ValueError(f"{users} histories, {len(exclude)} exclusions, {len(rows)} memories, {len(gate)} gates")
        for name, given in (("exclude", exclude), ("memory", rows)):
            if max((int(np.max(r, initial=-1)) for r in given), default=-1) >= self.catalogue:
                raise ValueError(f"{name}: a row outside the catalogue of {self.catalogue} items")
        under = jax.device_put(allowed_under(self._trie_host, allowed))
        prompts = self.prompts(histories, times, kinds, queries)
        lanes = lanes_of(self.trie, beams or BEAMS, n)
        children = max(self.trie.width[0], *(lanes * width for width in self.trie.width[1:]), 1)
        waiting: list[tuple[np.ndarray, Found]] = []
        for chosen, T, B in batches([len(tokens) for tokens, _ in prompts], BATCH_CHILDREN // children):
            tokens, item_rows, lengths = pad([prompts[u] for u in chosen], B, T)
            excluded = [exclude[u] for u in chosen]
            excluded_width = bucket(max(map(len, excluded)), 32, 4)
            support_width = bucket(int((mass[chosen] > 0).sum(1).max(initial=0)), 64, 8)
            support = [_supported(rows[u], mass[u]) for u in chosen]
            found = programs.recommend(
                self._define, n, lanes, self.params, self.items, self.trie, under, tokens, item_rows, lengths,
                rectangle(excluded, B, excluded_width, -1, np.int32),
                rectangle([r for r, _ in support], B, support_width, -1, np.int32),
                rectangle([m for _, m in support], B, support_width, 0, np.float32),
                np.pad(gate[chosen], (0, B - len(chosen))), np.pad(heat[chosen], (0, B - len(chosen)), constant_values=1),
            )  # fmt: skip
            waiting.append((chosen, found))
        return _lists(waiting, users, k)

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
        """The model's log-probability of one target row a user after its history: float32 `[U]`, by a full forward.

        With `temperatures`, n numbers that the logits are divided by in turn: `[U, n]`.
        """
        targets = np.asarray(targets)
        if targets.shape != (len(histories),) or targets.min(initial=0) < 0 or targets.max(initial=0) >= self.catalogue:
            raise ValueError(f"targets {list(targets.shape)}: one row of 0..{self.catalogue - 1} a history is needed")
        prompts = self.prompts(histories, times, kinds, queries)
        heats = np.array([1.0] if temperatures is None else temperatures, np.float32)
        result = np.zeros((len(histories), len(heats)), np.float32)
        for chosen, T, B in batches([len(tokens) for tokens, _ in prompts]):
            tokens, item_rows, lengths = pad([prompts[u] for u in chosen], B, T)
            codes = np.pad(self.codes[targets[chosen]], ((0, B - len(chosen)), (0, 0)))
            logp = programs.score(self._define, self.params, self.items, tokens, item_rows, lengths, codes, heats)
            result[chosen] = np.asarray(logp)[: len(chosen)]
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
        for chosen, T, B in batches([len(tokens) for tokens, _ in prompts]):
            inputs = pad([prompts[u] for u in chosen], B, T)
            result[chosen] = np.asarray(programs.states(self._define, self.params, self.items, *inputs))[: len(chosen)]
        return result

    def item_vectors(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of catalogue rows float32 `[n, D]`: the mean of what the model reads at the codes of each item, the
        last of which brings its content. With one level that is its row of the output table: times a state, a logit."""
        rows = np.asarray(rows, np.int32)
        size = bucket(max(len(rows), 1), 64)
        padded = np.pad(rows, (0, size - len(rows)), mode="edge") if len(rows) else np.zeros(size, np.int32)
        return np.asarray(programs.item_vectors(self._define, self.params, self.items, self.codes[padded], padded))[
            : len(rows)
        ]

    def write(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        *,
        item_rows: Sequence[np.ndarray] | None = None,
        most: int = 64,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        seeds: int | Sequence[int] = 0,
    ) -> list[list[int]]:
        """Continue each prompt of token ids by text: at most `most` ids, ending before </s>.

        Settings are one for all or one a prompt (see `Sampling`). `item_rows`: where a prompt completes a spelling
        whose features shall be read. Raises ValueError on an empty prompt or a setting out of range.
        """
        count = len(prompts)
        each = lambda value, kind: np.broadcast_to(np.asarray(value, kind), (count,))  # noqa: E731
        heat, kept, mass, seed = each(temperature, np.float32), each(top_k, np.int32), each(top_p, np.float32), each(seeds, np.uint32)  # fmt: skip
        if (heat < 0).any() or (kept < 0).any() or (mass <= 0).any() or most < 1:
            raise ValueError("temperature and top_k must not be negative, top_p and most must be above 0")
        if any(len(p) == 0 for p in prompts):
            raise ValueError("an empty prompt: begin with <s>")
        rows = [np.full(len(p), -1) for p in prompts] if item_rows is None else item_rows
        pairs = [(np.asarray(p, np.int32), np.asarray(r, np.int32)) for p, r in zip(prompts, rows, strict=True)]
        result: list[list[int]] = [[] for _ in range(count)]
        for chosen, T, B in batches([len(p) for p in prompts]):
            fill = lambda x, chosen=chosen, B=B: np.pad(x[chosen], (0, B - len(chosen)))  # noqa: E731
            sampling = Sampling(fill(heat), fill(kept), fill(mass), fill(seed), fill(np.full(count, most, np.int32)))
            inputs = pad([pairs[i] for i in chosen], B, T)
            out, written = programs.write(self._define, bucket(most, 16), self.params, self.items, *inputs, sampling)
            for i, ids, n in zip(chosen, np.asarray(out), np.asarray(written), strict=False):
                result[i] = ids[:n].tolist()
        return result


def _check_codes(codes: np.ndarray, vocab: Vocab) -> None:
    sizes = [s.size for s in vocab.levels]
    if codes.ndim != 2 or codes.shape[1] != len(sizes) or (codes >= sizes).any():
        raise InputError(
            f"codes {list(codes.shape)} do not fit the model's code levels {sizes}; "
            "take the catalogue it was trained on, or one made with `prepare --like RUN`"
        )


def _supported(rows: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    some = mass > 0
    return rows[some], mass[some]


def _lists(waiting: Sequence[tuple[np.ndarray, Found]], users: int, k: int) -> Lists:
    """Results of all batches in the users' order; places past the catalogue stay empty."""
    rows = np.full((users, k), -1, np.int32)
    scores, model_logp, memory_logp = (np.full((users, k), -np.inf, np.float32) for _ in range(3))
    exact = np.zeros(users, bool)
    for chosen, found in waiting:
        n, width = len(chosen), found.rows.shape[1]
        for whole, part in ((rows, found.rows), (scores, found.scores), (model_logp, found.model_logp), (memory_logp, found.memory_logp)):  # fmt: skip
            whole[chosen, :width] = np.asarray(part)[:n]
        exact[chosen] = np.asarray(found.exact)[:n]
    return Lists(rows, scores, model_logp, memory_logp, exact)
