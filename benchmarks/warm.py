"""Known users against strangers: what a request costs when all but the newest event of its history is kept on the device.

    taskset -c 0,1 python -m benchmarks.warm [--repeat 40] [--out FILE]

A random model over random spellings (2 layers of width 128, 12,101 items in 3 levels of 256 codes), users with a prefix of
about 200 tokens, one new event each, 20 beams. Cold and warm take turns in one process; lists must be equal first.
Writes benchmarks/results/warm.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from benchmarks.record import write_results
from m6rec_jax.config import ModelConfig
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.model.load import Blueprint
from m6rec_jax.vocab import SPECIALS, Vocab

ITEMS, LEVELS, CODEBOOK, CONTENT = 12_101, 3, 256, 64
EVENTS, K, BEAMS = 66, 10, 20  # 66 events of 3 tokens and <s>: 199 tokens, 202 with the new one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=40, help="turns of each")
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [row for batch in options.batch for row in measured(batch, options.repeat)]
    for row in rows:
        print(
            "{system:5} batch {batch:2}: {users_per_s:7.1f} users/s, {p50_ms:6.1f} ms (p95 {p95_ms:.1f})".format(**row)
        )
    for cold, warm in zip(rows[::2], rows[1::2], strict=True):
        print(f"batch {cold['batch']}: warm / cold = {warm['users_per_s'] / cold['users_per_s']:.2f}")
    print(f"wrote {write_results('warm', rows, options.out)}")


def measured(batch: int, repeat: int) -> list[dict[str, object]]:
    """One row for cold and one for warm."""
    engine, rng = random_engine(), np.random.default_rng(1)
    users = [f"user {i}" for i in range(batch)]
    taken: dict[str, list[float]] = {"cold": [], "warm": []}
    for turn in range(repeat + 2):  # the first two compile
        histories = [rng.integers(ITEMS, size=EVENTS) for _ in users]
        engine.recommend(histories, users=users, k=K, beams=BEAMS)
        longer = [np.append(h, rng.integers(ITEMS)) for h in histories]
        lists = {}
        for system in sorted(taken, reverse=bool(turn % 2)):
            start = time.perf_counter()
            lists[system] = engine.recommend(longer, users=users if system == "warm" else None, k=K, beams=BEAMS)
            if turn > 1:
                taken[system].append(time.perf_counter() - start)
        np.testing.assert_allclose(lists["warm"].scores, lists["cold"].scores, atol=1e-4)
    return [
        {
            "system": system, "batch": batch, "beams": BEAMS, "catalogue": ITEMS, "prefix_tokens": EVENTS * LEVELS + 1,
            "users_per_s": batch / float(np.median(seconds)), "p50_ms": 1e3 * float(np.median(seconds)),
            "p95_ms": 1e3 * float(np.quantile(seconds, 0.95)),
        }
        for system, seconds in taken.items()
    ]  # fmt: skip


def random_engine() -> Engine:
    """The model and catalogue that are measured."""
    rng = np.random.default_rng(0)
    spellings = rng.choice(CODEBOOK**LEVELS, ITEMS, replace=False)
    codes = np.stack(np.unravel_index(spellings, (CODEBOOK,) * LEVELS), 1).astype(np.int32)
    blueprint = Blueprint(
        ModelConfig(layers=2, width=128, heads=4), Vocab(len(SPECIALS) + 100, (CODEBOOK,) * LEVELS), CONTENT
    )
    content = rng.normal(size=(ITEMS, CONTENT)).astype(np.float32)
    return Engine(blueprint.bind(blueprint.init(0)), codes, content, np.ones(ITEMS, bool), length=256)


if __name__ == "__main__":
    main()
