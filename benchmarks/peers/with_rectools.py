"""SASRec (Kang and McAuley 2018) as RecTools has it, run by an environment that has it: with_rectools.py TASK ANSWER"""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pandas as pd
import pytorch_lightning
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from task import Rank, Task, answer


def sasrec(task: Task) -> Rank:
    """Trained on the training events; lists are asked for with the histories, from which nothing is learned.

    It knows no item without training events, and no user whose history holds only such items: -1.
    """
    pytorch_lightning.seed_everything(task.seed)
    # Every row is padded to the longest that may be: beyond what all but 1 % of users have, that only costs time.
    usual = int(np.percentile([len(s) for s in task.sequences], 99))
    settings = task.settings | {"session_max_len": min(task.settings["session_max_len"], usual)}
    model = SASRecModel(**settings, loss="softmax", deterministic=True)
    model.fit(_dataset(task.user, task.item))

    def rank() -> np.ndarray:
        places = np.arange(len(task.histories))
        owner = np.repeat(places, [len(h) for h in task.histories])
        asked = _dataset(owner, np.concatenate(task.histories))
        lists = model.recommend(places, asked, k=task.k, filter_viewed=True, on_unsupported_targets="ignore")
        rows = np.full((len(places), task.k), -1, np.int32)
        rows[lists[Columns.User], lists[Columns.Rank] - 1] = lists[Columns.Item]
        return rows

    return rank


def _dataset(user: np.ndarray, item: np.ndarray) -> Dataset:
    # RecTools sorts by time; places in the task stand for times, so that ties keep the order of the source.
    times = pd.to_datetime(np.arange(len(item)), unit="s")
    table = {Columns.User: user, Columns.Item: item, Columns.Weight: 1.0, Columns.Datetime: times}
    return Dataset.construct(pd.DataFrame(table))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    answer(sasrec)
