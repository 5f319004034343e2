"""Peers that the project's own environment holds: counts, the library `implicit`, and EASE.

Each is `fit(task) -> rank`, see `task.Rank`.
"""

from __future__ import annotations

import warnings

import numpy as np
import scipy.sparse as sp
from implicit.als import AlternatingLeastSquares
from implicit.bpr import BayesianPersonalizedRanking

from benchmarks.peers.task import Rank, Task, ranked
from m6rec_jax.recommend.baselines import ItemKNN, Popularity
from m6rec_jax.recommend.metrics import flatten


def popularity(task: Task) -> Rank:
    """Items by training events."""
    order = _popularity(task)
    return lambda: order.rank(task.histories, task.k)


def item_knn(task: Task) -> Rank:
    """Cosine of TF-IDF weighted users, `neighbours` an item."""
    model = ItemKNN(counts(task), _popularity(task), **task.settings)
    return lambda: model.rank(task.histories, task.k)


def als(task: Task) -> Rank:
    """Weighted matrix factorisation (Hu, Koren and Volinsky 2008). A user is folded in from the history."""
    model = AlternatingLeastSquares(**task.settings, random_state=task.seed, num_threads=1)
    _fit(model, counts(task))
    had = history_matrix(task)

    def rank() -> np.ndarray:
        factors = model.recalculate_user(np.arange(len(task.users)), had)
        return ranked(lambda part: factors[part] @ model.item_factors.T, task)

    return rank


def bpr(task: Task) -> Rank:
    """Bayesian personalised ranking (Rendle et al. 2009). It knows no user without training events: -1."""
    # One thread: several write to the same factors without locks, and no two runs would agree.
    model = BayesianPersonalizedRanking(**task.settings, random_state=task.seed, num_threads=1)
    _fit(model, counts(task))

    def rank() -> np.ndarray:
        rows = ranked(lambda part: model.user_factors[task.users[part]] @ model.item_factors.T, task)
        return np.where(task.cold[:, None], -1, rows)

    return rank


def ease(task: Task) -> Rank:
    """EASE (Steck 2019): the item-item matrix `[C,C]` of zero diagonal that best rebuilds the users, in closed form."""
    binary = counts(task)
    binary.data[:] = 1
    gram = (binary.T @ binary).toarray() + task.settings["penalty"] * np.eye(task.catalogue)
    inverse = np.linalg.inv(gram)
    weights = (-inverse / np.diag(inverse)).astype(np.float32)
    np.fill_diagonal(weights, 0)
    had = history_matrix(task)
    return lambda: ranked(lambda part: had[part] @ weights, task)


def counts(task: Task) -> sp.csr_matrix:
    """Training events counted, CSR float32 `[users, C]`."""
    ones = np.ones(len(task.item), np.float32)
    return sp.csr_matrix((ones, (task.user, task.item)), (task.user_count, task.catalogue))


def history_matrix(task: Task) -> sp.csr_matrix:
    """Histories as 0 and 1, CSR float32 `[U,C]`."""
    items, owner = flatten(task.histories)
    matrix = sp.csr_matrix((np.ones(len(items), np.float32), (owner, items)), (len(task.users), task.catalogue))
    matrix.data[:] = 1
    return matrix


def _popularity(task: Task) -> Popularity:
    return Popularity(np.bincount(task.item, minlength=task.catalogue))


def _fit(model: AlternatingLeastSquares | BayesianPersonalizedRanking, table: sp.csr_matrix) -> None:
    with warnings.catch_warnings():  # implicit advises on threads of BLAS, which are the caller's to set
        warnings.simplefilter("ignore")
        model.fit(table, show_progress=False)
