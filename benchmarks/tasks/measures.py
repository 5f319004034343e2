"""What is measured, instance by instance where it can be, so that differences of systems can be resampled in pairs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import f1_score

RESAMPLES = 1000
WORD = re.compile(r"[一-鿿]|[^\W_一-鿿]+(?:'\w+)?")
Measure = Callable[[np.ndarray], float]  # places of instances (with repeats) -> the value over them


def auc(labels: np.ndarray, scores: np.ndarray) -> Measure:
    """Area under the curve of scores [n], 0.5 where a sample has one class alone."""

    def over(at: np.ndarray) -> float:
        liked = labels[at] > 0
        n = int(liked.sum())
        pairs = n * (len(liked) - n)
        return float((rankdata(scores[at])[liked].sum() - n * (n + 1) / 2) / pairs) if pairs else 0.5

    return over


def macro_f1(labels: np.ndarray, guesses: np.ndarray) -> Measure:
    """Mean F1 of the classes that are there."""
    return lambda at: float(f1_score(labels[at], guesses[at], average="macro", zero_division=0))


def mean(values: np.ndarray) -> Measure:
    return lambda at: float(values[at].mean())


def interval(measure: Measure, n: int, seed: int = 0) -> tuple[float, float]:
    """95 % of the measure under resampling of the n instances."""
    rng = np.random.default_rng(seed)
    values = [measure(rng.integers(0, n, n)) for _ in range(RESAMPLES)]
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


Pair = tuple[Sequence[Measure], Sequence[Measure], int]  # ours and theirs, of each seed, over so many instances


def difference(*pairs: Pair, seed: int = 0) -> dict[str, object]:
    """The mean difference of two systems over their seeds (and over data sets, of several pairs), and its 95 %: the same
    resampled instances for both, and for each resampling one seed of either drawn anew, so that seeds count as chance too."""
    rng, points, values = np.random.default_rng(seed), [], np.zeros((len(pairs), RESAMPLES))
    for row, (ours, theirs, n) in zip(values, pairs, strict=True):
        every = np.arange(n)
        points.append(np.mean([m(every) for m in ours]) - np.mean([m(every) for m in theirs]))
        for i in range(RESAMPLES):
            at = rng.integers(0, n, n)
            row[i] = ours[rng.integers(len(ours))](at) - theirs[rng.integers(len(theirs))](at)
    low, high = np.percentile(values.mean(0), (2.5, 97.5))
    return {"difference": float(np.mean(points)), "ci95": [float(low), float(high)]}


def words(text: str) -> list[str]:
    """Words in small letters; every Chinese character is one."""
    return WORD.findall(text.lower())


def bigrams(text: str) -> list[tuple[str, str]]:
    said = words(text)
    return list(pairwise(said))


def rouge_2(written: str, reference: str) -> float:
    """F of common bigrams (Lin 2004), no stemming."""
    a, b = Counter(bigrams(written)), Counter(bigrams(reference))
    common = sum((a & b).values())
    return 2 * common / (sum(a.values()) + sum(b.values())) if common else 0.0


def distinct_2(texts: Sequence[str]) -> float:
    """Different bigrams among all bigrams of a set of texts (Li et al. 2016)."""
    every = [pair for text in texts for pair in bigrams(text)]
    return len(set(every)) / len(every) if every else 0.0


NAME = re.compile(r"\b[A-Z][\w'’]*[a-z][\w'’]*(?:\s+[A-Z][\w'’]*[a-z][\w'’]*)*|\d+")
SENTENCE = re.compile(r"(?:^|[.!?:]\s+|[\"“]\s*)([A-Z][\w'’]*)")


def names(text: str) -> list[str]:
    """Names and numbers that a text mentions: runs of words with a capital, but for one that opens a sentence."""
    opening = {match.start(1) for match in SENTENCE.finditer(text)}
    found = []
    for match in NAME.finditer(text):
        name = match.group()
        if match.start() in opening:
            name = name.split(maxsplit=1)[1] if " " in name else ""
        if name:
            found.append(name)
    return found


def grounded(written: str, source: str) -> bool:
    """Whether every name and number that is written stands in the source: nothing was made up."""
    there = " ".join(words(source))
    return all(f" {' '.join(words(name))} " in f" {there} " for name in names(written))
