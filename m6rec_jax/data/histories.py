"""Histories of users as the records of each split, and what the index of a dataset says of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from m6rec_jax.data.events import Events
from m6rec_jax.data.history import history_lengths
from m6rec_jax.data.records import HISTORY, Record, encode_histories
from m6rec_jax.data.splits import SPLITS, TRAIN, records_of
from m6rec_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Histories:
    """The r records of one split: their bytes, tokens [r], events [r]; `targets` counts what they ask for."""

    encoded: Iterator[bytes]
    tokens: np.ndarray
    events: np.ndarray
    targets: int


def histories(events: Events, label: np.ndarray, tokenizer: Tokenizer, levels: int, timed: bool,
              first_user: int = 0) -> Iterator[tuple[str, Histories]]:  # fmt: skip
    """The histories of each split by user row, the first of which is `first_user`."""
    is_target, n_kinds = events.is_target, len(events.kind_names)
    queries = np.flatnonzero(events.items < 0)
    coded = dict(zip(queries.tolist(), tokenizer.encode_batch(events.texts[queries].to_list()), strict=True))
    query_lengths = np.full(len(events.items), -1, np.int64)
    query_lengths[queries] = [len(coded[i]) for i in queries.tolist()]
    for number, split in enumerate(SPLITS):
        held = records_of(label, events.users, is_target, number)
        at, starts, n = held.events, held.starts, np.diff(held.starts)
        users = events.users[at]
        tokens = history_lengths(levels, users, events.times[at], timed, n_kinds, query_lengths[at])
        asked = {i: np.array(coded[int(at[i])], np.int32) for i in np.flatnonzero(events.items[at] < 0).tolist()}
        encoded = encode_histories(users[starts[:-1]] + first_user, starts, events.items[at], events.times[at],
                                   events.kinds[at], held.targets, asked)  # fmt: skip
        n_tokens = np.add.reduceat(tokens, starts[:-1]) if len(n) else n
        yield split, Histories(encoded, n_tokens, n, int(held.targets.sum()))


def add_index(index: dict[str, np.ndarray], sizes: dict[str, int], split: str, held: Histories,
              others: list[Record]) -> None:  # fmt: skip
    """What index.npz and the manifest say of the records of a split."""
    n = held.events
    index[f"{split}_kind"] = np.array([HISTORY] * len(n) + [r.kind for r in others], np.uint8)
    index[f"{split}_tokens"] = np.concatenate([held.tokens, [len(r.tokens) for r in others]]).astype(np.int32)
    index[f"{split}_events"] = np.concatenate([n, np.zeros(len(others))]).astype(np.int32)
    sizes[f"{split}_histories"], sizes[f"{split}_records"] = len(n), len(n) + len(others)
    if split != SPLITS[TRAIN]:
        sizes[f"{split}_targets"] = held.targets
