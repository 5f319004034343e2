"""How a history becomes tokens: the one place that lays events out (training, decoding and serving call it)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from m6rec_jax.vocab import KIND_0, PAD, Vocab, gap_tokens

_NO_QUERIES: Mapping[int, np.ndarray] = {}


def spell_history(
    vocab: Vocab,
    codes: np.ndarray,
    items: np.ndarray,
    times: np.ndarray | None = None,
    kinds: np.ndarray | None = None,
    timed: bool = False,
    n_kinds: int = 0,
    queries: Mapping[int, np.ndarray] = _NO_QUERIES,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of one history of n events: `(tokens [t], item_rows [t], event_index [t])`, all int32.

    An event is [gap token: after a pause of an hour or more, never before the first event] [kind token, where the
    data set has more than one kind] then the item's code tokens, level 1 first, or the tokens of its query.
    `item_rows` is the catalogue row at the token that completes a spelling and -1 elsewhere.
    """
    items = np.asarray(items, np.int64)
    n, levels = len(items), codes.shape[1]
    gaps = np.full(n, PAD, np.int32)
    if timed and times is not None and n > 1:
        gaps[1:] = gap_tokens(np.diff(np.asarray(times, np.int64)))
    has_gap = gaps != PAD
    with_kind = n_kinds > 1 and kinds is not None
    body = np.full(n, levels, np.int64)
    for event, tokens in queries.items():
        body[event] = len(tokens)
    lengths = has_gap + int(with_kind) + body
    ends = np.cumsum(lengths)
    starts = ends - lengths
    total = int(ends[-1]) if n else 0

    tokens = np.empty(total, np.int32)
    item_rows = np.full(total, -1, np.int32)
    event_index = np.repeat(np.arange(n, dtype=np.int32), lengths)
    tokens[starts[has_gap]] = gaps[has_gap]
    if with_kind:
        tokens[starts + has_gap] = KIND_0 + np.asarray(kinds, np.int32)
    if queries:
        is_item = np.ones(n, bool)
        is_item[list(queries)] = False
        for event, query in queries.items():
            tokens[ends[event] - len(query) : ends[event]] = query
        ends, items = ends[is_item], items[is_item]
    tokens[(ends - levels)[:, None] + np.arange(levels)] = vocab.spell(codes[items])
    item_rows[ends - 1] = items
    return tokens, item_rows, event_index


def history_lengths(
    levels: int,
    users: np.ndarray,
    times: np.ndarray,
    timed: bool,
    n_kinds: int,
    query_lengths: np.ndarray,
) -> np.ndarray:
    """Tokens that each event adds to its history `[n]`, as `spell_history` lays them out, for all users at once.

    `users` [n] is non-decreasing; `query_lengths` [n] is -1 for an event with an item.
    """
    lengths = np.where(query_lengths >= 0, query_lengths, levels).astype(np.int64) + int(n_kinds > 1)
    if timed and len(users) > 1:
        lengths[1:] += (gap_tokens(np.diff(times)) != PAD) & (users[1:] == users[:-1])
    return lengths
