"""Constrained beam decoding: Hugging Face transformers and ours, the same weights, prefixes and processors.

    python -m benchmarks.decoding [--systems hf hf-strong cold warm int8] [--batches 1 8 32] [--beams 10 20 50]
                                  [--threads 1 2] [--dtypes float32 bfloat16] [--every] [--calls 30] [--seconds 20]
                                  [--work build/decoding] [--python PYTHON]

First every system lists for the same users, and what it finds must be what ours finds, at the same scores (1e-3), or
nothing is timed. Then each is tried with every number of threads and arithmetic at a middling batch and beam width,
and measured everywhere with what was fastest there (`--every`: with all of them). A measurement is a process of its
own, and a call takes other users than the one before. Writes benchmarks/results/decoding.json after each row; rows that
this commit has are not measured again. transformers runs in an environment under WORK/envs, made on first use from
benchmarks/decoding/peers.lock (torch: some GB).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decoding.processes import HERE, measured
from benchmarks.decoding.setting import CATALOGUE, lay_out
from benchmarks.decoding.table import show
from benchmarks.peers.environments import environment, run
from benchmarks.record import RESULTS, commit, write_results
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note

PEERS = ("hf", "hf-strong")
SYSTEMS = (*PEERS, "cold", "warm", "int8")
KEY = ("system", "batch", "beams", "threads", "dtype", "commit")
TOLERANCE = 1e-3  # of log-probabilities, among systems in float32
SAME = 0.99  # of the items; two beams that score alike to rounding may swap at the edge of a list


def main() -> None:
    options = _options()
    options.work = options.work.resolve()
    folder = options.work / "same"
    lay_out(folder)
    lock = HERE / "peers.lock"
    peer = environment("transformers", (), options.work / "envs", options.python, lock) if _peers(options) else None
    if peer is not None:
        run("safetensors", [str(peer), str(HERE / "convert.py"), *(str(folder / name) for name in ("llama.npz", "llama/model.safetensors"))])  # fmt: skip

    def measure(system: str, **job: Any) -> dict[str, Any]:
        return measured({"system": system, "work": str(folder), **job}, peer if system in PEERS else None)

    prove_parity(measure, options)
    rows = kept_rows(options.commit)
    for job in plan(rows, options):
        head = dict(zip(KEY, (*(job[name] for name in KEY[:-1]), options.commit), strict=True))
        if not any(all(row.get(name) == head[name] for name in KEY) for row in rows):
            timed = measure(**job, warm=1 if job["system"] == "hf" else 3, calls=options.calls, seconds=options.seconds)
            del timed["rows"], timed["scores"]
            rows.append(head | {"catalogue": CATALOGUE} | timed)
            path = write_results("decoding", rows)
            note(f"{_named(job)}: {timed['users_per_s']:.2f} users/s; wrote {path}")
    for threads in options.threads:
        head = {"system": "prefill", "batch": 8, "threads": threads, "dtype": "float32", "commit": options.commit}
        if not any(all(row.get(name) == value for name, value in head.items()) for row in rows):
            rows.append(head | measure("prefill", batch=8, threads=threads, dtype="float32"))
            write_results("decoding", rows)
    show(rows)


def prove_parity(measure: Any, options: argparse.Namespace) -> None:
    """Let every system list for the same eight users; print how far each is from `cold`.

    Raises InputError when one in full precision finds other items or other scores.
    """
    job = {"batch": 8, "beams": 20, "threads": max(options.threads), "warm": 1, "calls": 0, "seconds": 0}
    reference = measure("cold", dtype="float32", **job)
    for system in options.systems:
        for dtype in options.dtypes:
            if (system, dtype) == ("cold", "float32"):
                continue
            difference, same = distance(reference, measure(system, dtype=dtype, **job))
            note(
                f"{system} {dtype}: {same:.1%} of the items that cold float32 finds, scores differ by {difference:.1e}"
            )
            exact = dtype == "float32" and system != "int8"
            if exact and not (difference <= TOLERANCE and same >= SAME):
                raise InputError(
                    f"{system}: scores differ by {difference:.1e} (limit {TOLERANCE:g}), {same:.1%} of the items are "
                    f"the same (limit {SAME:.0%}): this is not the same work, so it is not timed"
                )


def distance(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Largest difference of scores of items that both lists of a user hold, and the share of items that both hold."""
    most, same = 0.0, []
    for rows, scores, rows2, scores2 in zip(one["rows"], one["scores"], other["rows"], other["scores"], strict=True):
        theirs = dict(zip(rows2, scores2, strict=True))
        both = [(score, theirs[row]) for row, score in zip(rows, scores, strict=True) if row in theirs]
        most = max(most, *(abs(a - b) for a, b in both)) if both else np.inf
        same.append(len(both) / len(rows))
    return float(most), float(np.mean(same))


def plan(rows: list[dict[str, Any]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Jobs in turn. `rows` grows as they are measured: what was fastest in the trials decides how the rest is run."""
    middle = [values[len(values) // 2] for values in (options.batches, options.beams)]
    for system in options.systems:
        ways = [(threads, dtype) for threads in options.threads for dtype in options.dtypes]
        for way in ways:
            yield dict(zip(KEY, (system, *middle, *way), strict=False))
        if not options.every:
            tried = [r for r in rows if (r["system"], r["batch"], r.get("beams")) == (system, *middle)]
            best = max((r for r in tried if (r["threads"], r["dtype"]) in ways), key=lambda r: r["users_per_s"])
            ways = [(best["threads"], best["dtype"])]
        for batch in options.batches:
            for beams in options.beams:
                for way in ways:
                    yield dict(zip(KEY, (system, batch, beams, *way), strict=False))


def kept_rows(measured_commit: str) -> list[dict[str, Any]]:
    """Rows of earlier calls that measured this commit."""
    path = RESULTS / "decoding.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return [row for row in rows if measured_commit and row.get("commit") == measured_commit]


def _peers(options: argparse.Namespace) -> bool:
    return any(system in PEERS for system in options.systems)


def _named(job: dict[str, Any]) -> str:
    return f"{job['system']}, batch {job['batch']}, {job['beams']} beams, {job['threads']} threads, {job['dtype']}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--beams", nargs="+", type=int, default=[10, 20, 50])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--every", action="store_true", help="all threads and dtypes everywhere")
    parser.add_argument("--calls", type=int, default=30, help="timed calls a row")
    parser.add_argument("--seconds", type=float, default=20.0, help="fewer calls, but two, once they took so long")
    parser.add_argument("--work", type=Path, default=Path("build/decoding"), help="weights and environments")
    parser.add_argument("--python", default=sys.executable, help="interpreter that makes the environment")
    options = parser.parse_args()
    options.commit = commit()  # of the code that runs, whatever is checked out by the time a row is written
    return options


if __name__ == "__main__":
    main()
