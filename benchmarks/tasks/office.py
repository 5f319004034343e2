"""Amazon Office, two statements to choose from: is the true next item more plausible than one drawn at random?

Nothing is learnt from it: a model of other tables is asked (zero-shot).
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.tasks.problem import Problem


def read(folder: Path) -> Problem | None:
    """The problem: two rows a pair, the true one (label 1) and one with a uniform negative; None without the files."""
    files = [folder / "office" / name for name in ("items.json", "test.csv")]
    if not all(file.is_file() for file in files):
        return None
    items = json.loads(files[0].read_text(encoding="utf-8"))
    raw = pl.read_csv(files[1])
    rng, ids, rows = np.random.default_rng(0), list(items), []
    for user, history, item in raw.select("user_id", "history_item_id", "item_id").iter_rows():
        seen = [str(one) for one in ast.literal_eval(history)]
        other = next(one for one in (ids[i] for i in rng.integers(0, len(ids), 99)) if one not in (*seen, str(item)))
        for label, one in ((1, str(item)), (0, other)):
            rows.append({"split": "test", "user_id": user, "item_id": one, "label": label, "first": items[seen[-1]]["title"], "item": items[one]["title"]})  # fmt: skip

    def none() -> dict:
        raise AssertionError("nothing is learnt from Office")

    return Problem("office", "plausibility", "auc", "plausible", pl.DataFrame(rows), none)
