"""Charts of the quality report, in the style of `artifacts.charts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from m6rec_jax.artifacts.charts import ACCENT, ACCENT_SOFT, INK, OTHER, PAPER, SOFT, STYLE, WARN, quiet, svg


def all_charts(found: dict[str, Any]) -> dict[str, str]:
    """The charts that the figures allow: lorenz, bands, and with real times activity."""
    with rc_context(STYLE):
        made = {"lorenz": _lorenz(found["tail"]), "bands": _bands(found["drift"]["parts"])}
        if "activity" in found:
            made["activity"] = _activity(found["activity"])
    return made


def _activity(activity: dict[str, Any]) -> str:
    """Two rows over one time axis, each with its own scale: events, and users seen for the first time."""
    figure = Figure(figsize=(9.2, 3.0))
    days, n = activity["edges"], len(activity["events"])
    rows = (("events", OTHER, (0.055, 0.47, 0.94, 0.46)), ("new_users", ACCENT, (0.055, 0.09, 0.94, 0.24)))
    for name, colour, place in rows:
        axes = figure.add_axes(place)
        axes.bar(range(n), activity[name], width=0.8, color=colour, align="edge")
        _quiet(axes)
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.set_xlim(0, n)
        axes.set_ylim(0)
        said = "events" if name == "events" else "users seen for the first time"
        axes.text(0, 1.04, said, transform=axes.transAxes, color=INK, va="bottom")
        axes.set_xticks([])
    ticks = range(0, len(days), 12)
    axes.set_xticks(list(ticks), [days[i] for i in ticks])
    axes.get_xticklabels()[0].set_horizontalalignment("left")
    axes.get_xticklabels()[-1].set_horizontalalignment("right")
    return svg(figure, "activity", f"Events from {days[0]} to {days[-1]}, and users seen for the first time")


def _lorenz(tail: dict[str, Any]) -> str:
    figure = Figure(figsize=(4.4, 2.5))
    axes = figure.add_axes((0.1, 0.1, 0.88, 0.86))
    x, y = tail["lorenz"]
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.fill_between(x, y, x, color=ACCENT_SOFT, linewidth=0)
    axes.plot(x, y, color=ACCENT, linewidth=1.8)
    _quiet(axes)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set_xticks(ticks, [f"{100 * tick:.0f} %" for tick in ticks])
    axes.set_yticks(ticks[1:], [f"{100 * tick:.0f} %" for tick in ticks[1:]])
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return svg(figure, "lorenz", f"Share of events against share of items, Gini {tail['gini']:.2f}")


def _bands(parts: Sequence[dict[str, Any]]) -> str:
    figure = Figure(figsize=(9.2, 0.1 + 0.56 * max(len(parts), 1)))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    for y, part in enumerate(parts):
        left = 0.0
        axes.text(-0.01, y + 0.22, part["name"], color=INK, va="center", ha="right")
        for share, colour, text in zip(part["bands"], (ACCENT, ACCENT_SOFT, OTHER, WARN), (PAPER, ACCENT, INK, WARN), strict=True):  # fmt: skip
            axes.barh(y, share, left=left, height=0.44, color=colour, align="edge")
            if share > 0.04 and colour != WARN:
                axes.text(left + 0.006, y + 0.22, f"{100 * share:.0f} %", color=text, va="center", fontsize=8)
            left += share
    axes.set(xlim=(-0.055, 1), ylim=(len(parts) - 0.4, -0.1))
    axes.axis("off")
    return svg(figure, "bands", "Share of events by the popularity of their item, for each split")


def _quiet(axes: Axes) -> None:
    quiet(axes)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
