"""A batch job that costs nothing: what children of a test import, hence little else."""

from __future__ import annotations

import numpy as np
import polars as pl

USERS = [f"用户{i}" for i in range(53)]
JOB = {"model_version": "run@7", "k": 3, "users": "all"}
LINES = 3 * len(USERS)


def recommend(users: list[str]) -> pl.DataFrame:
    """Three lines a user that depend on nobody else."""
    seeds = np.repeat([int(user[2:]) for user in users], 3)
    return pl.DataFrame(
        {
            "rank": [1, 2, 3] * len(users),
            "user_id": np.repeat(users, 3),
            "item_id": [f"i{n}" for n in seeds * 31 % 97],
            "score": 1 / (1 + seeds),
            "source": ["model"] * len(seeds),
            "route": ["history"] * len(seeds),
            "reason": [None] * len(seeds),
            "model_version": ["run@7"] * len(seeds),
        }
    )
