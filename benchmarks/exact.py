"""How many users' lists are proven to be the best there are, by how many beams.

    python -m benchmarks.exact --run RUN [RUN ...] [--split valid] [--beams 10 20 50 100] [--users 4096]

Of as many users of the split, drawn once, lists of ten are asked for with each number of beams, by the model with its
memory and by the model alone. A list is proven when its last item scores no less than anything that was pruned
(`decoding.beam`). Writes benchmarks/results/exact.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import write_results
from m6rec_jax.recommend.gating import with_gate
from m6rec_jax.recommend.histories import held_out
from m6rec_jax.recommend.opening import dataset_of
from m6rec_jax.recommend.recommender import Recommender


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", required=True)
    parser.add_argument("--split", choices=["valid", "test"], default="valid")
    parser.add_argument("--beams", type=int, nargs="+", default=[10, 20, 50, 100])
    parser.add_argument("--users", type=int, default=4096, help="at most so many")
    options = parser.parse_args()

    rows = [row for run in options.run for row in measured(run, options)]
    print(f"wrote {write_results('exact', rows)}")


def measured(run: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row a number of beams, with memory and without."""
    data = dataset_of(run, None)
    recommender = with_gate(Recommender.load(run, dataset=data), run, data)
    asked = held_out(data, options.split)
    asked = asked.take(np.sort(np.random.default_rng(0).permutation(len(asked))[: options.users]))
    for memory, beams in product((True, False), options.beams):
        start = time.perf_counter()
        lists = recommender.recommend_rows(
            asked.items, asked.times, 10, kinds=asked.kinds, queries=asked.queries, memory=memory, beams=beams
        )
        seconds, levels = time.perf_counter() - start, data.codes.shape[1]
        row = {
            "dataset": data.manifest["name"], "split": options.split, "system": "with memory" if memory else "alone",
            "levels": levels, "beams": beams, "users": len(asked), "exact": float(lists.exact.mean()),
            "seconds": round(seconds, 1),
        }  # fmt: skip
        print(
            "{dataset}, levels {levels}, {system}, {beams} beams: {exact:.2%} of {users:,} users proven".format(**row)
        )
        yield row


if __name__ == "__main__":
    main()
