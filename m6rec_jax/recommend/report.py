"""The HTML report: one file, no network, made from an evaluation, the rows of metrics.jsonl and some lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from m6rec_jax.artifacts.atomic import write_text
from m6rec_jax.recommend import charts
from m6rec_jax.recommend.wording import NAMES, systems

TABLE = (
    ("ndcg@5", "NDCG@5"),
    ("ndcg@10", "NDCG@10"),
    ("recall@5", "Recall@5"),
    ("recall@10", "Recall@10"),
    ("mrr@10", "MRR@10"),
    ("coverage@10", "Coverage"),
    ("novelty@10", "Novelty"),
    ("diversity@10", "Diversity"),
    ("serendipity@10", "Serendipity"),
    ("recent@10", "Recent"),
    ("gini@10", "Gini"),
    ("popularity_lift@10", "Pop. lift"),
    ("valid_id_rate", "Valid ids"),
)
SHARES = {"valid_id_rate", "coverage@10", "recent@10"}
LOWER_IS_BETTER = {"gini@10"}
UNRANKED = {"popularity_lift@10", "valid_id_rate", "recent@10"}  # no best value to mark


def table_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a system, one cell a measure as text; the best cell of a column is marked."""
    made = systems(evaluation)
    best = {}
    for key, _ in TABLE:
        values = [one["metrics"][key] for one in made if key in one["metrics"]]
        if values and key not in UNRANKED:
            best[key] = min(values) if key in LOWER_IS_BETTER else max(values)
    rows = []
    for one in made:
        cells = []
        for key, _ in TABLE:
            value = one["metrics"].get(key)
            cells.append({"text": _cell(key, value), "best": value is not None and best.get(key) == value})
        rows.append({"name": one["name"], "own": one["own"], "cells": cells})
    return rows


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    if key in SHARES:
        return f"{100 * value:.1f} %"
    if key == "popularity_lift@10":
        return f"{100 * value:+.0f} %"
    return f"{value:.4f}" if key.startswith(("ndcg", "recall", "mrr", "serendipity")) else f"{value:.3f}"


def group_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a group of users: who, how many, NDCG@10 of the served lists with its interval and of the floor."""
    rows = []
    for name, group in evaluation.get("groups", {}).items():
        ours, floor = (group["metrics"].get(key, {}).get("ndcg@10") for key in ("model", "counting_floor"))
        low, high = group["ci95"].get("ndcg@10", (None, None))
        rows.append({
            "name": name, "says": group["says"], "users": f"{group['users']:,}", "ours": _cell("ndcg@10", ours),
            "interval": "" if low is None else f"{low:.4f} – {high:.4f}", "floor": _cell("ndcg@10", floor),
        })  # fmt: skip
    return rows


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    found = [(row["step"], row[key]) for row in history if isinstance(row.get(key), (int, float)) and "step" in row]
    return [s for s, _ in found], [v for _, v in found]


def loss_charts(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One chart a task: training loss, validation loss, and the unigram loss that it must end below."""
    tasks = sorted({key.removeprefix("loss/") for row in history for key in row if key.startswith("loss/")}
                   | {key.removeprefix("valid/loss/") for row in history for key in row if key.startswith("valid/loss/")})  # fmt: skip
    made = []
    for task in tasks:
        train, valid = _series(history, f"loss/{task}"), _series(history, f"valid/loss/{task}")
        unigram = _series(history, f"valid/unigram/{task}")[1]
        lines = [(*one, role) for one, role in ((train, "train"), (valid, "valid")) if one[0]]
        last = (valid[1] or train[1])[-1] if lines else None
        if last is not None:
            svg = charts.steps(
                f"loss-{len(made)}", lines, f"loss of {task}, ends at {last:.3f}", unigram[-1] if unigram else None
            )
            made.append({"task": task, "svg": svg, "last": last, "unigram": unigram[-1] if unigram else None})
    return made


def validation_chart(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """NDCG@10 on validation users over training steps, whichever figure chose the checkpoint; None when it was never
    measured."""
    steps, values = _series(history, "valid/ndcg@10")
    if not steps:
        return None
    return {"svg": charts.steps("validation", [(steps, values, "valid")], f"validation NDCG@10, best {max(values):.4f}"), "best": max(values)}  # fmt: skip


def training_facts(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Speed and shape of training: medians over the logged steps."""

    def median(key: str) -> float | None:
        values = sorted(_series(history, key)[1])
        return values[len(values) // 2] if values else None

    facts = [("Steps", f"{max(row['step'] for row in history if 'step' in row):,}")] if history else []
    for key, name, form in (("tokens_per_s", "Tokens a second", "{:,.0f}"), ("step_seconds", "Seconds a step", "{:.3f}"),
                            ("padding", "Padding", "{:.1%}"), ("grad_norm", "Gradient norm", "{:.2f}")):  # fmt: skip
        value = median(key)
        if value is not None:
            facts.append((name, form.format(value)))
    return facts


def write_report(path: Path | str, evaluation: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = (),
                 samples: Sequence[Mapping[str, Any]] = (), facts: Sequence[tuple[str, str]] = ()) -> None:  # fmt: skip
    """Write the report as one self-contained HTML file, atomically.

    `evaluation`: what `evaluate` returns. `history`: rows of metrics.jsonl. `samples`: `{user, history: [title],
    more: events not shown, recommendations: [{title, item_id, score, source, because: [title]}]}`. `facts`: more
    (name, value) lines for the last section.
    """
    environment = Environment(
        loader=PackageLoader("m6rec_jax.recommend"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    text = environment.get_template("report.html.j2").render(
        e=evaluation,
        charts=[{"title": one.title, "note": one.note, "svg": charts.on_page(one), "wide": one.wide} for one in charts.charts_of(evaluation)],
        groups=group_rows(evaluation),
        own=NAMES["model"],
        columns=[name for _, name in TABLE],
        rows=table_rows(evaluation),
        losses=loss_charts(history),
        validation=validation_chart(history),
        facts=[*training_facts(history), *facts],
        samples=samples,
    )  # fmt: skip
    write_text(path, text)
