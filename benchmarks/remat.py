"""What each remat policy costs and saves: the train step of `benchmarks.training`'s decoder, compiled and run.

    python -m benchmarks.remat [--dtypes float32] [--steps 3]

Rows (benchmarks/results/remat.json), one for each dtype and value of `model.remat`: `temporary_mib` (what the compiled step needs
beside its arguments and results), `processor_seconds` (of the process, both cores) and `seconds` a step, the least of some,
policies turn about. XLA's count of operations is not in it: of a loop over layers, which `full` has, it counts one layer.
Rows of dtypes that are not asked for stay as they are.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any, NamedTuple, get_args

from m6rec_jax.allocator import keep_freed_memory

keep_freed_memory()  # as `m6rec train` does, before numpy starts threads

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.record import commit, kept_rows, write_results  # noqa: E402
from benchmarks.training.ours import packed  # noqa: E402
from benchmarks.training.setting import LENGTH, MODEL, OPTIM, PIECES, ROWS, SEED, token_batches  # noqa: E402
from m6rec_jax.config import ModelConfig  # noqa: E402
from m6rec_jax.config.model import DType, Remat  # noqa: E402
from m6rec_jax.model.items import item_table  # noqa: E402
from m6rec_jax.model.load import Blueprint  # noqa: E402
from m6rec_jax.training.optim import make_optimizer  # noqa: E402
from m6rec_jax.training.state import init_state  # noqa: E402
from m6rec_jax.training.step import make_train_step  # noqa: E402
from m6rec_jax.vocab import SPECIALS, Vocab  # noqa: E402


class Setting(NamedTuple):
    """What is trained: a decoder over so many text pieces, on a batch of `rows` of `length` tokens."""

    model: ModelConfig = MODEL
    pieces: int = PIECES
    rows: int = ROWS
    length: int = LENGTH


SMALLEST = Setting(replace(MODEL, layers=3, width=64, heads=2, ffn=256), 512, 4, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=get_args(DType), default=list(get_args(DType)))
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    rows = [row | {"commit": commit()} for dtype in options.dtypes for row in of_dtype(dtype, options.steps)]
    for row in rows:
        print("{dtype:9} {remat:5} {temporary_mib:6.0f} MiB {processor_seconds:6.3f} processor s {seconds:6.3f} s".format(**row))  # fmt: skip
    print(f"wrote {write_results('remat', [*kept_rows('remat', rows, ('dtype', 'remat')), *rows])}")


def of_dtype(dtype: DType, steps: int, setting: Setting = Setting()) -> list[dict[str, Any]]:  # noqa: B008
    """A row a policy."""
    ids = token_batches()[0][: setting.rows, : setting.length + 1]
    batch = jax.device_put(packed(np.maximum(ids % setting.pieces, len(SPECIALS)).astype(np.int32)))
    items = jax.device_put(item_table(np.zeros((128, 1), np.float32), np.ones(128, bool)))
    optimizer = make_optimizer(OPTIM, 10**6)

    def decoder(remat: Remat) -> Blueprint:
        return Blueprint(replace(setting.model, dtype=dtype, remat=remat), Vocab(setting.pieces, (128,)), 1)

    state = init_state(decoder("none"), optimizer, SEED)
    made, rows, taken = {}, {}, {}
    for remat in get_args(Remat):
        made[remat] = make_train_step(decoder(remat), optimizer, 1, SEED).lower(state, batch, items).compile()
        temporary = made[remat].memory_analysis().temp_size_in_bytes / 2**20
        rows[remat] = {"dtype": dtype, "remat": remat, "temporary_mib": temporary, "steps": steps}
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
