"""What saving in the background costs training: a save every 100 steps against none, turn about, each in a process of its own.

    python -m benchmarks.saving --rounds 3

Rows (benchmarks/results/saving.json): `round, system` (every-100, none), `saves` (before the last step), `state_bytes`,
`seconds` (all but init, compilation and validation: steps, waiting for batches, saving), `held_up` (seconds of these in which the
loop itself was saving), `peak_bytes` (of the process). Printed: the median of a round's ratio of `seconds`, and of
`held_up / seconds`.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import write_results
from m6rec_jax.progress import stage

BUILD = Path("build/saving")
SYSTEMS = {"every-100": 100, "none": 10**6}
MODEL = {"layers": 2, "width": 128, "heads": 2, "dropout": 0.1}
COUNTED = ("step", "data wait", "save")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=401)
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)  # what a process of its own is told
    options = parser.parse_args()
    if options.system:
        print(json.dumps(_train(options.system, options.steps)))
        return
    rows = []
    with stage("saving", options.rounds * len(SYSTEMS), "runs") as bar:
        for number in range(options.rounds):
            for system in sorted(SYSTEMS, reverse=bool(number % 2)):
                words = [sys.executable, "-m", "benchmarks.saving", "--system", system, "--steps", str(options.steps)]
                ran = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
                rows.append({"round": number, "system": system, **json.loads(ran.stdout.splitlines()[-1])})
                bar.advance(1, seconds=f"{rows[-1]['seconds']:.1f}")
    pairs = [{row["system"]: row for row in rows if row["round"] == n} for n in range(options.rounds)]
    cost = statistics.median(pair["every-100"]["seconds"] / pair["none"]["seconds"] - 1 for pair in pairs)
    held = statistics.median(pair["every-100"]["held_up"] / pair["every-100"]["seconds"] for pair in pairs)
    more = statistics.median(pair["every-100"]["peak_bytes"] / pair["none"]["peak_bytes"] for pair in pairs)
    print(f"a save every 100 steps: {cost:+.1%} of the time, the loop held up {held:.1%}; peak memory {more:.2f} times")
    print(f"wrote {write_results('saving', rows)}")


def _train(system: str, steps: int) -> dict[str, Any]:
    """Train on MovieLens-100K from the start."""
    from m6rec_jax.artifacts.checkpoints import manifest
    from m6rec_jax.artifacts.checkpoints import steps as saved
    from m6rec_jax.cli.train import run_training
    from m6rec_jax.data.prepare import prepare
    from m6rec_jax.data.registry import fetch
    from m6rec_jax.settings import load_config
    from m6rec_jax.training.goodput import totals

    data = prepare(fetch("ml-100k", BUILD / "raw"), BUILD / "dataset")
    run = BUILD / system
    shutil.rmtree(run, ignore_errors=True)
    settings = {f"model.{name}": value for name, value in MODEL.items()}
    settings |= {
        "train.steps": steps,
        "train.eval_every": 0,
        "checkpoint.every": SYSTEMS[system],
        "checkpoint.keep": 100,
    }
    run_training(load_config(["demo"], [f"--{name}={value}" for name, value in settings.items()]), [data.path], run)
    spent, shapes = totals(run), manifest(run, saved(run)[-1])["shapes"]
    return {
        "saves": len(saved(run)) - 1,
        "state_bytes": sum(_bytes(*shape) for part in shapes.values() for shape in part.values()),
        "seconds": round(sum(spent.get(kind, 0.0) for kind in COUNTED), 3),
        "held_up": round(spent["save"], 3),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def _bytes(shape: list[int], dtype: str) -> int:
    import numpy as np

    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


if __name__ == "__main__":
    main()
