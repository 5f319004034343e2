"""Charts of the evaluation report: bars with intervals, and curves over steps, in the style of `artifacts.charts`."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from m6rec_jax.artifacts.charts import ACCENT, INK, OTHER, SOFT, STYLE, quiet, svg


def bars(chart: str, names: Sequence[str], values: Sequence[float], intervals: Sequence[Sequence[float] | None],
         strong: Sequence[bool], label: str) -> str:  # fmt: skip
    """Horizontal bars, first on top, with 95 % whiskers; `strong` ones in the accent colour. `chart` is its name on the page."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.0, 0.42 * len(names) + 0.12))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        top = max([*values, *(i[1] for i in intervals if i), 1e-9])
        for y, (name, value, interval, own) in enumerate(zip(names, values, intervals, strong, strict=True)):
            axes.barh(y, value, height=0.46, color=ACCENT if own else OTHER, align="edge")
            if interval:
                axes.plot(interval, [y + 0.23] * 2, color=INK, linewidth=1.1, solid_capstyle="butt")
                for end in interval:
                    axes.plot([end, end], [y + 0.14, y + 0.32], color=INK, linewidth=1.1)
            axes.text(0, y - 0.06, name, color=INK, va="bottom", fontsize=9, weight="bold" if own else "normal")
            reach = max(value, interval[1] if interval else 0)
            axes.text(reach + 0.015 * top, y + 0.23, f"{value:.4f}", color=INK, va="center", fontsize=9)
        axes.set(xlim=(0, top * 1.2), ylim=(len(names) - 0.4, -0.5))
        axes.axis("off")
        return svg(figure, chart, label)


def curves(
    chart: str, lines: Sequence[tuple[Sequence[float], Sequence[float], str]], label: str, level: float | None = None
) -> str:
    """Lines over steps: (steps, values, role); role `train` is thin, `valid` strong with points. `level` is dashed."""
    with rc_context(STYLE):
        figure = Figure(figsize=(3.4, 1.75))
        axes = figure.add_axes((0.12, 0.15, 0.865, 0.82))
        for steps, values, role in lines:
            if role == "train":
                axes.plot(steps, values, color=OTHER, linewidth=1.2)
            else:
                axes.plot(steps, values, color=ACCENT, linewidth=1.8, marker="o", markersize=3)
        if level is not None:
            axes.axhline(level, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        _quiet(axes)
        return svg(figure, chart, label)


def _quiet(axes: Axes) -> None:
    quiet(axes)
    axes.margins(x=0.02, y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
