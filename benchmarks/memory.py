"""What one new event costs the collaborative memory, at a catalogue of a million items.

    python -m benchmarks.memory [--items 1000000] [--pairs 20000000] [--events 2000]

Random transitions, so rows are of about equal length. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import scipy.sparse as sp

from benchmarks.record import write_results
from m6rec_jax.data.transitions import Matrix, Transitions
from m6rec_jax.recommend.memory import Memory

HISTORY = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=20_000_000, help="transitions counted before")
    parser.add_argument("--events", type=int, default=2000)
    options = parser.parse_args()

    rng, shape = np.random.default_rng(0), (options.items, options.items)
    pairs = (rng.integers(0, options.items, options.pairs), rng.integers(0, options.items, options.pairs))
    csr = sp.csr_array((np.ones(options.pairs, np.float32), pairs), shape)
    csr.sort_indices()
    forward = Matrix(csr.indptr.astype(np.int64), csr.indices.astype(np.int32), csr.data.astype(np.float32))
    nothing = Matrix(np.zeros(options.items + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    memory = Memory(Transitions(forward, nothing, degree=np.ones(options.items, np.int64), window=HISTORY))
    taken = np.zeros(options.events)
    for i in range(options.events):
        history, item = rng.integers(0, options.items, HISTORY), int(rng.integers(options.items))
        start = time.perf_counter()
        memory.observe(history, item)
        taken[i] = time.perf_counter() - start
    p50, p99 = (1000 * float(x) for x in np.quantile(taken, (0.5, 0.99)))
    row = {"items": options.items, "pairs": options.pairs, "events": options.events, "ms_p50": p50, "ms_p99": p99}
    print(f"{options.items:,} items, {options.pairs:,} pairs: an event in {p50:.3f} ms (p99 {p99:.3f} ms)")
    print(f"wrote {write_results('memory', [row])}")


if __name__ == "__main__":
    main()
