"""Where measurements go: metrics.jsonl and TensorBoard, one row a logged step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from m6rec_jax.artifacts.atomic import write_text

FILE = "metrics.jsonl"


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
