"""What an evaluation says in words: the names of systems, how it was measured, how it ended against the counting floor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from m6rec_jax.data.dataset import Dataset
from m6rec_jax.recommend.baselines import listed_of
from m6rec_jax.recommend.histories import Histories

NAMES = {
    "popularity": "Popularity",
    "item_knn": "Item-kNN",
    "counting_floor": "Counting floor",
    "model_alone": "Model alone",
    "model": "Model with memory",
}
CONVENTIONS = {
    "NDCG@k": "1/log2(rank + 1) when the target is among the first k, else 0; mean over users; one target, so the ideal is 1",
    "Recall@k": "share of users whose target is among the first k (the hit rate)",
    "Precision@k": "hits among the first k divided by k, the same number as accuracy@k; F1@k is its harmonic mean with recall",
    "MRR@k": "1/rank of the target, 0 beyond k; with one target MAP@k is the same number",
    "Coverage": "share of the catalogue (of its categories, of its types) that stands in at least one user's first 10",
    "Novelty": "mean of -log2(users who had the item in training / users) / log2(users): 0 = everybody had it, 1 = one user or nobody",
    "Diversity": "mean over the pairs of a list of 1 - cosine of their content vectors (at least 0): 0 = the same text, 1 = no word in common",
    "Serendipity": "mean over the list of how much higher a hit stands than its popularity alone would place it, 0 for what is no hit",
    "Recent": "share of list places that go to the newest items: those dated in the last tenth of the catalogue",
    "Gini": "how unevenly items are shown: 0 = all alike, near 1 = always the same few",
    "Popularity lift": "how much more popular the lists are than the users' own histories",
    "Satisfaction": "mean value (rating, dwell time) that users themselves gave the hits, with the share of hits that have one; only where events carry values",
    "Calibration": "chance given to the items of the lists against the share that were hits, in 10 bins of equal size; ECE is their mean distance; GAUC weights users by list places",
}


def systems(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every measured system, the served one first: key, name, metrics, 95 % intervals, whether it is ours."""
    intervals = evaluation.get("intervals", {})
    listed: list[dict[str, Any]] = [
        {"key": "model", "metrics": evaluation["metrics"], "ci95": evaluation.get("ci95", {}), "own": True},
        {"key": "model_alone", "metrics": evaluation.get("model_alone"), "ci95": intervals.get("model_alone", {}), "own": True},
        *(
            {"key": key, "metrics": metrics, "ci95": intervals.get(key, {}), "own": False}
            for key, metrics in reversed(evaluation.get("baselines", {}).items())
        ),
    ]  # fmt: skip
    more = evaluation.get("beyond", {})  # what is no fraction
    return [
        {**one, "name": NAMES.get(one["key"], one["key"]), "metrics": {**one["metrics"], **more.get(one["key"], {})}}
        for one in listed
        if one["metrics"]
    ]


def protocol(dataset: Dataset, split: str, users: int) -> str:
    """How the numbers came about, in words."""
    rule = dataset.manifest["split"]
    rule = rule if isinstance(rule, str) else rule["rule"]
    held = {
        "leave-one-out": "leave-one-out, full ranking: of each user with 3 events or more the last is the test target, "
        "the one before it the validation target, the rest trains",
        "global-time": "global temporal split, full ranking: two points in time cut train, validation and test for all "
        "users at once; the target is a user's first event after the cut",
        "ratio": "ratio split, full ranking: the last shares of each user's events are validation and test; the target "
        "is the first event of the share",
    }[rule]
    between = " The history includes validation events, but nothing learns from them." if split == "test" else ""
    fitted = " (so on this split the gate has seen the targets)" if split == "valid" else ""
    repeat = "history items may come again" if dataset.repeat else "items of the history removed"
    listed = listed_of(dataset.items)
    offer = f"The whole catalogue of {dataset.catalogue:,} items is"
    if listed is not None:
        offer = f"All {int(listed.sum()):,} listed items of a catalogue of {dataset.catalogue:,} are"
    return (
        f"{held[0].upper()}{held[1:]}. {users:,} users.{between} Parameters, tokenizer, memory and baselines hold "
        f"training events only; the memory's gate alone is fitted on validation targets{fitted}. "
        f"{offer} ranked, {repeat}; rank = position in the list that the system returns."
    )


def ties(dataset: Dataset, asked: Histories) -> str:
    """What simultaneous events do to these targets, in words."""
    kept = "Events with the same time keep the row order of the source"
    if not dataset.timed:
        return f"{kept}; this source gives an order, no times."
    same = [len(t) > 0 and t[-1] == target for t, target in zip(asked.times, asked.target_times, strict=True)]
    return f"{kept}; {100 * float(np.mean(same)):.0f} % of the targets share their time with the event before them, and another order would move every number here."  # fmt: skip


def verdict(scores: Mapping[str, Mapping[str, float]], against: Mapping[str, Any]) -> dict[str, Any]:
    """One honest sentence about the counting floor, and whether the served lists pass it."""
    ours, floor, alone = (scores[name]["ndcg@10"] for name in ("model", "counting_floor", "model_alone"))
    sure = against["p"] < 0.05
    above = ours > floor
    if above:
        word = f"above the counting floor ({floor:.4f})" + ("" if sure else ", though the difference is within chance")
    else:
        word = f"below the counting floor ({floor:.4f}): plain transition counts, without any learning, do better" if sure else f"not above the counting floor ({floor:.4f}); the difference is within chance"  # fmt: skip
    side = "above" if alone > floor else "below"
    return {
        "above_floor": bool(above),
        "verdict": f"NDCG@10 {ours:.4f} with memory is {word}. The model alone reaches {alone:.4f}, {side} the floor.",
    }
