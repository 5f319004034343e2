"""What all charts of our pages share: inline SVG whose colours are the page's own CSS variables (light and dark).

matplotlib draws with marker colours that no palette has; `svg` swaps them for variables.
"""

from __future__ import annotations

import io
import re
from html import escape

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, RULE, ACCENT, ACCENT_SOFT, OTHER, WARN, PAPER = (f"#0{i}0{i}0{i}" for i in range(1, 9))
VARIABLES = {INK: "ink", SOFT: "soft", RULE: "rule", ACCENT: "accent", ACCENT_SOFT: "accent-soft", OTHER: "other", WARN: "warn", PAPER: "card"}  # fmt: skip
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "m6rec", "font.size": 9, "axes.unicode_minus": False}


def quiet(axes: Axes) -> None:
    """One line below, faint lines across, nothing else."""
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)
    axes.tick_params(length=0, colors=SOFT, labelsize=8, pad=3)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as one <svg> element: no prolog, no size, ids that begin with its `name`, colours as CSS variables."""
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    prefix = f"{name}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)
    head = f'role="img" aria-label="{escape(label)}">'
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', lambda m: f'<svg viewBox="{m[1]}" {head}', text, count=1)
    text = text.replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.strip()
