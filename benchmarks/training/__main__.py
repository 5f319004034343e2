"""Training tokens a second of one decoder: Hugging Face with torch and ours, the same weights, batches and optimiser.

    python -m benchmarks.training [--systems NAME ...] [--threads 2] [--rounds 5] [--steps 2]
                                  [--work build/training] [--envs build/decoding/envs] [--python PYTHON] [--out FILE]

Every system is a process that stays and takes its turn: round after round each trains a few steps, so that what else the
machine does meets all alike. The median step counts. Losses on the first batch must agree (1e-4 in float32) or nothing
is timed. Each round also measures the largest product rate of each dtype, in jax and in torch; the larger is the peak.
Writes benchmarks/results/training.json. torch runs in the environment of `make bench-decoding`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.decoding.processes import processors
from benchmarks.peers.environments import environment
from benchmarks.record import kept_rows, write_results
from benchmarks.training.setting import (
    FORMULA,
    LENGTH,
    OPTIM,
    PIECES,
    ROWS,
    SEED,
    blueprint,
    flops_per_token,
    token_batches,
)
from m6rec_jax.errors import InputError
from m6rec_jax.model.export import llama
from m6rec_jax.progress import note

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
LOCK = HERE.parent / "decoding" / "peers.lock"
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


@dataclass(frozen=True)
class System:
    """One row: who trains, in which arithmetic, how."""

    dtype: str
    compiled: bool = False
    autocast: bool = False
    remat: str = "none"


SYSTEMS = {
    "m6rec-fp32": System("float32"),
    "m6rec-bf16": System("bfloat16"),
    "hf-fp32": System("float32"),
    "hf-fp32-compiled": System("float32", compiled=True),
    "hf-bf16": System("bfloat16"),
    "hf-bf16-compiled": System("bfloat16", compiled=True),
    "hf-bf16-autocast": System("bfloat16", autocast=True),
    "hf-bf16-autocast-compiled": System("bfloat16", autocast=True, compiled=True),
    "m6rec-bf16-dots": System("bfloat16", remat="dots"),
    "m6rec-bf16-full": System("bfloat16", remat="full"),
}


def main() -> None:
    options = _options()
    print(FORMULA)
    work = options.work.resolve()
    lay_out(work)
    theirs = any(name.startswith("hf") for name in options.systems)
    peer = environment("transformers", (), options.envs, options.python, LOCK) if theirs else None
    with ExitStack() as stack, processors(options.threads):
        running = {}
        for name in options.systems:
            job = {**asdict(SYSTEMS[name]), "threads": options.threads, "work": str(work), "optim": asdict(OPTIM)}
            running[name] = stack.enter_context(asked(name, job, peer if name.startswith("hf") else None))
        check_parity({name: begun["loss"] for name, (_, begun) in running.items()})
        for ask, _ in running.values():
            ask("steps 1")  # compiles what was not compiled
        seconds: dict[str, list[float]] = {name: [] for name in running}
        peaks: dict[str, list[float]] = {system.dtype: [] for system in SYSTEMS.values()}
        for round_ in range(options.rounds):
            for name in list(running)[:: 1 if round_ % 2 else -1]:
                seconds[name] += running[name][0](f"steps {options.steps}")["seconds"]
            for name in ("m6rec-fp32", "m6rec-bf16", "hf-fp32", "hf-bf16"):
                if name in running:
                    peaks[SYSTEMS[name].dtype].append(running[name][0]("peak")["gflops"])
        rows = [
            row_of(name, seconds[name], max(peaks[SYSTEMS[name].dtype]), options.threads, running[name][1])
            for name in running
        ]
    show(rows)
    others = kept_rows("training", rows, ("case",))  # benchmarks.training.packing's
    print(f"wrote {write_results('training', rows + others, options.out)}")


def row_of(name: str, seconds: list[float], peak: float, threads: int, begun: dict[str, float]) -> dict[str, Any]:
    """The row of a system from the seconds of its steps; `peak` in GFLOP/s."""
    rate = ROWS * LENGTH / float(np.median(seconds))
    gflops = rate * flops_per_token() / 1e9
    return {
        "case": "decoder", "system": name, "dtype": SYSTEMS[name].dtype, "threads": threads, "tokens_per_s": rate,
        "fastest_tokens_per_s": ROWS * LENGTH / min(seconds), "steps": len(seconds), "gflops": gflops,
        "peak_gflops": peak, "share_of_peak": gflops / peak, "remat": SYSTEMS[name].remat, **begun,
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows and what the best of ours makes of the best of theirs."""
    for row in rows:
        print("{system:26} {dtype:9} {tokens_per_s:8.0f} tokens/s {gflops:7.0f} GFLOP/s, {share_of_peak:4.0%} of {peak_gflops:5.0f}; loss {loss:.4f}".format(**row))  # fmt: skip
    best = {who: max((r["tokens_per_s"] for r in rows if r["system"].startswith(who)), default=0) for who in ("m6rec", "hf")}  # fmt: skip
    if all(best.values()):
        print(f"ours / the best of theirs = {best['m6rec'] / best['hf']:.2f}")


def lay_out(work: Path) -> None:
    """Write the batches and the weights that all begin with; theirs without the code level that no batch uses."""
    work.mkdir(parents=True, exist_ok=True)
    made = blueprint("float32")
    described, tensors = llama(made, jax.tree.map(np.asarray, made.init(SEED)), positions=LENGTH)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:PIECES]
    (work / "config.json").write_text(json.dumps({**described, "vocab_size": PIECES}), encoding="utf-8")
    np.savez(work / "llama.npz", **tensors)
    np.save(work / "batches.npy", token_batches())


@contextmanager
def asked(name: str, job: dict[str, Any], peer: Path | None) -> Iterator[tuple[Any, dict[str, float]]]:
    """A system at work: a function from a question to its answer, and what it said first.

    Raises InputError when the process ends before it answers.
    """
    script = [str(peer), str(HERE / "hf.py")] if peer else [sys.executable, "-m", "benchmarks.training.ours"]
    path = {} if peer else {"PYTHONPATH": str(ROOT)}
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    with subprocess.Popen(
        [*script, json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=outside | path
    ) as process:

        def heard() -> dict[str, Any]:
            line = process.stdout.readline()
            if not line:
                raise InputError(f"{name}: ended without an answer; its last words are above")
            return json.loads(line)

        def ask(question: str) -> dict[str, Any]:
            process.stdin.write(question + "\n")
            process.stdin.flush()
            return heard()

        yield ask, heard()
        process.stdin.close()


def check_parity(losses: dict[str, float]) -> None:
    """Raise InputError when a system starts from another loss than ours in float32."""
    reference = losses.get("m6rec-fp32")
    for name, loss in losses.items() if reference is not None else ():
        limit = TOLERANCE[SYSTEMS[name].dtype]
        note(f"{name}: loss {loss:.5f} before the first step")
        if not abs(loss - reference) <= limit:
            raise InputError(f"{name}: loss {loss:.5f}, ours {reference:.5f}: not the same model, so it is not timed")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of each system in a round")
    parser.add_argument("--work", type=Path, default=Path("build/training"))
    parser.add_argument("--envs", type=Path, default=Path("build/decoding/envs"), help="where torch is, or is put")
    parser.add_argument("--python", default=sys.executable, help="interpreter that makes the environment")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
