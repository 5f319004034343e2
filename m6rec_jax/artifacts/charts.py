"""What all charts of our pages share: inline SVG whose colours are the page's own CSS variables (light and dark).

matplotlib draws with marker colours that no palette has (`PAGE`); `svg` swaps them for variables. What is drawn with
`PRINT`, the colours of a light page, `png` writes as a picture.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m6rec_jax.artifacts.atomic import atomic_path

INK, SOFT, RULE, ACCENT, ACCENT_SOFT, OTHER, WARN, PAPER = (f"#0{i}0{i}0{i}" for i in range(1, 9))
VARIABLES = {INK: "ink", SOFT: "soft", RULE: "rule", ACCENT: "accent", ACCENT_SOFT: "accent-soft", OTHER: "other", WARN: "warn", PAPER: "card"}  # fmt: skip
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "m6rec", "font.size": 9, "axes.unicode_minus": False}


@dataclass(frozen=True)
class Paint:
    """The colours of one medium."""

    ink: str
    soft: str
    rule: str
    accent: str
    accent_soft: str
    other: str
    warn: str
    paper: str


PAGE = Paint(INK, SOFT, RULE, ACCENT, ACCENT_SOFT, OTHER, WARN, PAPER)
PRINT = Paint("#1c1b1a", "#6b6762", "#e6e2dc", "#0f6b5c", "#dcefe9", "#b9b3ab", "#a4481b", "#ffffff")


def quiet(axes: Axes, paint: Paint = PAGE) -> None:
    """One line below, faint lines across, nothing else."""
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(paint.rule)
    axes.tick_params(length=0, colors=paint.soft, labelsize=8, pad=3)
    axes.grid(axis="y", color=paint.rule, linewidth=0.7)
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


def png(figure: Figure, path: Path, title: str, note: str) -> None:
    """The figure (drawn with `PRINT`) as a picture on white, its title and a note above it."""
    width, height = figure.get_size_inches()
    lines = wrap(note, int(15 * width))
    figure.patch.set_facecolor(PRINT.paper)
    figure.text(
        0, 1 + (0.23 + 0.15 * len(lines)) / height, title, color=PRINT.ink, fontsize=11, weight="bold", va="bottom"
    )
    figure.text(0, 1 + 0.17 / height, "\n".join(lines), color=PRINT.soft, fontsize=8, va="bottom")
    with atomic_path(path) as partial:
        figure.savefig(
            partial, format="png", dpi=200, bbox_inches="tight", pad_inches=0.25, metadata={"Software": None}
        )
