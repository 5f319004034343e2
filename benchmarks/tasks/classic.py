"""Baselines that score: logistic regression on TF-IDF of the same text, boosted trees on counts, DIN on ids."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from benchmarks.peers.environments import environment, run
from benchmarks.tasks.problem import SPLITS, Problem

# Pinned is what decides the numbers, as in benchmarks.peers.
DIN_PACKAGES = ("torch-rechub==0.9.0", "torch==2.13.0", "numpy==2.5.5", "scikit-learn==1.9.1")
DIN_SCRIPT = Path(__file__).with_name("with_rechub.py")


def logreg(problem: Problem, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, np.ndarray]:
    """Logistic regression on TF-IDF of what the model reads: words and runs of up to `n` of them, or characters, and one
    more of them, where there are no spaces between words."""
    chars = problem.wording.language == "zh"
    reader = TfidfVectorizer(
        analyzer="char" if chars else "word", ngram_range=(1, settings.get("n", 2) + chars), sublinear_tf=True, min_df=2,
        token_pattern=r"(?u)\b\w+\b" if not chars else None,
    )  # fmt: skip
    learnt = problem.learnt(settings.get("past", False))
    seen = reader.fit_transform(problem.told(learnt))
    model = LogisticRegression(C=settings["C"], max_iter=2000, random_state=seed)
    model.fit(seen, learnt["label"].to_numpy())
    return {split: _all_classes(model, reader.transform(problem.texts(split)), problem) for split in SPLITS[1:]}


def gbdt(problem: Problem, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, np.ndarray]:
    """Histogram gradient boosting on the counts of the problem."""
    learnt, counts = problem.learnt(settings["past"]), lambda rows: rows.select(problem.numbers).to_numpy().astype(float)  # fmt: skip
    model = HistGradientBoostingClassifier(
        max_leaf_nodes=settings["max_leaf_nodes"], learning_rate=0.1, max_iter=100, early_stopping=False, max_features=0.7,
        random_state=seed,
    )  # fmt: skip
    model.fit(counts(learnt), learnt["label"].to_numpy())
    return {split: _all_classes(model, counts(problem.part(split)), problem) for split in SPLITS[1:]}


def _all_classes(model: Any, features: Any, problem: Problem) -> np.ndarray:
    """Probabilities [n, C] in the order of the options; 0 for a class that training had not."""
    made = np.zeros((features.shape[0], max(len(problem.options), 2)), np.float32)
    made[:, model.classes_] = model.predict_proba(features)
    return made


def din(problem: Problem, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, np.ndarray]:
    """Deep Interest Network (Zhou et al. 2018) of torch-rechub: ids of liked and disliked items with attention to the item
    that is asked for, and every count in ten bins as a sparse feature. Validation AUC says when to stop."""
    made = environment("rechub", DIN_PACKAGES, options.work / "envs", options.python)
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "asked.npz", Path(folder) / "answered.npz"
        np.savez(
            asked,
            **din_arrays(problem, settings["past"]),
            width=16,
            seed=seed,
            **{f"set_{k}": v for k, v in settings.items()},
        )
        run("DIN", [str(made), str(DIN_SCRIPT), str(asked), str(answered)], folder)
        with np.load(answered, allow_pickle=False) as file:
            return {split: np.stack([1 - file[split], file[split]], 1) for split in SPLITS[1:]}


def din_arrays(problem: Problem, past: bool = False, length: int = 12) -> dict[str, np.ndarray]:
    """Items [n], histories [n, 2 * length] (liked, then disliked; 0 = none), sparse counts [n, f] and labels, by split."""
    numbers: dict[str, int] = {}
    parts = {split: problem.learnt(past) if split == "train" else problem.part(split) for split in SPLITS}
    for row in parts["train"].iter_rows(named=True):  # an item that training has not is 1, an unknown one
        for item in (*(event["item"] for event in row["history"]), row["item_id"]):
            numbers.setdefault(item, len(numbers) + 2)
    edges = {name: np.unique(np.quantile(parts["train"][name].to_numpy(), np.linspace(0, 1, 11)[1:-1])) for name in problem.numbers}  # fmt: skip
    made: dict[str, np.ndarray] = {"items": np.array(len(numbers) + 2)}
    for split in SPLITS:
        part = parts[split]
        liked, disliked = (np.zeros((part.height, length), np.int64) for _ in range(2))
        for i, events in enumerate(part["history"].to_list()):
            for table, action in ((liked, "Liked"), (disliked, "Disliked")):
                own = [numbers.get(event["item"], 1) for event in events if event["action"] == action][-length:]
                table[i, : len(own)] = own
        made |= {
            f"{split}_asked": np.array([numbers.get(one, 1) for one in part["item_id"].to_list()]),
            f"{split}_liked": liked,
            f"{split}_disliked": disliked,
            f"{split}_counts": np.stack([np.searchsorted(edges[name], part[name].to_numpy(), side="right") for name in problem.numbers], 1),
            f"{split}_label": part["label"].to_numpy(),
        }  # fmt: skip
    return made
