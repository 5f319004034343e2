"""Charts of the report as inline SVG whose colours are the page's own CSS variables, so that they follow light and dark.

matplotlib draws with marker colours that no palette has; `_svg` swaps them for variables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import count

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, SOFT, RULE, ACCENT, ACCENT_SOFT, OTHER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {INK: "ink", SOFT: "soft", RULE: "rule", ACCENT: "accent", ACCENT_SOFT: "accent-soft", OTHER: "other"}
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "m6rec", "font.size": 9, "axes.unicode_minus": False}
_numbers = count()


def bars(names: Sequence[str], values: Sequence[float], intervals: Sequence[Sequence[float] | None],
         strong: Sequence[bool], label: str) -> str:  # fmt: skip
    """Horizontal bars, first on top, with 95 % whiskers; `strong` ones in the accent colour."""
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
        return _svg(figure, label)


def curves(
    lines: Sequence[tuple[Sequence[float], Sequence[float], str]], label: str, level: float | None = None
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
        return _svg(figure, label)


def _quiet(axes: Axes) -> None:
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)
    axes.tick_params(length=0, colors=SOFT, labelsize=8, pad=3)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def _svg(figure: Figure, label: str) -> str:
    """The figure as one <svg> element: no prolog, no size, ids of its own, colours as CSS variables."""
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    prefix = f"c{next(_numbers)}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', lambda m: f'<svg viewBox="{m[1]}" role="img" aria-label="{_attribute(label)}" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">', text, count=1)  # fmt: skip
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return text.strip()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
