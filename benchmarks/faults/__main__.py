"""Faults injected into training, each against an undisturbed run; writes benchmarks/results/faults.json.

    make bench-faults                                            # everything, and an hour of kills: MINUTES=60
    python -m benchmarks.faults --faults kill-commit --kills 5   # one of them

Rows: `fault, count` (how often it struck), `bad` (what was restored or came out at the end was not, to the bit, what the
undisturbed run held), `lost` and `repeated` (plan entries on the way to the end), `detected` (damage: noticed and the step
before taken; kills and resumes: the next start took up the newest good step; sigterm: saved and out with 75), `seconds`,
`commit`. Faults that were measured before keep their rows.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.damage import FAULTS as DAMAGES
from benchmarks.faults.damage import damaged
from benchmarks.faults.kills import killed, loop, told_to_stop, undisturbed
from benchmarks.faults.resumes import MESHES, PROCESSES, resumed
from benchmarks.record import commit, kept_rows, write_results
from m6rec_jax.artifacts.manifest import MANIFEST
from m6rec_jax.data.prepare import prepare
from m6rec_jax.progress import Stage, stage
from tests.fixtures import tiny_card

BUILD = Path("build/faults")
KILLS = ("kill-step", "kill-serialise", "kill-commit")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = (*KILLS, *DAMAGES, "sigterm", "resume-mesh", "resume-processes", "kill-loop")
    parser.add_argument("--faults", nargs="+", choices=known, default=known)
    parser.add_argument("--kills", type=int, default=34, help="of each of the three kinds")
    parser.add_argument("--damages", type=int, default=67, help="of each of the three kinds")
    parser.add_argument("--stops", type=int, default=10, help="SIGTERM")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the loop with a kill about every two")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    if not (BUILD / "dataset" / MANIFEST).is_file():
        prepare(tiny_card(), BUILD / "dataset", levels=1, codebook=16, vocab_size=640)
    dataset = (BUILD / "dataset").absolute()
    build = BUILD.absolute()
    rows: list[dict[str, Any]] = []
    measured = commit()
    for fault in options.faults:
        shutil.rmtree(BUILD / fault, ignore_errors=True)
        size, run = _work(fault, options, dataset, build)
        with stage(fault, size, "minutes" if fault == "kill-loop" else "times") as bar:
            row = run(bar)
        rows.append(
            {name: round(x, 9) if isinstance(x, float) else x for name, x in row.items()} | {"commit": measured}
        )
        path = write_results("faults", kept_rows("faults", rows, ["fault"]) + rows)
        print(f"{rows[-1]}; wrote {path}")
    sys.exit(
        1 if any(row["bad"] or row["lost"] or row["repeated"] or row["detected"] < row["count"] for row in rows) else 0
    )


def _work(fault: str, options: Any, dataset: Path, build: Path) -> tuple[float, Callable[[Stage], dict[str, Any]]]:
    """How much there is to do, and what does it."""
    folder, seed = build / fault, options.seed
    if fault in KILLS:
        whole = undisturbed(dataset, build / "whole")
        return options.kills, lambda bar: killed(fault.removeprefix("kill-"), options.kills, whole, folder, bar, seed)
    if fault in DAMAGES:
        short = undisturbed(dataset, build / "short", 12)
        return options.damages, lambda bar: damaged(
            fault, options.damages, _pruned(short.run, folder), folder, bar, seed
        )
    if fault == "sigterm":
        whole = undisturbed(dataset, build / "whole")
        return options.stops, lambda bar: told_to_stop(options.stops, whole, folder, bar, seed)
    if fault == "kill-loop":
        return options.minutes, lambda bar: loop(options.minutes, dataset, folder, bar, seed)
    size = len(MESHES) if fault == "resume-mesh" else sum(map(len, PROCESSES.values()))
    return size, lambda bar: resumed(fault, dataset, folder, bar)


def _pruned(run: Path, folder: Path) -> Path:
    """A copy of a run with its last three steps only."""
    from m6rec_jax.artifacts.checkpoints import step_folder, steps

    copy = folder / "run"
    shutil.copytree(run, copy)
    for step in steps(copy)[:-3]:
        shutil.rmtree(step_folder(copy, step))
    return copy


if __name__ == "__main__":
    main()
