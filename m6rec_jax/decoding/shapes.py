"""Ragged requests as arrays of few shapes, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from m6rec_jax.vocab import BOS

BATCH_TOKENS = 16_384  # padded tokens read by one program
PAGE = 32  # tokens of a page of kept prefixes (`reuse`); every width is a multiple of it
LEAST_TOKENS = 64  # the shortest prefix that a program is compiled for

Prompt = tuple[np.ndarray, np.ndarray]  # tokens [T] and item rows [T] of one prefix, int32


def bucket(n: int, least: int, factor: int = 2) -> int:
    """The smallest of least, least x factor, ... that holds n; between powers of two, also the middle."""
    size = least
    while size < n:
        size *= factor
    return size * 3 // 4 if factor == 2 and size > least and n <= size * 3 // 4 else size


def prefix_width(tokens: int) -> int:
    """T of the program that reads a prefix of so many tokens: four widths between one power of two and the next.

    Past 128 tokens at most a fifth of a row is padding; each width more is a program more to compile.
    """
    tokens = int(tokens)  # NumPy's have no bit_length, here or in `full_batch`
    step = max(PAGE, (1 << (tokens - 1).bit_length()) // 8)
    return max(LEAST_TOKENS, -(-tokens // step) * step)


def full_batch(T: int, most: int = 1 << 30) -> int:
    """Rows that one device takes of the largest program over prefixes of T padded tokens: a power of two, at most `most`."""
    return 1 << (max(1, min(BATCH_TOKENS // T, most)).bit_length() - 1)


def rows_of(users: int, full: int, devices: int = 1) -> int:
    """B of the program for so many users: on each device a power of two, at most `full`."""
    return devices * min(full, 1 << (-(-users // devices) - 1).bit_length())


def batches(lengths: Sequence[int], most: int = 1 << 30, devices: int = 1) -> Iterator[tuple[np.ndarray, int, int]]:
    """(who, padded tokens T, padded rows B) of batches of similar length, longest first; each shape one of few.

    `most` rows are for each of the `devices` that share a batch.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        T = prefix_width(lengths[order[start]])
        full = full_batch(T, most)
        chosen = order[start : start + devices * full]
        yield chosen, T, rows_of(len(chosen), full, devices)
        start += devices * full


def pad(prompts: Sequence[Prompt], B: int, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-padded tokens and item rows `[B, T]`, and lengths `[B]`; spare rows hold <s> alone."""
    tokens = rectangle([t for t, _ in prompts], B, T, 0, np.int32)
    tokens[len(prompts) :, 0] = BOS
    lengths = np.ones(B, np.int32)
    lengths[: len(prompts)] = [len(t) for t, _ in prompts]
    return tokens, rectangle([r for _, r in prompts], B, T, -1, np.int32), lengths


def rectangle(parts: Sequence[np.ndarray], rows: int, width: int, fill: float, dtype: type) -> np.ndarray:
    """The parts as the first rows of an array `[rows, width]` of `fill`."""
    made = np.full((rows, width), fill, dtype)
    for i, part in enumerate(parts):
        made[i, : len(part)] = part
    return made
