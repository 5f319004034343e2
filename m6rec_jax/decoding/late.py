"""Scores of instances whose fine parts were read before: what a part looks like alone is kept by its content, and a request
pays for the layers in which parts meet (model/interaction; M6-Rec, arXiv 2205.08084).

The states of a part behind the first layers depend on its tokens and the model alone, so users share them: "A student.",
"Watched Heat (1995)." and an item that is a candidate for many are read once.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from m6rec_jax.artifacts.content import content, digests
from m6rec_jax.decoding.shapes import Prompt, batches, bucket, rectangle
from m6rec_jax.errors import InputError
from m6rec_jax.model.interaction import opens, part_numbers, part_starts
from m6rec_jax.model.items import Catalogues
from m6rec_jax.model.transformer import Transformer, View, framed
from m6rec_jax.vocab import TARGET

CACHE_BYTES = 256 << 20
READ_WIDTH = 64  # tokens of a row of parts that are read: attention is over whole rows, so short ones waste least
READ_ROWS = 256


class Uses(NamedTuple):
    """Parts that were asked for, and how many of them had been kept."""

    asked: int = 0
    kept: int = 0

    @property
    def rate(self) -> float:
        return self.kept / max(self.asked, 1)


class PartCache:
    """Which parts' states lie in which slots (a token each): at most `size` tokens, the least recently used leave first.

    A bookkeeper on the host; the states lie on the device, in an array `[size, D]`.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.clear()

    def clear(self) -> None:
        """Forget every part."""
        self._held: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._free = np.arange(self.size, dtype=np.int32)
        self._left = self.size  # entries of `_free` that count

    @property
    def tokens(self) -> int:
        """Slots in use; never above `size`."""
        return self.size - self._left

    def __len__(self) -> int:
        return len(self._held)

    def find(self, key: bytes) -> np.ndarray | None:
        """The slots of a part, in order; None when it is not held. Counts as a use."""
        slots = self._held.get(key)
        if slots is not None:
            self._held.move_to_end(key)
        return slots

    def claim(self, key: bytes, tokens: int) -> np.ndarray:
        """Slots for a part of so many tokens, held from now on. Raises ValueError when it can never fit."""
        if tokens > self.size:
            raise ValueError(f"a part of {tokens} tokens, and the cache has {self.size} slots")
        while self._left < tokens:
            _, freed = self._held.popitem(last=False)
            self._free[self._left : self._left + len(freed)] = freed
            self._left += len(freed)
        self._left -= tokens
        slots = self._free[self._left : self._left + tokens].copy()
        self._held[key] = slots
        return slots


