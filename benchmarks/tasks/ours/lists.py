"""Lists of unseen items by other ways than retrieval: decoding the next item, and describing it, then finding what is so."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np

from benchmarks.tasks.nearest import K
from benchmarks.tasks.ours.backbone import backbone
from benchmarks.tasks.problem import SPLITS, Problem
from m6rec_jax.recommend.recommender import Recommender


def decoded(problem: Problem, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, np.ndarray]:
    """Rows of the K items of the catalogue that the model decodes as the next one, `[n, K]`, -1 where there are fewer."""
    recommender = _opened(problem, seed, options)
    made = {}
    for split in SPLITS[1:]:
        histories = [recommender.rows_of(items)[0] for items in _histories(problem, split)]
        rows = recommender.recommend_rows(histories, k=K, engine="model", memory=False, beams=K).rows
        made[split] = _rows(problem, [[recommender.item_ids[row] for row in own if row >= 0] for own in rows.tolist()])
    return made


def described(problem: Problem, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, np.ndarray]:
    """Rows of the K items of the catalogue to which a description of what is wanted next leads (`describe`): `[n, K]`."""
    recommender = _opened(problem, seed, options)
    say = lambda split: recommender.say("describe", _histories(problem, split), k=K, seed=seed)  # noqa: E731
    return {split: _rows(problem, say(split)["items"].to_list()) for split in SPLITS[1:]}


def _opened(problem: Problem, seed: int, options: Namespace) -> Recommender:
    data, run = backbone(problem, options, seed)
    return Recommender.load(run, "latest", data)


def _histories(problem: Problem, split: str) -> list[list[str]]:
    """Ids of what each user chose, oldest first."""
    return [[event["item"] for event in events] for events in problem.part(split)["history"].to_list()]


def _rows(problem: Problem, lists: list[list[str]]) -> np.ndarray:
    assert problem.catalogue is not None
    row_of = {one: i for i, one in enumerate(problem.catalogue["item_id"].to_list())}
    made = np.full((len(lists), K), -1, np.int64)
    for i, own in enumerate(lists):
        made[i, : len(own)] = [row_of[one] for one in own]
    return made
