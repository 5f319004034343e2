"""Two pictures of a sweep: every trial as a line through its settings, and how much each setting mattered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from m6rec_jax.artifacts.best import gain
from m6rec_jax.artifacts.charts import PRINT, STYLE, png, quiet
from m6rec_jax.sweep.report import Row, best
from m6rec_jax.sweep.space import Axis, Choice, text

LINES, IMPORTANCE = "parallel.png", "importance.png"
FEW = 20  # complete trials below which importances say little


def draw_lines(path: Path, table: Sequence[Row], axes: Sequence[Axis], metric: str) -> bool:
    """Parallel coordinates: a line a trial through its settings to its figure. False when there is no trial to draw."""
    drawn = [row for row in table if row.value is not None and row.values]
    if not drawn:
        return False
    top, last = best(table, metric), len(axes)
    figures = sorted((row.value for row in drawn if row.value is not None), key=lambda value: gain(metric, value))
    low, high = figures[0], figures[-1]  # the worst below, the best above
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 1.35 * last, 3.4))
        panel = figure.subplots()
        quiet(panel, PRINT)
        panel.grid(False)
        for row in sorted(drawn, key=lambda row: gain(metric, row.value or 0.0)):
            share = 0.5 if high == low else (row.value - low) / (high - low)
            heights = [*(_height(axis, row.values[axis.key]) for axis in axes), share]
            pruned = row.state != "complete"
            mine = row is top
            panel.plot(
                range(last + 1), heights, marker="o", markersize=3.5 if mine else 2,
                color=PRINT.accent if mine else PRINT.other if pruned else PRINT.ink,
                alpha=1 if mine else 0.6 if pruned else 0.2 + 0.5 * share,
                linewidth=2.2 if mine else 1, linestyle=":" if pruned else "-", zorder=4 if mine else 3,
            )  # fmt: skip
        for at, axis in enumerate(axes):
            _scale(panel, at, [(_height(axis, value), text(_short(value))) for value in _ticks(axis)])
        ends = [(0.0, f"{low:.4f}"), (1.0, f"{high:.4f}")] if high != low else [(0.5, f"{low:.4f}")]
        _scale(panel, last, ends)
        panel.set_xticks(range(last + 1), [*(axis.key.replace(".", ".\n") for axis in axes), f"valid\n{metric}"])
        panel.tick_params(axis="x", colors=PRINT.ink, pad=8)
        panel.set_yticks([])
        panel.set_xlim(-0.25, last + 0.55)
        panel.set_ylim(-0.06, 1.06)
        panel.spines["bottom"].set_visible(False)
        figure.subplots_adjust(left=0.02, right=0.98, top=0.99, bottom=0.16)
        state = "Thick: the best trial. Dotted: pruned or unfinished, at the best figure reached. The darker a line, the better its figure."
        png(figure, path, "Trials of the sweep", state)
    return True


def draw_importance(path: Path, study: Any, table: Sequence[Row], metric: str) -> bool:
    """Bars of PED-ANOVA over the complete trials (Watanabe et al. 2023). False when they are too few to tell."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    complete = sum(row.state == "complete" for row in table)
    if complete < 2:
        return False
    found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    if not any(value > 0 and math.isfinite(value) for value in found.values()):
        return False
    names, values = zip(*sorted(found.items(), key=lambda pair: pair[1]), strict=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 0.5 + 0.32 * len(names)))
        panel = figure.subplots()
        quiet(panel, PRINT)
        panel.grid(False)
        panel.barh(range(len(names)), values, height=0.62, color=PRINT.accent)
        for at, value in enumerate(values):
            panel.annotate(f"{value:.0%}", (value, at), (4, 0), textcoords="offset points", va="center", fontsize=8, color=PRINT.soft)  # fmt: skip
        panel.set_yticks(range(len(names)), names, color=PRINT.ink)
        panel.set_xticks([])
        panel.set_xlim(0, 1.12 * max(values))
        panel.spines["bottom"].set_visible(False)
        figure.subplots_adjust(left=0.02, right=0.98, top=0.99, bottom=0.02)
        few = f" Below {FEW} trials that is a guess." if complete < FEW else ""
        told = f"Share of what tells the best tenth of {complete} complete trials from the others (PED-ANOVA).{few}"
        png(figure, path, f"What mattered for valid {metric}", told)
    return True


def _height(axis: Axis, value: Any) -> float:
    """Where a value stands on its scale, from 0 to 1."""
    if isinstance(axis, Choice):
        return axis.values.index(value) / (len(axis.values) - 1) if len(axis.values) > 1 else 0.5
    scale = math.log if axis.log else float
    return (scale(value) - scale(axis.low)) / (scale(axis.high) - scale(axis.low))


def _ticks(axis: Axis) -> Sequence[Any]:
    if isinstance(axis, Choice):
        return axis.values
    if axis.step and (count := round((axis.high - axis.low) / axis.step)) <= 6:
        return [axis.low + n * axis.step for n in range(count + 1)]
    middle = float(f"{math.sqrt(axis.low * axis.high):.1g}") if axis.log else (axis.low + axis.high) / 2
    return (axis.low, axis.high) if axis.whole else (axis.low, middle, axis.high)


def _short(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _scale(panel: Any, at: int, ticks: Sequence[tuple[float, str]]) -> None:
    panel.plot([at, at], [0, 1], color=PRINT.rule, linewidth=1.2, zorder=1)
    for height, name in ticks:
        label = name if len(name) <= 14 else name[:13] + "…"
        panel.annotate(label, (at, height), (5, 0), textcoords="offset points", va="center", fontsize=7, color=PRINT.soft, zorder=5, bbox={"facecolor": PRINT.paper, "alpha": 0.75, "edgecolor": "none", "pad": 0.6})  # fmt: skip
