"""Packing: several examples in one row, and the arrays that say who sees whom."""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np

from m6rec_jax.data.examples import Sequence

ROW_ARRAYS = {
    "tokens": np.int32,
    "targets": np.int32,
    "positions": np.int32,
    "segment_ids": np.int32,
    "order": np.int32,
    "loss_weights": np.float32,
    "task_ids": np.int32,
    "item_rows": np.int32,
    "k_start": np.int32,
    "k_end": np.int32,
}


def pack_lengths(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Indices of `lengths` grouped into rows of at most `room` tokens: best fit, longest first.

    Every index lands in exactly one row. Raises ValueError for a length outside 1..room.
    """
    if len(lengths) and (lengths.min() < 1 or lengths.max() > room):
        raise ValueError(f"lengths {lengths.min()}..{lengths.max()} do not fit rows of {room}")
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(room + 1)]  # rows by the space left in them
    spaces = np.zeros(room + 2, bool)  # which of those lists hold a row
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        space = length + int(np.argmax(spaces[length:])) if spaces[length:].any() else -1
        if space < 0:
            row, space = len(rows), room
            rows.append([])
        else:
            row = with_space[space].pop()
            spaces[space] = bool(with_space[space])
        rows[row].append(index)
        if left := space - length:
            with_space[left].append(row)
            spaces[left] = True
    return rows


def pack_row(sequences: Many[tuple[Sequence, int]], length: int) -> dict[str, np.ndarray]:
    """One row `[length]` of every array in `ROW_ARRAYS` from (sequence, task number) pairs, in order.

    Segments count from 1; 0 is padding, which sees nothing and is seen by nothing.
    """
    row = {name: np.zeros(length, dtype) for name, dtype in ROW_ARRAYS.items()}
    row["item_rows"][:] = -1
    at = segment = 0
    for sequence, task in sequences:
        n = len(sequence.tokens)
        if at + n > length:
            raise ValueError(f"a segment of {n} tokens does not fit: {at} of {length} are taken")
        here = slice(at, at + n)
        row["tokens"][here] = sequence.tokens
        row["targets"][here] = sequence.targets
        row["order"][here] = sequence.order
        row["loss_weights"][here] = sequence.weights
        row["task_ids"][here] = task
        row["item_rows"][here] = sequence.item_rows
        for part in sequence.segments:
            segment, start, order = segment + 1, at + part.start, sequence.order[part]
            here = slice(start, at + part.stop)
            row["positions"][here] = np.arange(len(order))
            row["segment_ids"][here] = segment
            row["k_start"][here] = start
            row["k_end"][here] = start + np.searchsorted(order, order, side="right")
        at += n
    return row
