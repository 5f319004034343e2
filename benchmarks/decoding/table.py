"""The rows of the decoding benchmark as a table with ratios, and as a picture: python -m benchmarks.decoding.table"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS
from m6rec_jax.artifacts.charts import PRINT, png, quiet

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "decoding-speed.png"
AGAINST = ("hf", "hf-strong", "cold")
LOOKS = {  # colour, line, marker
    "hf": (PRINT.other, "-", "o"), "hf-strong": (PRINT.warn, "-", "s"), "cold": (PRINT.accent, "-", "o"),
    "warm": (PRINT.accent, "--", "^"), "int8": (PRINT.soft, ":", "d"),
}  # fmt: skip


def best(rows: list[dict[str, Any]]) -> dict[tuple[str, int, int], dict[str, Any]]:
    """The fastest row of each system, batch and beam width, over threads and arithmetic."""
    chosen: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in rows:
        if row["system"] not in LOOKS:
            continue
        at = (row["system"], row["batch"], row["beams"])
        if at not in chosen or row["users_per_s"] > chosen[at]["users_per_s"]:
            chosen[at] = row
    return chosen


def show(rows: list[dict[str, Any]]) -> None:
    """A line a system, batch and beam width, with how many times faster than others it is; then how close prefill is."""
    names = ("batch", "beams", "system", "threads", "dtype", "users/s", "p50 ms", "p95 ms", "peak MB", "valid")
    table = Table(*names, *(f"x {name}" for name in AGAINST), box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)
    chosen = best(rows)
    for (system, batch, beams), row in sorted(chosen.items(), key=lambda pair: (*pair[0][1:], list(LOOKS).index(pair[0][0]))):  # fmt: skip
        figures = [f"{row[name]:,.1f}" for name in ("users_per_s", "p50_ms", "p95_ms")]
        others = [chosen.get((name, batch, beams)) for name in AGAINST]
        ratios = [f"{row['users_per_s'] / other['users_per_s']:.1f}" if other else "" for other in others]
        table.add_row(str(batch), str(beams), system, str(row["threads"]), row["dtype"], *figures,
                      f"{row['peak_mb']:,.0f}", f"{row['valid_rate']:.1%}", *ratios)  # fmt: skip
    Console(width=None if Console().is_terminal else 140).print(table)
    for row in rows:
        if row["system"] == "prefill":
            share = row["prefill_gflops"] / row["peak_gflops"]
            print(
                f"{row['threads']} threads, {row['dtype']}: matrix product {row['peak_gflops']:.0f} GFLOP/s, "
                f"prefill {row['prefill_gflops']:.0f} GFLOP/s ({share:.0%})"
            )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Users a second against beam width, a panel a batch size, a line a system; logarithmic, so that distance is ratio."""
    chosen = best(rows)
    batches = sorted({batch for _, batch, _ in chosen})
    figure = Figure(figsize=(2.6 * max(len(batches), 2), 3.0), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for panel, batch in zip(panels, batches, strict=True):
        quiet(panel, PRINT)
        for system, (colour, line, marker) in LOOKS.items():
            points = sorted((beams, row["users_per_s"]) for (s, b, beams), row in chosen.items() if (s, b) == (system, batch))  # fmt: skip
            if points:
                panel.plot(*zip(*points, strict=True), line, color=colour, marker=marker, ms=4, lw=1.6, label=system)
        panel.set_yscale("log")
        panel.tick_params(which="minor", length=0)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        panel.set_xticks(sorted({beams for _, b, beams in chosen if b == batch}))
        panel.set_title(f"batch {batch}", fontsize=9, color=PRINT.ink, loc="left")
        panel.set_xlabel("beams", fontsize=8, color=PRINT.soft)
    panels[0].set_ylabel("users a second", fontsize=8, color=PRINT.soft)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    catalogue = next(iter(chosen.values()))["catalogue"]
    note = (
        f"6.6 million parameters, prefixes of 201 tokens, 4-token ids of {catalogue:,} items, CPU; every system with the "
        "threads and arithmetic that suit it best. Above is faster."
    )
    png(figure, path, "Constrained beam decoding", note)


def main() -> None:
    rows = json.loads((RESULTS / "decoding.json").read_text(encoding="utf-8"))["rows"]
    show(rows)
    draw(rows, PICTURE)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
