"""LightFM (Kula 2015) with its WARP loss, run by an environment that has it: with_lightfm.py TASK.npz ANSWER.npz"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from lightfm import LightFM
from task import Rank, Task, answer, ranked


def warp(task: Task) -> Rank:
    """Factors of users and items and biases of items. It knows no user without training events: -1."""
    settings = dict(task.settings)
    epochs = settings.pop("epochs")
    pairs = np.unique(np.stack([task.user, task.item]), axis=1)
    shape = (task.user_count, task.catalogue)
    model = LightFM(**settings, random_state=task.seed)
    model.fit(sp.coo_matrix((np.ones(pairs.shape[1], np.float32), pairs), shape), epochs=epochs, num_threads=1)

    def rank() -> np.ndarray:
        _, users = model.get_user_representations()
        bias, items = model.get_item_representations()
        rows = ranked(lambda part: users[task.users[part]] @ items.T + bias, task)
        return np.where(task.cold[:, None], -1, rows)

    return rank


if __name__ == "__main__":
    answer(warp)