class LateScorer:
    """A model with `model.late`, ready to score instances: token rows that end at `</target>`.

    `items`: the catalogue's facts; `cache_bytes` of states are kept on the device, taken at the first call. One device.
    Raises InputError when the model was trained without late interaction.
    """

    def __init__(self, model: Transformer, items: Catalogues, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.config = model.config
        if not self.config.late:
            raise InputError("model.late=0: parts of this model meet in the first layer and cannot be kept; train with model.late above 0")  # fmt: skip
        self._define, params = nnx.split(model)
        self.items = items
        self.cache = PartCache(cache_bytes // (self.config.width * jnp.dtype(self.config.dtype).itemsize))
        self.uses = Uses()
        self._states: Array | None = None
        self._lock = threading.RLock()
        self.params = params

    @property
    def params(self) -> nnx.State:
        """The model's parameters; assign those of another checkpoint to swap it: what was kept of the last is not found."""
        return self._current[0]

    @params.setter
    def params(self, params: nnx.State) -> None:
        self._current = params, model_digest(params, self.items)

    def score(self, instances: Sequence[Prompt], options: Float[Array, "C D"]) -> Float[np.ndarray, "n C"]:
        """The model's float32 logits of each option after each instance: those of a full forward pass.

        `options`: rows of the output table. Raises InputError when an instance has more tokens than the cache.
        """
        found = np.zeros((len(instances), len(options)), np.float32)
        longest = max((len(tokens) for tokens, _ in instances), default=1)
        if longest > self.cache.size:
            raise InputError(
                f"cache_bytes: holds {self.cache.size} tokens, and an instance has {longest}; give it more"
            )
        waiting = []
        for chosen, T, B in batches([len(tokens) for tokens, _ in instances], max(1, self.cache.size // longest)):
            with self._lock:
                waiting.append((chosen, self._scored([instances[i] for i in chosen], T, B, options)))
        for chosen, scores in waiting:
            found[chosen] = np.asarray(scores)[: len(chosen)]
        return found

    def _scored(self, instances: Sequence[Prompt], T: int, B: int, options: Array) -> Array:
        params, digest = self._current
        parts = [keys_of(one, digest) for one in instances]
        held = [[self.cache.find(key) for key in keys] for keys, _ in parts]
        missing: dict[bytes, Prompt] = {}
        for one, (keys, starts), slots in zip(instances, parts, held, strict=True):
            ends = [*starts[1:], len(one[0])]
            for key, start, end, there in zip(keys, starts, ends, slots, strict=True):
                if there is None:
                    missing[key] = one[0][start:end], one[1][start:end]
        asked = sum(len(keys) for keys, _ in parts)
        self.uses = Uses(self.uses.asked + asked, self.uses.kept + sum(s is not None for some in held for s in some))
        try:
            self._read(params, missing)
            slots = [[self.cache.find(key) for key in keys] for keys, _ in parts]
            numbers = [part_numbers(np.array([len(some) for some in each])) for each in slots]
            request, lengths = np.ones((2, B), np.int32)
            request[: len(instances)] = [opens(tokens) for tokens, _ in instances]
            lengths[: len(instances)] = [len(tokens) for tokens, _ in instances]
            of = [np.concatenate(each) for each in slots]
            table = rectangle(of, B, T, self.cache.size, np.int32), rectangle(numbers, B, T, 0, np.int32)
            return _join(self._define, params, self._states, *table, request, lengths, options)
        except BaseException:  # the states may have been given to a program that failed
            self.cache.clear()
            self._states = None
            raise

    def _read(self, params: nnx.State, missing: dict[bytes, Prompt]) -> None:
        """Read parts through the first layers and keep them."""
        if self._states is None:
            self.cache.clear()
            self._states = jnp.zeros((self.cache.size, self.config.width), self.config.dtype)
        named = [(part, self.cache.claim(key, len(part[0]))) for key, part in missing.items()]
        for rows in packed(named, self.cache.size):
            states, self._states = self._states, None
            self._states = _read_parts(self._define, params, self.items, states, *rows)


def model_digest(params: Any, items: Catalogues) -> bytes:
    """What stands for everything that a part's states depend on beside its tokens: parameters and the items' facts."""
    told = digests(content((nnx.to_pure_dict(params), jax.tree.map(jnp.asarray, items))))
    return hashlib.blake2b("".join(f"{path} {told[path]}\n" for path in sorted(told)).encode(), digest_size=32).digest()


def keys_of(instance: Prompt, digest: bytes) -> tuple[list[bytes], list[int]]:
    """The key of each part of an instance under a model, and where it begins.

    blake2b, as texts are strangers': nobody shall write one that is taken for another's.
    """
    starts = part_starts(instance[0]).tolist()
    tokens, rows = (np.ascontiguousarray(x, np.int32).tobytes() for x in instance)
    begun = hashlib.blake2b(key=digest, digest_size=16)
    keys = []
    for start, end in zip(starts, [*starts[1:], len(instance[0])], strict=True):
        one = begun.copy()
        one.update(tokens[4 * start : 4 * end])
        one.update(rows[4 * start : 4 * end])
        keys.append(one.digest())
    return keys, starts


def packed(parts: Sequence[tuple[Prompt, np.ndarray]], nowhere: int) -> list[tuple[np.ndarray, ...]]:
    """Parts with their slots as rows to read, in arrays of few shapes `[R, W]`: tokens, item rows, positions, the range of
    keys that each token sees, and its slot (`nowhere`: padding)."""
    made: list[tuple[np.ndarray, ...]] = []
    order = sorted(range(len(parts)), key=lambda i: -len(parts[i][1]))
    at = 0
    while at < len(order):
        longest, total = len(parts[order[at]][1]), sum(len(parts[i][1]) for i in order[at:])
        W = bucket(min(max(longest, READ_WIDTH), total), 16)
        rows: list[list[int]] = []
        room = 0
        while at < len(order):
            n = len(parts[order[at]][1])
            if n > room:
                if len(rows) == READ_ROWS:
                    break
                rows.append([])
                room = W
            rows[-1].append(order[at])
            room -= n
            at += 1
        R = 1 << (len(rows) - 1).bit_length()
        arrays = [np.full((R, W), fill, np.int32) for fill in (0, -1, 0, 0, 0, nowhere)]
        for r, members in enumerate(rows):
            start = 0
            for i in members:
                (tokens, item_rows), slots = parts[i]
                at_, end = np.arange(len(slots)), start + len(slots)
                ends = start + at_ + 1 if tokens[0] == TARGET else end  # the request reads left to right
                for array, value in zip(arrays, (tokens, item_rows, at_, start, ends, slots), strict=True):
                    array[r, start:end] = value
                start = end
        made.append(tuple(arrays))
    return made


@partial(jax.jit, static_argnums=0, donate_argnames="states")
def _read_parts(define, params, items, states, tokens, item_rows, positions, k_start, k_end, slots):
    """The states `[size, D]` with those of packed parts in their slots."""
    model = nnx.merge(define, params)
    x = model.begin(tokens, item_rows, items)
    x = model.through(x, View(positions, k_start, k_end), 0, model.config.layers - model.config.late)
    return states.at[slots].set(x, mode="drop")


@partial(jax.jit, static_argnums=0)
def _join(define, params, states, slots, numbers, request, lengths, options):
    """Logits `[B, C]` after rows of kept parts. Behind a row's end are zeros: no mask stops a NaN."""
    model = nnx.merge(define, params)
    config = model.config
    x = states.at[slots].get(mode="fill", fill_value=0) + model.part[...].astype(states.dtype)[numbers]
    x = model.through(x, framed(slots.shape, request, lengths), config.layers - config.late, config.layers - 1)
    hidden = model.peek(x, lengths, config.layers - 1)
    return jnp.einsum("bd,cd->bc", hidden, options.astype(hidden.dtype), preferred_element_type=jnp.float32)
