"""Where measurements go: metrics.jsonl and TensorBoard, one row a logged step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from m6rec_jax.artifacts.atomic import write_text

FILE = "metrics.jsonl"
Labels = Sequence[tuple[str, ...]]  # the names that each pool is measured under, see `data.domains.labels`


def by_label(labels: Labels, *sums: np.ndarray) -> list[tuple[Any, ...]]:
    """`(name, sum, ...)` for each name: sums `[pools]` added up over the pools that carry it, names in order of rank."""
    names = dict.fromkeys(name for rank in range(max(map(len, labels), default=0)) for some in labels for name in some[rank : rank + 1])  # fmt: skip
    under = {name: [i for i, some in enumerate(labels) if name in some] for name in names}
    return [(name, *(float(x[places].sum()) for x in sums)) for name, places in under.items()]


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The logged rows of a run; a last line cut off by a crash is left out."""
    path, rows = run / FILE, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class MetricsLog:
    """Appends rows; when a run is taken up again at `step`, rows after it are dropped, for they come again."""

    def __init__(self, run: Path, step: int):
        kept = [row for row in read_rows(run) if row["step"] <= step]
        write_text(run / FILE, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(run / FILE, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, row: dict[str, Any]) -> None:
        """One row `{"step": n, name: number, ...}`."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()
