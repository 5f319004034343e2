"""What each remat policy costs and saves: the train step of `benchmarks.training`'s decoder, compiled and run.

    python -m benchmarks.remat [--steps 5]

Rows (benchmarks/results/remat.json), one for each dtype and value of `model.remat`: `temporary_mib` (what the compiled step needs
beside its arguments and results), `gflop` and `gbytes` (XLA's cost analysis: what is computed again counts again),
`processor_seconds` (of the process, both cores) and `seconds` a step, the least of some, policies turn about.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, get_args

from m6rec_jax.allocator import keep_freed_memory

keep_freed_memory()  # as `m6rec train` does, before numpy starts threads

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.record import write_results  # noqa: E402
from benchmarks.training.ours import packed  # noqa: E402
from benchmarks.training.setting import OPTIM, SEED, blueprint, token_batches  # noqa: E402
from m6rec_jax.config.model import DType, Remat  # noqa: E402
from m6rec_jax.model.items import item_table  # noqa: E402
from m6rec_jax.training.optim import make_optimizer  # noqa: E402
from m6rec_jax.training.state import init_state  # noqa: E402
from m6rec_jax.training.step import make_train_step  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    rows = [row for dtype in get_args(DType) for row in of_dtype(dtype, options.steps)]
    for row in rows:
        print("{dtype:9} {remat:5} {temporary_mib:6.0f} MiB {gflop:6.1f} GFLOP {gbytes:6.1f} GB {processor_seconds:6.3f} processor s {seconds:6.3f} s".format(**row))  # fmt: skip
    print(f"wrote {write_results('remat', rows)}")


def of_dtype(dtype: DType, steps: int) -> list[dict[str, Any]]:
    """A row a policy."""
    batch = jax.device_put(packed(token_batches()[0]))
    items = jax.device_put(item_table(np.zeros((128, 1), np.float32), np.ones(128, bool)))
    optimizer = make_optimizer(OPTIM, 10**6)
    state = init_state(blueprint(dtype), optimizer, SEED)
    made, rows, taken = {}, {}, {}
    for remat in get_args(Remat):
        made[remat] = make_train_step(blueprint(dtype, remat), optimizer, 1, SEED).lower(state, batch, items).compile()
        cost = made[remat].cost_analysis()
        rows[remat] = {
            "dtype": dtype, "remat": remat, "temporary_mib": made[remat].memory_analysis().temp_size_in_bytes / 2**20,
            "gflop": cost["flops"] / 1e9, "gbytes": cost["bytes accessed"] / 1e9, "steps": steps,
        }  # fmt: skip
        taken[remat] = []
        jax.block_until_ready(made[remat](state, batch, items))
    for _ in range(steps):
        for remat, step in made.items():
            begun, used = time.perf_counter(), time.process_time()
            jax.block_until_ready(step(state, batch, items))
            taken[remat].append((time.process_time() - used, time.perf_counter() - begun))
    for remat, row in rows.items():
        processor, wall = zip(*taken[remat], strict=True)
        row |= {"processor_seconds": min(processor), "seconds": min(wall)}
    return list(rows.values())


if __name__ == "__main__":
    main()
