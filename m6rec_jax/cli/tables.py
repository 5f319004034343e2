"""What `evaluate` and `demo` print at the end: the model against its baselines, and lists for a few users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

MOST_TRIALS = 30  # of a sweep in the printed table; the file holds all
MEASURES = ("ndcg@10", "recall@10", "coverage@10", "novelty@10")


def print_report(report: Mapping[str, Any]) -> None:
    """A table on standard output: model with memory, model alone, each baseline, with half 95 % intervals; how measured."""
    from rich.table import Table

    from m6rec_jax.recommend.wording import systems

    table = Table(title=f"{report['split']} split, {report['users']:,} users", title_justify="left")
    table.add_column("")
    for measure in MEASURES:
        table.add_column(measure, justify="right")
    for one in systems(report):
        table.add_row(one["name"], *(_cell(one["metrics"].get(m), one["ci95"].get(m)) for m in MEASURES))
    _print(table, *(_plain(report[part]) for part in ("verdict", "protocol", "ties") if report.get(part)))
    if report.get("tasks"):
        _print_tasks(report["tasks"])
    if "weights" in report:
        _print_weights(report)


def _print_tasks(tasks: Mapping[str, Any]) -> None:
    """A row a task and measure, with half its 95 % interval."""
    from rich.table import Table

    table = Table(title="The dataset's own tasks", title_justify="left")
    for column in ("task", "measure", "value", "instances"):
        table.add_column(column, justify="left" if column in ("task", "measure") else "right")
    for name, found in tasks.items():
        for measure, value in found["metrics"].items():
            table.add_row(name, measure, _cell(value, found["ci95"].get(measure)), f"{found['instances']:,}")
    _print(table, *(_plain(f"{name}: {line}") for name, found in tasks.items() for line in found["notes"]))


def _print_weights(report: Mapping[str, Any]) -> None:
    """What weights kept otherwise cost: a row a system and measure, and bytes before and after."""
    from rich.table import Table

    from m6rec_jax.recommend.wording import NAMES

    cost = report["weights"]
    name = cost["kept_as"]
    table = Table(title=f"{name} weights beside full ones, the same users", title_justify="left")
    for column in ("", "measure", "full", name, f"{name} - full (95 %)", "p", "same items"):
        table.add_column(column, justify="left" if column in ("", "measure") else "right")
    for system, measures in cost["difference"].items():
        full = report["metrics"] if system == "model" else report[system]
        for measure, found in measures.items():
            low, high = found["ci95"]
            table.add_row(
                NAMES[system], measure, f"{full[measure]:.4f}", f"{cost['metrics'][system][measure]:.4f}",
                f"{found['difference']:+.4f} ({low:+.4f} to {high:+.4f})", f"{found['p']:.3f}", f"{cost['same_items'][system]:.1%}",
            )  # fmt: skip
    before, after = cost["parameter_bytes"]["full"], cost["parameter_bytes"][name]
    _print(
        table, _plain(f"Parameters on a device: {before:,} bytes in full, {after:,} as {name} ({after / before:.1%}).")
    )


def print_comparison(comparison: Mapping[str, Any]) -> None:
    """A row a pair and measure: both means, the difference with its 95 % interval, corrected p, and who wins."""
    from rich.table import Table

    table = Table(title=f"{comparison['split']} split, {comparison['users']:,} users", title_justify="left")
    for name, side in (("measure", "left"), ("A", "left"), ("B", "left"), ("A is", "right"), ("B is", "right"), ("A - B (95 %)", "right"), ("p, Holm", "right"), ("winner", "left")):  # fmt: skip
        table.add_column(name, justify=side, overflow="fold")
    for row in comparison["rows"]:
        low, high = row["ci95"]
        p = f"{row['p_holm']:.4f}" if row["p_holm"] >= 0.001 else "< 0.001"
        table.add_row(
            row["metric"], _plain(row["a"]), _plain(row["b"]), f"{row['mean_a']:.4f}", f"{row['mean_b']:.4f}",
            f"{row['difference']:+.4f} ({low:+.4f} to {high:+.4f})", p, _plain(row["winner"] or "not significant"),
        )  # fmt: skip
    _print(table, _plain(comparison["method"]), _plain(comparison["protocol"]))


def print_sweep(table: Sequence[Any], keys: Sequence[str], path: str, metric: str) -> None:
    """The trials of a sweep (`sweep.report.Row`), best by `metric` first; those without a figure last."""
    from rich.table import Table

    from m6rec_jax.artifacts.best import gain

    shown = Table(title=f"{len(table)} trials", title_justify="left")
    for name in ("trial", "state", f"valid\n{metric}", "step", "seconds"):
        shown.add_column(name, justify="left" if name == "state" else "right")
    for key in keys:
        shown.add_column(key.replace(".", ".\n"), justify="right", overflow="fold")
    order = sorted(table, key=lambda row: (row.state != "complete", row.value is None, -gain(metric, row.value or 0.0), row.trial))  # fmt: skip
    for row in order[:MOST_TRIALS]:
        figures = ("-" if row.value is None else f"{row.value:.4f}", "-" if row.step is None else f"{row.step:,}")
        settings = (row.values.get(key, "-") for key in keys)
        shown.add_row(
            str(row.trial), row.state, *figures, "-" if row.seconds is None else f"{row.seconds:,.0f}",
            *(_plain(f"{value:.4g}" if isinstance(value, float) else str(value)) for value in settings),
        )  # fmt: skip
    more = len(order) - MOST_TRIALS
    _print(shown, *([_plain(f"and {more} more in {path}")] if more > 0 else []))


def print_lists(sample: Mapping[str, Any]) -> None:
    """One user: the last titles of the history beside the recommended titles with score and source."""
    from rich.table import Table

    table = Table(title=_plain(f"user {sample['user']}"), title_justify="left")
    table.add_column("history, latest last", overflow="fold")
    table.add_column("recommended", overflow="fold")
    table.add_column("score", justify="right")
    table.add_column("source")
    for old, new in zip_longest(sample["history"], sample["recommendations"]):
        cells = (_plain(new["title"]), f"{new['score']:.3f}", new["source"]) if new else ()
        table.add_row(_plain(old or ""), *cells)
    _print(table)


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    spread = f" ± {(interval[1] - interval[0]) / 2:.4f}" if interval else ""
    return f"{value:.4f}{spread}"


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)  # never markup: titles are the data's, not ours


def _print(*parts: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    for part in parts:
        console.print(part)
