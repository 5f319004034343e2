"""What a compiled program sends between devices, read from its text."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
WORK = ("fusion", "dot", "convolution", "custom-call", "while")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z\-]+)\(%?([\w.\-]*)")
_CALLS = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
FUSED = "async_collective_fusion"  # what TPU calls a computation with work and a part of a collective in it
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


class Sent(NamedTuple):
    """A collective of one step: `count` runs of `size` bytes that each device sends, among `group` devices.

    `together`: the group is of neighbours in the order of devices, not of every n-th.
    """

    kind: str
    count: int
    size: float
    group: int
    overlapped: bool
    together: bool = True


def collectives(text: str, devices: int) -> list[Sent]:
    """Every collective of a compiled program's text, as often as its loops run it.

    Bytes are those a device sends by ring: (n-1)/n of the whole array to gather or scatter, twice that to reduce. One is
    overlapped only where the text shows work beside it: between its start and its done, or, as TPU has it, in a fusion
    that carries on a collective which another began (they share a channel). A loop whose length is unknown counts once,
    and of branches all count.
    """
    bodies, entry = _computations(text)
    found: list[Sent] = []
    carried: dict[
        tuple[str, int], int
    ] = {}  # (channel, times) of a collective in several fusions to its place in `found`

    def walk(name: str, times: int, seen: tuple[str, ...]) -> None:
        if name in seen:
            return
        lines = bodies.get(name, [])
        for at, line in enumerate(lines):
            told = _INSTRUCTION.match(line)
            if told is None:
                continue
            ours, shape, operation, _ = told.groups()
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                one = _sent(kind, shape, line, times, devices, _works_meanwhile(lines, at, ours))
                channel = _CHANNEL.search(line)
                fused = name.startswith(FUSED) or any("AsyncCollective" in other for other in lines)
                if not fused or channel is None:
                    found.append(one)
                elif (channel[1], times) not in carried:
                    carried[channel[1], times] = len(found)
                    found.append(one._replace(overlapped=name.startswith(FUSED)))
                elif name.startswith(FUSED):
                    there = carried[channel[1], times]
                    found[there] = found[there]._replace(overlapped=True)
                continue
            trips = _trips(line, bodies) if operation == "while" else 1
            branches = _BRANCHES.search(line)
            called = _CALLS.findall(line) + ([one.strip().lstrip("%") for one in branches[1].split(",")] if branches else [])  # fmt: skip
            for one in called:
                walk(one, times * trips, (*seen, name))

    walk(entry, 1, ())
    return found


def by_kind(sent: list[Sent]) -> dict[tuple[str, bool], tuple[int, float]]:
    """(kind, overlapped) to how often it runs in a step, and the bytes that a device sends by it."""
    sums: dict[tuple[str, bool], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for one in sent:
        count, size = sums[one.kind, one.overlapped]
        sums[one.kind, one.overlapped] = (count + one.count, size + one.count * one.size)
    return dict(sorted(sums.items()))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if (opened := _COMPUTATION.match(line)) is not None:
            lines = bodies.setdefault(opened[2], [])
            entry = opened[2] if opened[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return bodies, entry


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: as the line says, or the only number that its condition compares with."""
    if (known := _TRIPS.search(line)) is not None:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    limits = {int(n) for n in _LIMIT.findall("\n".join(bodies.get(condition[1], [])))} if condition else set()
    return max(limits.pop(), 1) if len(limits) == 1 else 1


def _works_meanwhile(lines: list[str], at: int, start: str) -> bool:
    """Whether something is computed between a start and its done."""
    if "-start(" not in lines[at]:
        return False
    for line in lines[at + 1 :]:
        told = _INSTRUCTION.match(line)
        if told is None:
            continue
        if told[3].endswith("-done") and re.search(rf"%?{re.escape(start)}\b", line.split("-done(", 1)[1]):
            return False
        if told[3] in WORK:
            return True
    return False


def _sent(kind: str, shape: str, line: str, times: int, devices: int, overlapped: bool) -> Sent:
    arrays = [_bytes(*one) for one in _SHAPE.findall(shape)]
    whole = sum(arrays)
    if "-start(" in line and kind in ("all-gather", "collective-permute", "reduce-scatter") and len(arrays) > 1:
        whole = max(arrays) if kind == "all-gather" else min(a for a in arrays if a)  # (operand, result, contexts)
        if kind == "collective-permute":
            whole = arrays[0]
    n = _group(line, devices)
    ring = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1.0}.get(kind, (n - 1) / n)
    return Sent(kind, times, whole * ring, n, overlapped, _together(line))


def _bytes(kind: str, sizes: str) -> float:
    bits = BITS.get(kind, 8 if kind.startswith("f8") else 0)
    count = 1
    for size in filter(None, sizes.split(",")):
        count *= int(size)
    return bits / 8 * count


def _group(line: str, devices: int) -> int:
    """Devices in one group of a collective."""
    if (axes := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)) is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
    if (iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line)) is not None:
        return int(iota[2])
    if (first := re.search(r"replica_groups=\{\{([\d,]+)\}", line)) is not None:
        return first[1].count(",") + 1
    return devices


def _together(line: str) -> bool:
    """Whether groups are of neighbours: the last axes of the mesh, or device numbers that follow each other."""
    if (axes := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)) is not None:
        wide = [name for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1]) if int(size) > 1]
        named = [name for name in re.findall(r"'(\w+)'", axes[2]) if name in wide]
        return wide[len(wide) - len(named) :] == named
    if (iota := re.search(r"replica_groups=\[\d+,\d+\]<=\[[\d,]+\](T\()?", line)) is not None:
        return iota[1] is None
    if (first := re.search(r"replica_groups=\{\{([\d,]+)\}", line)) is not None:
        ids = [int(n) for n in first[1].split(",")]
        return ids == list(range(ids[0], ids[0] + len(ids)))
    return True
