"""What `evaluate` and `demo` print at the end: the model against its baselines, and lists for a few users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

MEASURES = ("ndcg@10", "recall@10", "coverage@10", "novelty@10")


def print_report(report: Mapping[str, Any]) -> None:
    """A table on standard output: the recommender, the model alone, each baseline; 95 % intervals where known."""
    from rich.table import Table

    table = Table(title=f"{report['protocol']}, {report['split']} split, {report['users']:,} users")
    table.add_column("")
    for measure in MEASURES:
        table.add_column(measure, justify="right")
    rows = {"recommender": report["metrics"], "model alone": report.get("model_alone") or {}}
    rows |= {name.replace("_", " "): values for name, values in report["baselines"].items()}
    for name, values in rows.items():
        if values:
            intervals = report.get("ci95", {}) if name == "recommender" else {}
            table.add_row(name, *(_cell(values.get(m), intervals.get(m)) for m in MEASURES))
    _print(table)


def print_lists(sample: Mapping[str, Any]) -> None:
    """One user: the last titles of the history beside the recommended titles with score and source."""
    from rich.table import Table

    table = Table(title=f"user {sample['user']}", title_justify="left")
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


def _print(table: Any) -> None:
    from rich.console import Console

    Console(width=None if Console().is_terminal else 110, highlight=False).print(table)
