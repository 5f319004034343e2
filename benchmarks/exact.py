"""How many users' lists are proven to be the best there are, by how many beams: a run with several code levels.

    python -m benchmarks.exact --run RUN [--dataset DATASET] [--split valid] [--beams 10 20 50 100] [--users 4096]

Of as many users of the split, drawn once, lists of ten are asked for with each number of beams, by the model with its
memory and by the model alone. A list is proven when its last item scores no less than anything that was pruned
(`decoding.beam`). Writes benchmarks/results/exact.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from benchmarks.record import write_results
from m6rec_jax.recommend.gating import with_gate
from m6rec_jax.recommend.histories import held_out
from m6rec_jax.recommend.opening import dataset_of
from m6rec_jax.recommend.recommender import Recommender


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--split", choices=["valid", "test"], default="valid")
    parser.add_argument("--beams", type=int, nargs="+", default=[10, 20, 50, 100])
    parser.add_argument("--users", type=int, default=4096, help="at most so many")
    options = parser.parse_args()

    data = dataset_of(options.run, options.dataset)
    recommender = with_gate(Recommender.load(options.run, dataset=data), options.run, data)
    asked = held_out(data, options.split)
    drawn = np.random.default_rng(0).permutation(len(asked))[: options.users]
    asked = asked.take(np.sort(drawn))
    rows = []
    for memory in (True, False):
        for beams in options.beams:
            start = time.perf_counter()
            lists = recommender.recommend_rows(
                asked.items, asked.times, 10, kinds=asked.kinds, queries=asked.queries, memory=memory, beams=beams
            )
            seconds = time.perf_counter() - start
            rows.append({
                "dataset": data.manifest["name"], "split": options.split, "system": "with memory" if memory else "alone",
                "levels": data.codes.shape[1], "beams": beams, "users": len(asked), "exact": float(lists.exact.mean()),
                "seconds": round(seconds, 1),
            })  # fmt: skip
            print("{system}, {beams} beams: {exact:.2%} of {users:,} users proven, {seconds} s".format(**rows[-1]))
    print(f"wrote {write_results('exact', rows)}")


if __name__ == "__main__":
    main()
