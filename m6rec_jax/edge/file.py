"""Writing the one file: int8 weights with a scale a channel, zeros as a bit each, the tokenizer, a digest over all.

magic, 8 bytes | SHA-256 of all that follows | length of the header, 8 bytes | header, JSON | parts, deflated
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from m6rec_jax.edge.runner import LENGTH, MAGIC, SCHEMA


class Tensor(NamedTuple):
    """Float32 numbers, and the axes over which those that share a scale lie; None: kept as they are."""

    value: np.ndarray
    summed: tuple[int, ...] | None = None


def pack(described: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: bytes) -> bytes:
    """The bytes of a file. `described`: what the header says beside its tensors (`runner.load` names what it needs).

    A tensor with scales becomes int8, the largest number of a channel 127 scales; zeros stay zeros. It is stored whole,
    or as a bit a number and the numbers that are not zero, whichever is shorter.
    """
    blob, listed, numbers, nonzero = bytearray(), {}, 0, 0

    def put(x: bytes) -> list[int]:
        begin, part = len(blob), zlib.compress(x, 9)
        blob.extend(part)
        return [begin, len(part)]

    for name, (value, summed) in tensors.items():
        value = np.asarray(value, np.float32)
        said: dict[str, Any] = {"shape": list(value.shape)}
        if summed is None:
            said |= {"float32": put(value.tobytes())}
        else:
            q, scale = quantised(value, summed)
            said |= {"summed": list(summed), "scale": put(scale.astype("<f4").tobytes())}
            bits, found = np.packbits(q.ravel() != 0).tobytes(), q[q != 0].tobytes()
            if len(zlib.compress(bits, 9)) + len(zlib.compress(found, 9)) < len(zlib.compress(q.tobytes(), 9)):
                said |= {"bits": put(bits), "nonzero": put(found)}
            else:
                said |= {"int8": put(q.tobytes())}
            value = q
        listed[name], numbers, nonzero = said, numbers + value.size, nonzero + int(np.count_nonzero(value))
    header = {
        "schema": SCHEMA, **described, "numbers": numbers, "nonzero": nonzero, "tensors": listed,
        "tokenizer": put(tokenizer),
    }  # fmt: skip
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    body = len(text).to_bytes(LENGTH, "little") + text + blob
    return MAGIC + hashlib.sha256(body).digest() + body


def quantised(x: np.ndarray, summed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """int8 and float32 scales (axes `summed` of size 1); no number moves by more than half a scale."""
    most = np.abs(x).max(axis=summed, keepdims=True)
    scale = np.where(most > 0, most / 127, 1).astype(np.float32)
    return np.clip(np.rint(x / scale), -127, 127).astype(np.int8), scale
