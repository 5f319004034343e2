"""What every system of the benchmark is given, and how each is timed. NumPy alone, so that a peer can import it."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class System:
    """`ask(users [B])` gives catalogue rows and scores `[B, M]`, best first; `before` what is done untimed beforehand."""

    ask: Search
    before: Callable[[np.ndarray], None] | None = None


@dataclass(frozen=True)
class Work:
    """U users of a catalogue, and where the model lies that ranks for them.

    `folder` holds `llama/` and our parameters; `codes [C, L]` the spellings; `offsets`, `sizes [L]` where the ids of a
    level begin and how many there are; `histories [U, E]` catalogue rows; `prefixes [U, T]` their token ids.
    """

    folder: Path
    codes: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    histories: np.ndarray
    prefixes: np.ndarray

    ARRAYS = ("codes", "offsets", "sizes", "histories", "prefixes")

    def save(self) -> None:
        np.savez(self.folder / "work.npz", **{name: getattr(self, name) for name in self.ARRAYS})

    @classmethod
    def load(cls, folder: Path) -> Work:
        with np.load(folder / "work.npz", allow_pickle=False) as file:
            return cls(folder, **{name: file[name] for name in cls.ARRAYS})

    @cached_property
    def _spelled(self) -> dict[bytes, int]:
        return {code.tobytes(): row for row, code in enumerate(self.codes.astype(np.int32))}

    def rows(self, codes: np.ndarray) -> np.ndarray:
        """Catalogue rows `[...]` of codes `[..., L]`; -1 where they spell no item."""
        flat = np.ascontiguousarray(codes, np.int32).reshape(-1, codes.shape[-1])
        return np.array([self._spelled.get(c.tobytes(), -1) for c in flat], np.int32).reshape(codes.shape[:-1])


def children(codes: np.ndarray, codebook: int) -> np.ndarray:
    """The trie as a table int32 `[nodes, codebook]`: the node that a code leads to from a node, -1 = none; 0 the root."""
    tables: list[np.ndarray] = []
    node, count = np.zeros(len(codes), np.int64), 1
    for level in codes.T:
        edges, at = np.unique(node * codebook + level, return_inverse=True)
        tables.append(np.full((count, codebook), -1, np.int32))
        tables[-1].reshape(-1)[edges] = np.arange(len(edges))
        node, count = at, len(edges)
    starts = np.cumsum([len(table) for table in tables])
    shifted = [np.where(t >= 0, t + start, -1) for t, start in zip(tables, starts, strict=True)]
    return np.concatenate(shifted).astype(np.int32)


def peak_mb() -> float:
    """The most memory this process ever held resident, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent held when it started us
        kib = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]
        return int(kib) / 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << 20) if sys.platform == "darwin" else most / 1024


def measure(system: System, users: int, batch: int, warm: int, calls: int, seconds: float) -> dict[str, Any]:
    """Time a system: `warm` calls untimed, then `calls`, or fewer (but two) when they take more than `seconds`.

    Each call takes the next users. Gives `calls, users_per_s, p50_ms, p95_ms, peak_mb, valid_rate` (places of all lists
    that hold an item which the list did not hold before), and the lists of the first users. With no calls, only those.
    """
    taken: list[float] = []
    valid = places = 0

    def ask(call: int) -> tuple[np.ndarray, np.ndarray]:
        nonlocal valid, places
        chosen = np.arange(call * batch, (call + 1) * batch) % users
        if system.before is not None:
            system.before(chosen)
        start = time.perf_counter()
        rows, scores = system.ask(chosen)
        taken.append(time.perf_counter() - start)
        places += rows.size
        valid += sum(len(np.unique(row[row >= 0])) for row in rows)
        return rows, scores

    rows, scores = ask(0)
    for call in range(1, warm):
        ask(call)
    made: dict[str, Any] = {"rows": rows.tolist(), "scores": np.asarray(scores, np.float64).tolist()}
    taken.clear()
    for call in range(calls):
        if call >= 2 and sum(taken) > seconds:
            break
        ask(warm + call)
    if taken:
        p50, p95 = (1000 * float(x) for x in np.quantile(taken, (0.5, 0.95)))
        made |= {"calls": len(taken), "users_per_s": batch * len(taken) / sum(taken), "p50_ms": p50, "p95_ms": p95,
                 "peak_mb": peak_mb(), "valid_rate": valid / places}  # fmt: skip
    return made


def answer(systems: dict[str, Callable[[Work, dict[str, Any]], System]], argv: Sequence[str]) -> None:
    """The whole of a measuring process: read a job from argv[1], write what was measured to argv[2]."""
    job = json.loads(Path(argv[1]).read_text(encoding="utf-8"))
    work = Work.load(Path(job["work"]))
    system = systems[job["system"]](work, job)
    made = measure(system, len(work.prefixes), job["batch"], job["warm"], job["calls"], job["seconds"])
    Path(argv[2]).write_text(json.dumps(made), encoding="utf-8")
