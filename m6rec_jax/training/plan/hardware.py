"""What vendors publish of their chips."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """Of one chip: bfloat16 FLOP/s at most (dense) and bytes of memory.

    Sources: Google Cloud's TPU pages "System architecture" (v4, v5e, v5p, v6e, TPU7x), NVIDIA's data sheets of A100, H100 SXM and
    H200 SXM (dense figures).
    """

    peak: float
    memory: float


CHIPS = {
    "v4": Chip(275e12, 32 * 2**30),
    "v5e": Chip(197e12, 16 * 2**30),
    "v5p": Chip(459e12, 95 * 2**30),
    "v6e": Chip(918e12, 32 * 2**30),
    "tpu7x": Chip(2307e12, 192 * 2**30),
    "a100": Chip(312e12, 80e9),
    "a100-40": Chip(312e12, 40e9),
    "h100": Chip(989.4e12, 80e9),
    "h200": Chip(989.4e12, 141e9),
}


def chip_of(topology: str) -> Chip:
    """The chip in a topology's name."""
    return CHIPS[topology.split(":")[1]]
