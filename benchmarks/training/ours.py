"""The project's own training step: python -m benchmarks.training.ours JOB"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from m6rec_jax.allocator import keep_freed_memory

keep_freed_memory()  # as `m6rec train` does, before numpy starts threads

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.training.answers import fastest, serve  # noqa: E402
from benchmarks.training.setting import OPTIM, SEED, blueprint  # noqa: E402
from m6rec_jax.model.items import item_table  # noqa: E402
from m6rec_jax.training.optim import make_optimizer  # noqa: E402
from m6rec_jax.training.state import init_state  # noqa: E402
from m6rec_jax.training.step import make_eval_step, make_train_step  # noqa: E402


def packed(ids: np.ndarray) -> dict[str, np.ndarray]:
    """Ids `[B, T + 1]` as a batch `[1, B, T]` of one causal example a row, all of it learnt from."""
    tokens = ids[:, :-1]
    at = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    none = np.zeros_like(tokens)
    batch = {
        "tokens": tokens, "targets": ids[:, 1:], "item_rows": none - 1, "positions": at, "k_start": none,
        "k_end": at + 1, "task_ids": none, "segment_ids": none + 1, "loss_weights": np.ones(tokens.shape, np.float32),
    }  # fmt: skip
    return {name: np.ascontiguousarray(x)[None] for name, x in batch.items()}


def main() -> None:
    job = json.loads(sys.argv[1])
    model = blueprint(job["dtype"], job["remat"])
    batches = [jax.device_put(packed(ids)) for ids in np.load(Path(job["work"]) / "batches.npy")]
    items = jax.device_put(item_table(np.zeros((128, 1), np.float32), np.ones(128, bool)))
    optimizer = make_optimizer(OPTIM, 10**6)
    held = [init_state(model, optimizer, SEED)]
    train = make_train_step(model, optimizer, 1, SEED).lower(held[0], batches[0], items).compile()

    def step(number: int) -> None:
        held[0], measured = train(held[0], batches[number % len(batches)], items)
        jax.block_until_ready((held[0], measured))

    def start() -> dict[str, float]:
        losses = make_eval_step(model, 1)(held[0].params, batches[0], items)
        used = train.memory_analysis()
        return {
            "loss": float(losses.loss.sum() / losses.weight.sum()),
            "temporary_mib": used.temp_size_in_bytes / 2**20,
        }

    def peak(size: int) -> float:
        a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.dtype(job["dtype"])) for i in range(2))
        product = jax.jit(jnp.matmul)
        return fastest(lambda: jax.block_until_ready(product(a, b)))

    serve(start, step, peak)


if __name__ == "__main__":
    main()
