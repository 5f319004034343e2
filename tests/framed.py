"""Instances as text tasks lay them out: `<s> <source> part <sep> part ... </source> <target> words </target>`."""

import numpy as np

from m6rec_jax.data.examples import Sequence
from m6rec_jax.vocab import BOS, END_SOURCE, END_TARGET, SEP, SOURCE, SPECIALS, TARGET

WORDS = 60  # text ids behind the specials


def words(rng, n):
    return rng.integers(len(SPECIALS), len(SPECIALS) + WORDS, n).tolist()


def framed(parts, request):
    """Token ids of one instance from its parts and the request, lists of ids each."""
    body = [token for part in parts for token in (SEP, *part)][1:]
    return np.array([BOS, SOURCE, *body, END_SOURCE, TARGET, *request, END_TARGET], np.int32)


def instance(rng, parts, most=6):
    return framed([words(rng, rng.integers(1, most)) for _ in range(parts)], words(rng, rng.integers(1, most)))


def request_order(tokens):
    """0 before the last `<target>`, then counting up: how instances with options are trained."""
    first = np.flatnonzero(tokens == TARGET)[-1]
    return np.maximum(np.arange(len(tokens)) - first + 1, 0).astype(np.int32)


def sequence(tokens, answer=0, order=None):
    """One example whose last token predicts `answer`, the request read left to right unless an order is given."""
    n = len(tokens)
    targets, weights = np.zeros(n, np.int32), np.zeros(n, np.float32)
    targets[-1], weights[-1] = answer, 1.0
    order = request_order(tokens) if order is None else order
    return Sequence(tokens, targets, order, weights, np.full(n, -1, np.int32))
