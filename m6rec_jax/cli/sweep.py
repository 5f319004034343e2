"""`m6rec sweep`: many runs over a space of settings, and the best configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m6rec_jax.cli.outputs import folder_to_write
from m6rec_jax.cli.train import weighted
from m6rec_jax.config import dump_config
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.settings import Parser, add_config_options, config_of
from m6rec_jax.sweep.journal import PRUNERS


def sweep(argv: list[str]) -> None:
    """Search the space, one training a trial; write table, charts and the best configuration."""
    parser = Parser(
        prog="m6rec sweep",
        usage="m6rec sweep --config CONFIG.yaml --space SPACE.yaml --dataset DATASET[=WEIGHT] --trials N --out DIR\n"
        "                   [--jobs N] [--pruner median|hyperband|none] [--launcher local|slurm] [--section.key=value ...]",
        description="Search settings: Optuna chooses, `m6rec train` trains each trial into DIR/trials/NNNN, and those that fall\n"
        "behind in validation are stopped. The same command again goes on where it stopped.\n\n"
        "example:\n  m6rec sweep --config quality --space quality --dataset data/shop --trials 40 --out sweeps/shop",
    )
    add = parser.add_argument
    add("--dataset", action="append", metavar="DATASET[=WEIGHT]", help="folder that `m6rec prepare` wrote; repeat it as for `m6rec train`")  # fmt: skip
    add("--space", metavar="SPACE", help="YAML of what is searched, or the name of a shipped space; a line a setting: key: {low: ..., high: ..., log: true} or {..., step: ...} or {values: [...]}")  # fmt: skip
    add("--trials", type=int, metavar="N", help="how many trials in all, those of earlier calls and failed ones among them")  # fmt: skip
    add("--out", metavar="DIR", help="folder of the sweep: journal, runs of the trials, table, charts; made if missing")
    add("--jobs", type=int, default=1, metavar="N", help="trials side by side; on one machine they share its devices, or are dealt those of CUDA_VISIBLE_DEVICES")  # fmt: skip
    add("--pruner", choices=list(PRUNERS), default="median", metavar="NAME", help="which trials are stopped early: median, below the median of the others at the same validation; hyperband; none")  # fmt: skip
    add("--launcher", choices=["local", "slurm"], default="local", help="local: processes on this machine; slurm: a job a trial, through submitit")  # fmt: skip
    add("--slurm", action="append", metavar="NAME=VALUE", help="option of submitit for --launcher slurm, such as partition=gpu, gpus_per_node=1, time=720 (minutes); repeat it for more")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the choice of settings")
    add_config_options(parser)
    options = parser.parse(argv)
    for name in ("dataset", "space", "trials", "out"):
        if not options[name]:
            raise InputError(f"--{name} is missing; m6rec sweep --help shows an example")
    for name in ("trials", "jobs"):
        if options[name] < 1:
            raise InputError(f"--{name}={options[name]}: must be at least 1")
    if options.seed < 0:
        raise InputError(f"--seed={options.seed}: must be at least 0")
    if options.slurm and options.launcher != "slurm":
        raise InputError(f"--slurm {options.slurm[0]} and --launcher local: only jobs under Slurm have such options; drop it, or use --launcher slurm")  # fmt: skip
    run(options, argv)


def run(options: Any, argv: list[str]) -> None:
    from m6rec_jax.sweep.journal import locked, open_study, optuna, remember
    from m6rec_jax.sweep.space import find_space, read_space

    base, out = config_of(options), folder_to_write("--out", options.out)
    path = find_space(options.space)
    axes = read_space(path, base)
    for axis in axes:
        if any(word == f"--{axis.key}" or word.startswith(f"--{axis.key}=") for word in argv):
            raise InputError(f"--{axis.key} is searched by {path}; take it out of one of the two")
    datasets = [_absolute(name) for name in options.dataset]
    optuna()
    launcher = _launcher(options, out)
    with locked(out):
        remember(out, base, axes, datasets)
        from m6rec_jax.artifacts.atomic import write_text
        from m6rec_jax.sweep.study import CONFIG, Sweep, run_sweep

        write_text(out / CONFIG, dump_config(base))
        study = open_study(out, options.seed, options.pruner, options.jobs, base.train.best)
        if study.trials:
            note(f"{out}: {len(study.trials)} of {max(options.trials, len(study.trials))} trials were begun before")
        plan = Sweep(out, base, axes, datasets, options.trials, options.jobs, launcher, study)
        _report(plan, run_sweep)


def _report(plan: Any, run_sweep: Any) -> None:
    """Sweep with the table kept up to date, then print it, draw, and name the best."""
    from m6rec_jax.cli.tables import print_sweep
    from m6rec_jax.sweep.charts import IMPORTANCE, LINES, draw_importance, draw_lines
    from m6rec_jax.sweep.report import BEST, TABLE, best, rows, write_best, write_table

    out, axes, metric = plan.out, plan.axes, plan.metric
    run_sweep(plan, lambda: write_table(out / TABLE, rows(plan.study, axes, metric), axes, metric))
    table = rows(plan.study, axes, metric)
    print_sweep(table, [axis.key for axis in axes], str(out / TABLE), metric)
    top = best(table, metric)
    drawn = [out / LINES] if draw_lines(out / LINES, table, axes, metric) else []
    drawn += [out / IMPORTANCE] if draw_importance(out / IMPORTANCE, plan.study, table, metric) else []
    failed = [row for row in table if row.state == "failed"]
    for row in failed:
        note(f"trial {row.trial} failed: {row.error}")
    if top is None:
        last = f"the last failure: {failed[-1].error}" if failed else "all were pruned"
        raise InputError(f"{out}: no trial ran to its end ({last}); mend that, and give the same command with more --trials")  # fmt: skip
    command = write_best(out / BEST, top, plan.base, plan.datasets)
    note(f"wrote {', '.join(map(str, (out / TABLE, out / BEST, *drawn)))}")
    note(f"the best is trial {top.trial}, already trained: {plan.run(top.trial)}; to train it anew:\n  {command}")


def _absolute(named: str) -> str:
    """A --dataset with its folder as an absolute path; InputError where `m6rec train` would refuse it."""
    from m6rec_jax.data.dataset import open_dataset

    path, weight = weighted(named)
    open_dataset(path)
    return str(path.absolute()) if weight == 1 else f"{path.absolute()}={weight:g}"


def _launcher(options: Any, out: Path) -> Any:
    from m6rec_jax.sweep.launch import LocalLauncher, slurm_launcher

    if options.launcher == "local":
        return LocalLauncher(options.jobs)
    given: dict[str, Any] = {}
    for word in options.slurm or ():
        name, found, value = word.partition("=")
        if not found:
            raise InputError(f"--slurm {word}: write NAME=VALUE, such as partition=gpu")
        given[name] = int(value) if value.isdigit() else value
    return slurm_launcher(out.absolute() / "slurm", given)
