"""Items with several spellings: lists, ranks, log-probabilities and steps against an engine to which each spelling is an
item of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec_jax.decoding.engine import Engine
from m6rec_jax.errors import InputError
from tests.decoding.worlds import CATALOGUE, world

ITEMS, K = 40, 7
USERS = 8


@dataclass(frozen=True)
class Spelled:
    """An engine of 40 items, and one of their 90 spellings: of both, rows 0..39 are the canonical ones."""

    engine: Engine
    flat: Engine
    item: np.ndarray  # of each spelling
    histories: list[np.ndarray]

    def best(self, scores: np.ndarray) -> np.ndarray:
        """Scores of spellings `[U, N]` as those of items `[U, C]`."""
        made = np.full((len(scores), ITEMS), -np.inf)
        np.maximum.at(made, (slice(None), self.item), scores)
        return made

    def reference(self, memory, exclude, allowed, **asked) -> np.ndarray:
        """Score of each item `[U, C]`; -inf where it must not be shown."""
        gone = [np.flatnonzero(np.isin(self.item, rows)) for rows in exclude]
        found = self.flat.recommend(
            self.histories, memory=memory, exclude=gone, allowed=allowed[self.item], k=CATALOGUE, beams=CATALOGUE, **asked
        )  # fmt: skip
        scores = np.full((USERS, CATALOGUE), -np.inf)
        for one, rows, found_scores in zip(scores, found.rows, found.scores, strict=True):
            one[rows[rows >= 0]] = found_scores[rows >= 0]
        return self.best(scores)


@cache
def spelled() -> Spelled:
    w = world(3, layers=1)
    flat, more = w.engine, np.random.default_rng(11).integers(0, ITEMS, CATALOGUE - ITEMS)
    more[:4] = 3  # one item with at least five spellings
    content, seen = (np.asarray(x)[:ITEMS] for x in (flat.items.content, flat.items.seen))
    engine = Engine(w.model, flat.codes[:ITEMS], content, seen, spellings=(more, flat.codes[ITEMS:]), length=48)
    return Spelled(engine, flat, np.append(np.arange(ITEMS), more), [h % ITEMS for h in w.histories])


def asked(seed: int, share: float = 0.6) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "memory": (rng.integers(-1, ITEMS, (USERS, 6)).astype(np.int32), rng.random((USERS, 6)).astype(np.float32)),
        "gate": rng.uniform(0, 0.9, USERS).astype(np.float32),
        "exclude": [rng.integers(0, ITEMS, n) for n in rng.integers(0, 9, USERS)],
        "allowed": rng.random(ITEMS) < share,
        "temperature": rng.uniform(0.5, 2, USERS).astype(np.float32),
    }


@pytest.mark.parametrize("normalise", ["level", "vocab", "children"])
def test_lists_are_those_of_the_best_spelling_of_each_item(normalise):
    w, request = spelled(), asked(0)
    expected = w.reference(**request, normalise=normalise)
    found = w.engine.recommend(w.histories, k=ITEMS, beams=CATALOGUE, normalise=normalise, **request)
    assert found.exact.all()
    for rows, scores, each in zip(found.rows, found.scores, expected, strict=True):
        best = np.argsort(-each, kind="stable")[: np.isfinite(each).sum()]
        assert rows.tolist() == [*best, *[-1] * (ITEMS - len(best))]
        np.testing.assert_allclose(scores[: len(best)], each[best], atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.05, 0.3, 1.0]), k=st.sampled_from([1, 3]))
def test_narrow_lists_are_full_without_repeats_and_certified_only_when_right(seed, share, k):
    w, request = spelled(), asked(seed, share)
    expected = w.reference(**request)
    found = w.engine.recommend(w.histories, k=k, beams=1, **request)
    for u, rows in enumerate(found.rows):
        items = rows[rows >= 0]
        assert len(set(items.tolist())) == len(items) == min(k, np.isfinite(expected[u]).sum())
        assert np.isfinite(expected[u, items]).all()
        assert (found.scores[u, : len(items)] <= expected[u, items] + 1e-4).all()
        if found.exact[u]:
            np.testing.assert_allclose(found.scores[u], np.sort(expected[u])[::-1][:k], atol=1e-4)
            np.testing.assert_allclose(found.scores[u, : len(items)], expected[u, items], atol=1e-4)


def test_ranks_log_probabilities_and_steps_say_what_lists_say():
    w, request = spelled(), asked(1)
    own = [np.random.default_rng(u).permutation(ITEMS)[: 12 + u] for u in range(USERS)]
    shared = {name: request[name] for name in ("memory", "gate", "temperature")}
    ranked = w.engine.rank(w.histories, own, **shared)
    others = [np.setdiff1d(np.arange(ITEMS), rows) for rows in own]
    listed = w.engine.recommend(w.histories, exclude=others, k=ITEMS, beams=CATALOGUE, **shared).cut(12 + USERS - 1)
    assert ranked.rows.tolist() == listed.rows.tolist()
    for name in ("scores", "model_logp", "memory_logp"):
        np.testing.assert_allclose(getattr(ranked, name), getattr(listed, name), atol=1e-4)

    every, heats = [np.arange(ITEMS)] * USERS, request["temperature"]
    each = w.flat.logp(w.histories, [np.arange(CATALOGUE)] * USERS, temperature=heats)
    logp = np.stack(w.engine.logp(w.histories, every, temperature=heats))
    np.testing.assert_allclose(logp, w.best(np.stack(each)), atol=1e-4)
    lists = w.engine.recommend(w.histories, k=ITEMS, beams=CATALOGUE, temperature=heats, memory=request["memory"])
    np.testing.assert_allclose(np.take_along_axis(logp, lists.rows, axis=1), lists.model_logp, atol=1e-4)
    targets, users = w.item[ITEMS : ITEMS + USERS], np.arange(USERS)
    own = w.engine.score(w.histories, targets, temperatures=heats)[users, users]
    np.testing.assert_allclose(own, logp[users, targets], atol=1e-4)

    gone = [np.array([3]), *[np.zeros(0, int)] * (USERS - 1)]  # all its spellings
    lists = lists.cut(K)
    steps = w.engine.steps(w.histories, lists.rows, temperature=heats, exclude=gone)
    np.testing.assert_allclose(steps.logp.sum(2), lists.model_logp, atol=1e-4)
    place = {tuple(code): n for n, code in enumerate(w.flat.codes.tolist())}
    spelling = np.array([[place[tuple(code)] for code in user] for user in steps.codes.tolist()])
    assert (w.item[spelling] == lists.rows).all() and (spelling >= ITEMS).any()
    without = np.unique(w.flat.codes[w.item != 3, 0])
    assert (steps.choices[0, :, 0] == len(without)).all()
    alone = w.engine.steps(w.histories[:1], np.array([[3]]), candidates=[np.array([3])])
    assert alone.choices[0, 0, 0] == len(np.unique(w.flat.codes[w.item == 3, 0])) > 1


def test_spellings_that_cannot_be_are_refused():
    w = spelled()

    def make(rows, codes):
        flat = w.flat
        return Engine(world(3, layers=1).model, flat.codes[:ITEMS], np.zeros((ITEMS, 5)), np.ones(ITEMS, bool), spellings=(rows, codes))  # fmt: skip

    with pytest.raises(ValueError, match="rows 5 and 7 are both spelled|rows 7 and 5 are both spelled"):
        make(np.array([7]), w.flat.codes[[5]])
    with pytest.raises(ValueError, match=r"row 5 is spelled .* twice"):
        make(np.array([5]), w.flat.codes[[5]])
    with pytest.raises(InputError, match=r"spellings: rows \[1\] for codes \[2, 3\]"):
        make(np.array([1]), w.flat.codes[50:52])
    with pytest.raises(InputError, match=r"one row of 0\.\.39"):
        make(np.array([40]), w.flat.codes[[50]])
    with pytest.raises(InputError, match="code levels"):
        make(np.array([1]), w.flat.codes[[50], :2])
    one = world(1)
    with pytest.raises(InputError, match="one code level"):
        Engine(one.model, one.engine.codes[:ITEMS], np.zeros((CATALOGUE, 5)), np.ones(CATALOGUE, bool), spellings=(np.array([1]), one.engine.codes[[50]]))  # fmt: skip
