"""Small tables in the shape of public ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def films_folder(folder: Path) -> Path:
    """Rows of films as TALLRec has them: twelve users of six rows each, who like what is even."""
    rng = np.random.default_rng(0)
    (folder / "tallrec").mkdir()
    for part in ("valid", "test"):
        rows = []
        for _ in range(12):
            events = rng.permutation(40)[:12].tolist()
            for at in range(6, 12):
                liked, disliked = ([f'"Film {n}"' for n in events[:at] if n % 2 == odd] for odd in (0, 1))
                says = f"User Preference: {', '.join(liked)}\nUser Unpreference: {', '.join(disliked)}\n"
                says += f'Whether the user will like the target movie "Film {events[at]}"?'
                rows.append({"input": says, "output": "No." if events[at] % 2 else "Yes."})
        (folder / "tallrec" / f"movie_{part}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder
