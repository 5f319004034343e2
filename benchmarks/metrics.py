"""Seconds and memory of the measures: a million users, a million items, made-up lists with a long tail.

    python -m benchmarks.metrics [--users 1000000 --items 1000000 --k 10 --width 64 --draws 100] [--out FILE]

Writes benchmarks/results/metrics.json: a row a stage. `peak_mib` is the process's so far, so it only grows.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.record import write_results
from m6rec_jax.recommend import metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("users", 10**6), ("items", 10**6), ("k", 10), ("width", 64), ("draws", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    users, items, k = options.users, options.items, options.k
    rng, rows = np.random.default_rng(0), []

    def stage(name: str, work: Callable):
        start = time.perf_counter()
        made = work()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
        rows.append({"users": users, "items": items, "k": k, "stage": name, "seconds": round(seconds, 2), "peak_mib": round(peak)})  # fmt: skip
        print(f"{name:<32} {seconds:8.2f} s   {users / seconds:12,.0f} users/s   peak {peak:8,.0f} MiB", flush=True)
        return made

    def made_up() -> tuple[np.ndarray, np.ndarray, metrics.Facts]:
        lists = (items * rng.random((users, k), np.float32) ** 3).astype(np.int32)  # the low rows are shown most
        content = rng.standard_normal((items, options.width), np.float32)
        had = (users / 100 / (1 + np.arange(items)) ** 0.7).astype(np.int64)
        recent = rng.random(items) < 0.1
        return lists, lists[np.arange(users), rng.integers(0, k, users)], metrics.Facts(had, users, content=content, recent=recent)  # fmt: skip

    lists, targets, facts = stage("made up", made_up)
    vectors = stage("accuracy, k = 1, 5, 10", lambda: metrics.per_user(lists, targets, (1, 5, 10)))
    stage("tables to the device", lambda: facts.tables)
    vectors |= stage("novelty, diversity, ... a user", lambda: metrics.beyond_per_user(lists, facts, k, targets))
    stage("coverage and Gini", lambda: metrics.beyond(lists, facts, k))
    some = {name: vectors[name] for name in ("ndcg@10", "recall@10")}
    stage(f"two intervals, {options.draws} draws", lambda: metrics.bootstrap_ci(some, draws=options.draws))
    stage(f"randomisation, {options.draws} draws", lambda: metrics.paired_randomisation(vectors["ndcg@10"], vectors["mrr@10"], draws=options.draws))  # fmt: skip
    print(write_results("metrics", rows, options.out))


if __name__ == "__main__":
    main()
