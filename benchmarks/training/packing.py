"""Rows of several examples against rows of one, padded: real tokens a second of the same model on a prepared dataset.

    python -m benchmarks.training.packing --dataset DATASET [--config quality] [--batches 8] [--rounds 3] [--set name=value ...]

Both see the same examples in the same order, in rows of the length that the configuration is fitted to, and take the step that
`m6rec train` takes. Rows `packed` and `padded` join those of benchmarks/results/training.json: `real` is the share of
positions that are no padding, `tokens_per_s` counts real tokens over the median step, `tokens_per_processor_s` over the least
processor time (of both cores). Making the rows is not timed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from m6rec_jax.allocator import keep_freed_memory

keep_freed_memory()  # as `m6rec train` does, before numpy starts threads

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.record import kept_rows, write_results  # noqa: E402
from m6rec_jax.config import Config  # noqa: E402
from m6rec_jax.data.domains import (  # noqa: E402
    joint_pools,
    joint_records,
    joint_shares,
    joint_vocab,
    open_domains,
)
from m6rec_jax.data.loader import build_row  # noqa: E402
from m6rec_jax.data.packing import ROW_ARRAYS  # noqa: E402
from m6rec_jax.data.plan import Plan  # noqa: E402
from m6rec_jax.data.records import BadRecords  # noqa: E402
from m6rec_jax.model.items import item_table  # noqa: E402
from m6rec_jax.model.load import Blueprint  # noqa: E402
from m6rec_jax.settings import load_config  # noqa: E402
from m6rec_jax.training.fit import fitted  # noqa: E402
from m6rec_jax.training.optim import make_optimizer  # noqa: E402
from m6rec_jax.training.state import init_state  # noqa: E402
from m6rec_jax.training.step import make_train_step  # noqa: E402

CASES = ("packed", "padded")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--config", default="quality")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings over the configuration")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    domains = open_domains([options.dataset], ())
    config = fitted(load_config([options.config], [f"--{one}" for one in options.set]), domains)
    pools = joint_pools(domains, config.mixture, "train", config.data)
    plan = Plan(pools, joint_shares(domains, config.mixture, pools), config.data, config.train.seed)
    batches = rows_of(plan, joint_records(domains, "train", BadRecords(0)), config.data.rows, options.batches)
    blueprint = Blueprint(config.model, joint_vocab(domains), domains[0].dataset.content.shape[1])
    items = jax.device_put(tuple(item_table(domain.dataset.content, domain.dataset.seen) for domain in domains))
    measured = timed(config, blueprint, len(pools), items, batches, options.rounds)
    head = {
        "dataset": domains[0].name,
        "config": options.config,
        "length": config.data.length,
        "rows": config.data.rows,
    }
    rows = [{"case": case, "system": "m6rec", "dtype": config.model.dtype, **head, **measured[case]} for case in CASES]
    for row in rows:
        print("{case:7} {real:5.1%} real, {tokens_per_s:8.0f} tokens/s, {tokens_per_processor_s:8.0f} a processor second".format(**row))  # fmt: skip
    fast, slow = (row["tokens_per_processor_s"] for row in rows)
    print(f"packed / padded = {fast / slow:.2f} by processor time, {rows[0]['tokens_per_s'] / rows[1]['tokens_per_s']:.2f} by the clock")  # fmt: skip
    kept = kept_rows("training", rows, ("case",))
    print(f"wrote {write_results('training', kept + rows)}")


def rows_of(plan: Plan, records: Any, rows: int, batches: int) -> dict[str, list[dict[str, np.ndarray]]]:
    """Batches `[1, rows, T]` of the plan's rows, and the first as many of the same entries, one a row."""

    def stacked(made: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        groups = [made[i : i + rows] for i in range(0, rows * batches, rows)]
        return [{name: np.stack([row[name] for row in group])[None] for name in ROW_ARRAYS} for group in groups]

    planned = [plan.row(number) for number in range(rows * batches)]
    alone = [entries.take([i]) for entries in planned for i in range(len(entries.number))][: rows * batches]
    build = lambda all_: stacked([build_row(plan, records, entries, plan.pools) for entries in all_])  # noqa: E731
    return {"packed": build(planned), "padded": build(alone)}


def timed(
    config: Config, blueprint: Blueprint, n_tasks: int, items: Any, batches: dict[str, list[Any]], rounds: int
) -> dict[str, dict[str, Any]]:
    """What each case measures, batches turn about, `rounds` times over."""
    optimizer = make_optimizer(config.optim, config.train.steps)
    optim = config.optim
    step = make_train_step(
        blueprint, optimizer, n_tasks, config.train.seed, optim.label_smoothing, optim.negatives, optim.average
    )
    state = init_state(blueprint, optimizer, config.train.seed, optim.average > 0)
    placed = {case: [jax.device_put(batch) for batch in made] for case, made in batches.items()}
    jax.block_until_ready(step(state, placed["packed"][0], items))
    taken: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for pair in zip(*(placed[case] for case in CASES), strict=True):
            for case, batch in zip(CASES, pair, strict=True):
                begun, used = time.perf_counter(), time.process_time()
                jax.block_until_ready(step(state, batch, items))
                taken[case].append((time.perf_counter() - begun, time.process_time() - used))
    measured = {}
    for case in CASES:
        real = np.mean([np.mean(batch["segment_ids"] > 0) for batch in batches[case]])
        tokens = real * batches[case][0]["tokens"].size
        wall, processor = zip(*taken[case], strict=True)
        measured[case] = {
            "real": float(real), "tokens_per_s": float(tokens / np.median(wall)),
            "tokens_per_processor_s": float(tokens / min(processor)), "steps": len(wall),
        }  # fmt: skip
    return measured


if __name__ == "__main__":
    main()
