"""Charts of an evaluation, each once on the page (SVG) and once as a picture (PNG), in the style of `artifacts.charts`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from m6rec_jax.artifacts.charts import ACCENT, OTHER, PAGE, PRINT, SOFT, STYLE, Paint, png, quiet, svg
from m6rec_jax.recommend.wording import NAMES, systems

SHADES = (1.0, 0.72, 0.46, 0.26, 0.11)  # of the accent colour, the most popular items darkest
EVERYBODY = {"catalogue": "The catalogue", "histories": "Histories of these users"}


@dataclass(frozen=True)
class Chart:
    """A chart: its name in files and ids, title, a note below or above it, what it says to who cannot see it."""

    name: str
    title: str
    note: str
    label: str
    draw: Callable[[Paint], Figure]
    wide: bool = False


def charts_of(evaluation: Mapping[str, Any]) -> list[Chart]:
    """The charts that an evaluation has data for, bars of NDCG@10 and Recall@10 first."""
    made = [_bars_of(evaluation, metric, title) for metric, title in (("ndcg@10", "NDCG@10"), ("recall@10", "Recall@10"))]  # fmt: skip
    curves, calibration = evaluation.get("curves", {}), evaluation.get("calibration")
    if curves:
        shown = curves["coverage"]
        ends = ", ".join(f"{NAMES[name]} {100 * values[-1]:.1f} %" for name, values in shown.items() if name != "k")
        made.append(Chart("coverage", "How much of the catalogue is recommended", "Share of items that stand in somebody's first k, by k.", f"Coverage at {shown['k'][-1]}: {ends}", lambda paint: coverage(paint, shown)))  # fmt: skip
    if calibration and calibration["bins"]:
        measured = calibration["metrics"]
        said = f"ECE {measured['ece']:.4f}" + (f", AUC {measured['auc']:.3f}" if "auc" in measured else "")
        made.append(Chart("calibration", "Do the chances it gives come true?", f"List items by the chance given to them, against the share that were hits; dashed = exactly right. {said}.", f"Calibration: {said}", lambda paint: reliability(paint, calibration["bins"])))  # fmt: skip
    if curves:
        tiers = curves["popularity"]
        top = ", ".join(f"{_row_name(name)} {100 * values[0]:.0f} %" for name, values in tiers.items() if name != "tiers")  # fmt: skip
        made.append(Chart("popularity", "How popular is what is recommended?", "Share of list places (of items, of events) that goes to the most popular items of the catalogue and to the rest.", f"Share of the most popular 1 %: {top}", lambda paint: popularity(paint, tiers), wide=True))  # fmt: skip
    return made


def on_page(chart: Chart) -> str:
    """The chart as one <svg> element."""
    with rc_context(STYLE):
        return svg(chart.draw(PAGE), chart.name, chart.label)


def write_charts(evaluation: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write each chart as `folder/<name>.png` and return where."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with rc_context(STYLE):
        for chart in charts_of(evaluation):
            made.append(folder / f"{chart.name}.png")
            png(chart.draw(PRINT), made[-1], chart.title, chart.note)
    return made


def _bars_of(evaluation: Mapping[str, Any], metric: str, title: str) -> Chart:
    made = [one for one in systems(evaluation) if metric in one["metrics"]]
    values = [one["metrics"][metric] for one in made]
    label = f"{title}: " + ", ".join(f"{one['name']} {value:.4f}" for one, value in zip(made, values, strict=True))
    names, intervals, own = [one["name"] for one in made], [one["ci95"].get(metric) for one in made], [one["own"] for one in made]  # fmt: skip
    return Chart(metric.replace("@", "-"), title, "Mean over users; whiskers: 95 % intervals.", label, lambda paint: bars(paint, names, values, intervals, own))  # fmt: skip


def bars(paint: Paint, names: Sequence[str], values: Sequence[float], intervals: Sequence[Sequence[float] | None],
         strong: Sequence[bool]) -> Figure:  # fmt: skip
    """Horizontal bars, first on top, with 95 % whiskers; `strong` ones in the accent colour."""
    figure = Figure(figsize=(4.0, 0.42 * len(names) + 0.12))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    top = max([*values, *(i[1] for i in intervals if i), 1e-9])
    for y, (name, value, interval, own) in enumerate(zip(names, values, intervals, strong, strict=True)):
        axes.barh(y, value, height=0.46, color=paint.accent if own else paint.other, align="edge")
        if interval:
            axes.plot(interval, [y + 0.23] * 2, color=paint.ink, linewidth=1.1, solid_capstyle="butt")
            for end in interval:
                axes.plot([end, end], [y + 0.14, y + 0.32], color=paint.ink, linewidth=1.1)
        axes.text(0, y - 0.06, name, color=paint.ink, va="bottom", fontsize=9, weight="bold" if own else "normal")
        reach = max(value, interval[1] if interval else 0)
        axes.text(reach + 0.015 * top, y + 0.23, f"{value:.4f}", color=paint.ink, va="center", fontsize=9)
    axes.set(xlim=(0, top * 1.2), ylim=(len(names) - 0.4, -0.5))
    axes.axis("off")
    return figure


def coverage(paint: Paint, curves: Mapping[str, Any]) -> Figure:
    """One line a system over k, named at its end."""
    figure = Figure(figsize=(4.4, 2.7))
    axes = figure.add_axes((0.09, 0.14, 0.58, 0.84))
    ks, ends = curves["k"], {}
    for name, values in curves.items():
        if name != "k":
            own = name in ("model", "model_alone")
            style = {"color": paint.accent if own else paint.other, "linewidth": 2.2 if name == "model" else 1.4}
            axes.plot(ks, values, linestyle=(0, (3, 2)) if name == "model_alone" else "-", **style)
            ends[name] = values[-1]
    _quiet(axes, paint)
    top = max([*ends.values(), 1e-9])
    axes.set(xlim=(ks[0], ks[-1] + 1e-9), ylim=(0, 1.06 * top))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g} %"))
    axes.set_xticks(sorted({ks[0], (ks[0] + ks[-1]) // 2, ks[-1]}))
    axes.set_xlabel("k", color=paint.soft, fontsize=8, labelpad=1)
    last = -1.0
    for name, end in sorted(ends.items(), key=lambda one: one[1]):
        last = max(end, last + 0.078 * top)
        said = f"{NAMES[name]} {100 * end:.1f} %"
        axes.annotate(said, (ks[-1], end), (1.03, last / (1.06 * top)), xycoords="data", textcoords="axes fraction", color=paint.ink,
                      va="center", fontsize=8, weight="bold" if name == "model" else "normal", annotation_clip=False)  # fmt: skip
    return figure


def popularity(paint: Paint, tiers: Mapping[str, Any]) -> Figure:
    """Stacked bars: the catalogue, the histories, and each system, cut by how popular items are."""
    rows = {name: tiers[name] for name in (*EVERYBODY, *reversed(NAMES)) if name in tiers}
    figure = Figure(figsize=(9.2, 0.34 * len(rows) + 0.42))
    axes = figure.add_axes((0.19, 0.0, 0.81, 1 - 0.36 / figure.get_figheight()))
    for y, (name, values) in enumerate(rows.items()):
        left = 0.0
        axes.text(-0.012, y, _row_name(name), color=paint.ink, va="center", ha="right", weight="bold" if name == "model" else "normal")  # fmt: skip
        for share, shade in zip(values, SHADES, strict=True):
            axes.barh(y, share, left=left, height=0.62, color=paint.accent, alpha=shade, linewidth=0)
            if share >= 0.045:
                axes.text(left + share / 2, y, f"{100 * share:.0f} %", color=paint.paper if shade > 0.6 else paint.ink, va="center", ha="center", fontsize=8)  # fmt: skip
            left += share
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.6, -0.5))
    axes.axis("off")
    keys = [Patch(facecolor=paint.accent, alpha=shade, linewidth=0) for shade in SHADES]
    figure.legend(keys, tiers["tiers"], loc="upper left", bbox_to_anchor=(0.182, 1.0), ncol=len(SHADES), frameon=False, fontsize=8,
                  labelcolor=paint.soft, handlelength=1.1, handleheight=0.9, columnspacing=1.6, borderpad=0, borderaxespad=0)  # fmt: skip
    return figure


def reliability(paint: Paint, bins: Sequence[Mapping[str, float]]) -> Figure:
    """Chance given against share of hits, both logarithmic, with 95 % intervals; an open point = no hit at all."""
    figure = Figure(figsize=(4.4, 2.7))
    axes = figure.add_axes((0.13, 0.17, 0.85, 0.81))
    chances = [max(b["p"], 1e-9) for b in bins]
    least, most = 0.5 * min(chances), min(1.0, 1.8 * max(*chances, *(b["high"] for b in bins)))
    axes.plot([least, most], [least, most], color=paint.soft, linewidth=1, linestyle=(0, (4, 3)))
    for p, b in zip(chances, bins, strict=True):
        axes.plot([p, p], [max(b["low"], least), max(b["high"], least)], color=paint.ink, linewidth=1.1)
        fill = paint.accent if b["hit"] > 0 else paint.paper
        axes.plot(p, max(b["hit"], least), marker="o", markersize=5.5, markerfacecolor=fill, markeredgecolor=paint.accent, linewidth=0, clip_on=False)  # fmt: skip
    quiet(axes, paint)
    axes.set(xscale="log", yscale="log", xlim=(least, most), ylim=(least, most))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("chance given", color=paint.soft, fontsize=8, labelpad=1)
    axes.set_ylabel("share of hits", color=paint.soft, fontsize=8, labelpad=2)
    return figure


def steps(
    chart: str, lines: Sequence[tuple[Sequence[float], Sequence[float], str]], label: str, level: float | None = None
) -> str:
    """Lines over training steps, for the page: (steps, values, role); `train` is thin, `valid` strong with points. `level` is dashed."""
    with rc_context(STYLE):
        figure = Figure(figsize=(3.4, 1.75))
        axes = figure.add_axes((0.12, 0.15, 0.865, 0.82))
        for at, values, role in lines:
            if role == "train":
                axes.plot(at, values, color=OTHER, linewidth=1.2)
            else:
                axes.plot(at, values, color=ACCENT, linewidth=1.8, marker="o", markersize=3)
        if level is not None:
            axes.axhline(level, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        _quiet(axes, PAGE)
        axes.margins(x=0.02, y=0.12)
        return svg(figure, chart, label)


def _row_name(name: str) -> str:
    return EVERYBODY.get(name) or NAMES.get(name, name)


def _quiet(axes: Axes, paint: Paint) -> None:
    quiet(axes, paint)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
