"""How fast `prepare` is: 100,000 users, a million events, 50,000 titled items, on this machine.

Each row is prepared in a process of its own, so that its peak memory is its own too.

    python -m benchmarks.prepare [--users 100000 --events 1000000 --items 50000 --levels 1] [--out FILE]

Writes benchmarks/results/prepare.json: seconds a stage, events a second with and without tokenizer training, peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl

from benchmarks.record import write_results
from m6rec_jax.data.prepare import prepare

T = TypeVar("T")
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "el", "or")]


def make_tables(folder: Path, users: int, events: int, items: int, seed: int = 0) -> Path:
    """A synthetic shop with a long tail of items, as csv and jsonl; returns its card."""
    rng = np.random.default_rng(seed)
    words = np.array(sorted({"".join(rng.choice(SYLLABLES, rng.integers(1, 4))) for _ in range(20_000)}))
    shares = 1 / np.arange(1, len(words) + 1)
    picked = rng.choice(len(words), (items, 8), p=shares / shares.sum())
    popularity = 1 / (10 + rng.permutation(items)) ** 0.8
    lengths = np.maximum(rng.multinomial(events - 3 * users, rng.dirichlet(np.ones(users))) + 3, 3)
    user = np.repeat(np.arange(users), lengths)[:events]
    shuffled = rng.permutation(len(user))
    table = pl.DataFrame(
        {
            "user": user[shuffled],
            "item": rng.choice(items, len(user), p=popularity / popularity.sum()),
            "time": 1_500_000_000 + rng.integers(0, 200_000_000, len(user)),
        }
    )
    table.write_csv(folder / "events.csv")
    with open(folder / "items.jsonl", "w", encoding="utf-8") as file:
        for row in range(items):
            title = " ".join(words[picked[row]])
            brand, group = words[picked[row][0] % 500], words[picked[row][1] % 40]
            file.write(
                json.dumps({"id": row, "title": title, "brand": brand, "group": ["all", group], "price": row % 997})
                + "\n"
            )
    card = folder / "card.yaml"
    card.write_text(
        "name: synthetic\n"
        "events: {path: events.csv, user: user, item: item, time: time}\n"
        "items: {path: items.jsonl, id: id, title: title, categories: group, attributes: [brand], numbers: [price]}\n"
        "split: leave-one-out\n"
    )
    return card


def measure(card: Path, out: Path, levels: int) -> dict[str, Any]:
    """One row: `prepare` timed in this process, which has done nothing else."""
    start, start_cpu = time.perf_counter(), time.process_time()
    data = prepare(card, out, levels=levels)
    whole, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    stages, events = data.manifest["seconds"], data.manifest["sizes"]["events"]
    return {
        "levels": levels,
        "users": data.users.height,
        "items": data.catalogue,
        "events": events,
        "seconds": round(whole, 2),
        "cpu_seconds": round(cpu, 2),
        "load_average": round(os.getloadavg()[0], 1),
        "events_per_second": round(events / whole),
        "events_per_second_without_tokenizer": round(events / (whole - stages["tokenizer"])),
        "seconds_by_stage": stages,
        "peak_memory_mb": peak_memory_mb(),
    }


def peak_memory_mb() -> int:
    """The most that this process has held. VmHWM starts anew with a program, ru_maxrss keeps that of its parent."""
    status = Path("/proc/self/status")
    if status.is_file():
        return round(int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024)  # type: ignore[index]
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def in_child(function: Callable[..., T], *given: Any) -> T:
    """`function(*given)` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/prepare.json")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        card = make_tables(folder, asked.users, asked.events, asked.items)
        for levels in asked.levels:
            rows.append(in_child(measure, card, folder / f"dataset-{levels}", levels))
            print(json.dumps(rows[-1]))
    print(write_results("prepare", rows, asked.out))


if __name__ == "__main__":
    main()
