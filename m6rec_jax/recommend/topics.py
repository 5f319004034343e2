"""Interest topics: what the texts of a catalogue are about, and how much of it is in what a user had.

Topics are fitted on item text alone (NMF of TF-IDF, Lee & Seung 1999), so no behaviour leaks into
them and a new item has its topics at once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import polars as pl
import scipy.sparse as sp

from m6rec_jax.data.arrays import read_arrays
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.features import TfidfEncoder, item_texts
from m6rec_jax.errors import InputError
from m6rec_jax.progress import stage

TOPICS, WORDS = 24, 8
COMMON = 0.25  # a word in more than this share of the items tells none of them apart
ROUNDS = 50


@dataclass(frozen=True)
class Topics:
    """K topics: `words[k]` the strongest first, `weights` float32 `[C, K]` of each item, rows that sum to 1, or to 0 for
    an item whose text says nothing."""

    words: list[list[str]]
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def none(cls, catalogue: int) -> Topics:
        return cls([], np.zeros((catalogue, 0), np.float32))


def fit_topics(dataset: Dataset, topics: int = TOPICS, seed: int = 0) -> Topics:
    """Topics of the catalogue of a dataset, at most `topics`; fewer where there are fewer items or words."""
    silent = dataset.items.with_columns(numbers=pl.lit([], dtype=pl.List(pl.String)))  # cheap or dear is no interest
    encoder = TfidfEncoder.from_arrays(read_arrays(dataset.path / "codes.npz"))
    return topics_of(encoder.weigh(item_texts(silent)), encoder.terms, topics, seed)


def topics_of(matrix: sp.csr_array, terms: list[str], topics: int = TOPICS, seed: int = 0) -> Topics:
    """Topics of TF-IDF rows `[C, t]` over `terms`; the same for the same `seed`."""
    catalogue = int(matrix.shape[0])
    found = np.bincount(matrix.indices, minlength=len(terms))
    kept = np.flatnonzero((found > 1) & (found <= max(COMMON * catalogue, 2)))
    matrix = sp.csr_array(matrix[:, kept], dtype=np.float32)
    count = min(topics, len(kept), catalogue)
    if count < 1:
        return Topics.none(catalogue)
    try:
        from sklearn.decomposition import NMF
        from sklearn.exceptions import ConvergenceWarning
    except ImportError:
        raise InputError("topics need the package scikit-learn: pip install 'm6rec-jax[profile]', or ask for 0 topics") from None  # fmt: skip
    model = NMF(count, init="nndsvda", max_iter=ROUNDS, random_state=seed)
    with warnings.catch_warnings(), stage("topics", catalogue, "items") as bar:  # as good as it gets in these rounds
        warnings.simplefilter("ignore", ConvergenceWarning)
        weights = model.fit_transform(matrix).astype(np.float32)
        bar.advance(catalogue)
    # One unit of a topic is one unit of text, whatever the scale that its row of words was left with.
    weights *= model.components_.sum(axis=1).astype(np.float32)
    total = weights.sum(axis=1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    order = np.argsort(-weights.sum(axis=0), kind="stable")  # what the catalogue is most about comes first
    words = [_words([terms[kept[t]] for t in _strongest(model.components_[k])]) for k in order]
    return Topics(words, weights[:, order])


def _strongest(weights: np.ndarray) -> np.ndarray:
    """Places of the terms that make a topic, strongest first."""
    best = np.argsort(-weights, kind="stable")[: 2 * WORDS]
    return best[weights[best] > 0.05 * weights[best[0]]]


def _words(terms: list[str]) -> list[str]:
    """The first `WORDS` terms as people read them: whole fields without their mark, no part of a term beside it."""
    said = list(dict.fromkeys(term.removeprefix("=") for term in terms))
    inside = lambda term, other: term in (other if ord(term[0]) > 0x2E7F else other.split())  # noqa: E731
    whole = [t for t in said if not any(t != other and inside(t, other) for other in said)]
    return [t for t in whole if len(t) > 1 or not t.isascii()][:WORDS]


def user_topics(
    owners: np.ndarray, items: np.ndarray, weights: np.ndarray, item_topics: np.ndarray, users: int
) -> np.ndarray:
    """Topics of each of `users` users float32 `[users, K]`: the sum over events of `weights [n]` times the topics of the
    item, as shares; zeros for who had nothing with a topic. `owners [n]` in 0..users-1."""
    taken = sp.csr_array((weights.astype(np.float32), (owners, items)), (users, len(item_topics)))
    made = taken @ item_topics
    total = made.sum(axis=1, keepdims=True)
    return np.divide(made, total, out=np.zeros_like(made), where=total > 0).astype(np.float32)
