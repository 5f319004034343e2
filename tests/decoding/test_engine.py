"""The public engine over a real (tiny, random) model."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec_jax.decoding import programs
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.decoding.prompts import Prompts
from m6rec_jax.errors import InputError
from m6rec_jax.model.transformer import causal
from m6rec_jax.vocab import BOS
from tests.decoding.worlds import CATALOGUE, World, world

K, BEAMS = 7, 2  # fewer beams than k count as k


def reference(w: World, histories, memory=None, gate=None, exclude=None, allowed=None, temperature=1.0) -> np.ndarray:
    """Mixed score of every item by full forwards `[U, C]`; -inf where it must not be shown."""
    scores = []
    for u, history in enumerate(histories):
        shown = np.ones(CATALOGUE, bool) if allowed is None else allowed.copy()
        if exclude is not None:
            shown[exclude[u]] = False
        mass = np.zeros(CATALOGUE)
        if memory is not None:
            rows, given = memory[0][u], memory[1][u]
            np.add.at(mass, rows[rows >= 0], given[rows >= 0])
        mass *= shown
        g = gate[u] if gate is not None and mass.sum() > 0 else 0.0
        with np.errstate(divide="ignore"):
            mixed = np.logaddexp(
                np.log1p(-g) + w.logp(history, temperature), np.log(g) + np.log(mass / max(mass.sum(), 1e-30))
            )
        scores.append(np.where(shown, mixed, -np.inf))
    return np.stack(scores)


def requests(w: World, seed: int = 0) -> dict:
    """Memory, gates, exclusions and a filter for the histories of a world."""
    rng = np.random.default_rng(seed)
    users = len(w.histories)
    mass = rng.random((users, 12)).astype(np.float32)
    mass[2] = 0
    return {
        "memory": (rng.integers(-1, CATALOGUE, (users, 12)).astype(np.int32), mass),
        "gate": rng.uniform(0.05, 0.9, users).astype(np.float32),
        "exclude": [np.append(h, rng.integers(CATALOGUE, size=3)).astype(np.int32) for h in w.histories],
        "allowed": rng.random(CATALOGUE) < 0.5,
    }


def same(found, expected: np.ndarray) -> None:
    """The lists are the brute-force top K: same items, same order, same scores."""
    for u, row in enumerate(found.rows):
        best = np.argsort(-expected[u], kind="stable")[:K]
        assert row.tolist() == best.tolist()
        np.testing.assert_allclose(found.scores[u], expected[u, best], atol=1e-4)


@pytest.mark.parametrize("parts", [(), ("memory", "gate"), ("memory", "gate", "temperature"), ("exclude",), ("allowed",), ("memory", "gate", "exclude", "allowed")],
                         ids=lambda p: "+".join(p) or "model")  # fmt: skip
def test_lists_equal_brute_force(any_world, parts):
    asked = {name: part for name, part in (requests(any_world) | {"temperature": 1.7}).items() if name in parts}
    found = any_world.engine.recommend(any_world.histories, k=K, beams=CATALOGUE, **asked)
    same(found, reference(any_world, any_world.histories, **asked))
    assert found.exact.all()


def test_log_probabilities_equal_the_full_forward(any_world):
    w = any_world
    found = w.engine.recommend(w.histories, k=K, beams=BEAMS, **requests(w))
    for place in range(K):
        np.testing.assert_allclose(
            found.model_logp[:, place], w.engine.score(w.histories, found.rows[:, place]), atol=1e-4
        )
    total = np.exp(w.logp(w.histories[3])).sum()
    assert total == pytest.approx(1, abs=1e-5) if w.engine.trie.levels == 1 else total < 1


def test_a_temperature_divides_the_logits_of_each_level():
    w, heats = world(1), (1.0, 0.5, 3.0)
    history = w.histories[3]
    logp = w.engine.score([history] * CATALOGUE, np.arange(CATALOGUE), temperatures=heats)
    for at, heat in enumerate(heats):
        divided = w.logp(history).astype(np.float64) / heat
        np.testing.assert_allclose(logp[:, at], divided - np.logaddexp.reduce(divided), atol=1e-4)


def test_narrow_beams_are_certified_only_when_right(deep):
    expected = np.sort(reference(deep, deep.histories), axis=1)[:, ::-1]
    certified = 0
    for k, beams in ((1, 4), (K, BEAMS)):
        found = deep.engine.recommend(deep.histories, k=k, beams=beams)
        for u in np.flatnonzero(found.exact):
            np.testing.assert_allclose(found.scores[u], expected[u, :k], atol=1e-4)
            certified += 1
        wrong = np.abs(found.scores - expected[:, :k]).max(1) > 1e-4
        assert not (wrong & found.exact).any()
    assert 0 < certified < 2 * len(deep.histories)


@pytest.mark.parametrize("normalise", ["vocab", "children"])
def test_what_codes_are_normalised_over(any_world, normalise):
    """All ids: what a softmax over the whole vocabulary gives. What may be shown: lists that sum to 1."""
    w, histories = any_world, any_world.histories[2:5]
    allowed, heat = np.random.default_rng(5).random(CATALOGUE) < 0.3, 1.7
    found = w.engine.recommend(histories, k=CATALOGUE, allowed=allowed, normalise=normalise, temperature=heat)
    shown = np.sort(found.rows, axis=1)[:, -allowed.sum() :]
    assert (shown == np.flatnonzero(allowed)).all() and found.exact.all()
    if normalise == "children":
        np.testing.assert_allclose(np.exp(found.scores).sum(1), 1, atol=1e-5)
        return
    [(prefix, rows)] = w.engine.prompts(histories[:1])
    for place in (0, 3, int(allowed.sum()) - 1):
        spelled = w.engine.vocab.spell(w.engine.codes[found.rows[0, place]])
        tokens, n = np.append(prefix, spelled), len(prefix)
        hidden = w.model.hidden(tokens[None], np.append(rows, np.full(len(spelled), -1))[None], causal((1, len(tokens)), np.array([len(tokens)])), w.engine.items)  # fmt: skip
        every = np.concatenate([np.asarray(w.model.logits(hidden[0, n - 1 : -1], s, w.engine.items)) for s in range(len(w.engine.vocab.slices))], axis=-1) / heat  # fmt: skip
        logp = every - np.logaddexp.reduce(every, axis=-1, keepdims=True)
        assert found.scores[0, place] == pytest.approx(logp[np.arange(len(spelled)), spelled].sum(), abs=1e-4)


def test_an_unknown_way_to_normalise_is_named(deep):
    with pytest.raises(ValueError, match="normalise='all': must be one of level, vocab, children"):
        deep.engine.recommend(deep.histories[:1], normalise="all")


def test_unproven_lists_are_searched_again_wider(deep, monkeypatch):
    histories, ran, original = deep.histories, [], programs.recommend
    plain = deep.engine.recommend(histories, k=1, beams=4)
    assert 0 < plain.exact.sum() < len(histories)

    def spy(define, settings, *args):
        ran.append((settings.lanes, np.asarray(args[-1].lengths).tolist()))
        return original(define, settings, *args)

    monkeypatch.setattr(programs, "recommend", spy)
    found = deep.engine.recommend(histories, k=1, beams=4, widen=8)
    assert [lanes for lanes, _ in ran] == [4, 8]
    unproven = [len(tokens) for tokens, _ in deep.engine.prompts([histories[u] for u in np.flatnonzero(~plain.exact)])]
    assert sorted(ran[1][1])[-len(unproven) :] == sorted(unproven)
    assert (found.rows[plain.exact] == plain.rows[plain.exact]).all()  # the proven are left alone
    assert (found.scores[plain.exact] == plain.scores[plain.exact]).all()
    assert found.exact.sum() > plain.exact.sum()
    best = reference(deep, histories).max(1, keepdims=True)
    np.testing.assert_allclose(found.scores[found.exact], best[found.exact], atol=1e-4)


def test_a_request_is_answered_alike_in_any_company(any_world):
    w = any_world
    asked = requests(w)
    together = w.engine.recommend(w.histories, k=K, beams=BEAMS, **asked)
    for u, history in enumerate(w.histories):
        rows, mass = asked["memory"]
        alone = w.engine.recommend(
            [history], k=K, beams=BEAMS, memory=(rows[[u]], mass[[u]]), gate=asked["gate"][[u]], exclude=[asked["exclude"][u]],
            allowed=asked["allowed"],
        )  # fmt: skip
        assert alone.rows[0].tolist() == together.rows[u].tolist()
        np.testing.assert_allclose(alone.scores[0], together.scores[u], rtol=1e-5, atol=1e-4)
    order = np.random.default_rng(1).permutation(len(w.histories))
    shuffled = w.engine.recommend([w.histories[u] for u in order], k=K, beams=BEAMS)
    plain = w.engine.recommend(w.histories, k=K, beams=BEAMS)
    assert (shuffled.rows == plain.rows[order]).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.02, 0.1, 1.0]), levels=st.sampled_from([1, 3]))
def test_every_id_is_real_allowed_unseen_and_there_once(seed, share, levels):
    w = world(levels)
    rng = np.random.default_rng(seed)
    asked = requests(w, seed) | {"allowed": rng.random(CATALOGUE) < share}
    found = w.engine.recommend(w.histories, k=K, beams=BEAMS, **asked)
    for u, row in enumerate(found.rows):
        shown = asked["allowed"].copy()
        shown[asked["exclude"][u]] = False
        items = row[row >= 0]
        assert shown[items].all() and len(set(items.tolist())) == len(items) == min(K, shown.sum())
        assert (row[len(items) :] == -1).all() and (found.scores[u, len(items) :] == -np.inf).all()


def test_more_asked_for_than_there_is():
    w = world(1)
    found = w.engine.recommend(w.histories[:2], k=CATALOGUE + 5, exclude=[np.arange(3), np.arange(0)])
    assert (found.rows >= 0).sum(1).tolist() == [CATALOGUE - 3, CATALOGUE]
    assert found.exact.all()


def test_long_histories_are_cut_to_their_newest_whole_events(any_world):
    w = any_world
    rng = np.random.default_rng(3)
    long = rng.integers(CATALOGUE, size=500)
    fits = (w.engine.prompts.length - 1) // w.engine.trie.levels
    cut, whole = (w.engine.recommend([h], k=K, beams=BEAMS) for h in (long, long[-fits:]))
    assert (cut.rows == whole.rows).all() and (cut.scores == whole.scores).all()


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(2, 60))
def test_windows_with_pauses_kinds_and_queries_are_the_longest_that_fit(seed, length):
    w = world(3)
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 40))
    items = rng.integers(CATALOGUE, size=n)
    times = np.cumsum(rng.choice([10, 4000, 10**6], n))
    kinds = rng.integers(0, 3, n).astype(np.uint8)
    queries = {
        int(e): np.arange(160, 160 + rng.integers(1, 6), dtype=np.int32) for e in np.flatnonzero(rng.random(n) < 0.2)
    }
    items[list(queries)] = -1
    nameless = rng.random(n) < 0.1
    items[nameless & (items >= 0)] = -1  # events without an item or a query are skipped

    def tokens(start: int, room: int) -> list[int]:
        prompts = Prompts(w.engine.vocab, w.engine.codes, timed=True, n_kinds=3, length=room)
        part = {e - start: q for e, q in queries.items() if e >= start}
        [(made, rows)] = prompts([items[start:]], [times[start:]], [kinds[start:]], [part])
        assert len(made) == len(rows)
        return made.tolist()

    made = tokens(0, length)
    assert made[0] == BOS and len(made) <= length
    longest = max((t for t in (tokens(s, 10_000) for s in range(n + 1)) if len(t) <= length), key=len)
    assert made == longest


def test_new_parameters_need_no_new_program(any_world):
    engine = any_world.engine
    before = engine.recommend(any_world.histories, k=K, beams=BEAMS)
    compiled = [p._cache_size() for p in (programs.read, programs.find)]
    old = engine.params
    try:
        engine.params = jax.tree.map(lambda x: 1.5 * x, old)
        after = engine.recommend(any_world.histories, k=K, beams=BEAMS)
    finally:
        engine.params = old
    assert (before.scores != after.scores).any()
    assert [p._cache_size() for p in (programs.read, programs.find)] == compiled
    assert (engine.recommend(any_world.histories, k=K, beams=BEAMS).scores == before.scores).all()


def test_what_was_compiled_ahead_is_not_compiled_again(deep):
    engine, settings, rng = deep.engine, {"k": 5, "beams": 3}, np.random.default_rng(0)

    def compiled() -> list[int]:
        return [p._cache_size() for p in (programs.read, programs.find, programs.keep, programs.read_on)]

    before = compiled()
    assert engine.compile(**settings, batches=(2,), lengths=(3, 40), excludes=(9,), users=True) == [(2, 64)]
    after = compiled()
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1, 1]
    histories = [rng.integers(CATALOGUE, size=n) for n in (9, 2)]
    for _ in range(2):
        asked = {"exclude": histories, "allowed": rng.random(CATALOGUE) < 0.5} | settings
        engine.recommend(histories, **asked)
        engine.recommend(histories, users=["a", "b"], **asked)
        histories = [np.append(h, 3) for h in histories]
    assert compiled() == after
    engine.cache.clear()


def test_nobody_asked(any_world):
    assert any_world.engine.recommend([], k=K).rows.shape == (0, K)
    assert any_world.engine.score([], np.zeros(0, int)).shape == (0,)


def test_bad_arguments_are_named(deep):
    engine = deep.engine
    with pytest.raises(ValueError, match="k=0"):
        engine.recommend(deep.histories, k=0)
    with pytest.raises(ValueError, match="outside the catalogue"):
        engine.recommend([np.array([CATALOGUE])])
    with pytest.raises(ValueError, match="exclude: a row outside"):
        engine.recommend([np.array([1])], exclude=[np.array([CATALOGUE])])
    with pytest.raises(ValueError, match="8 histories, 1 exclusions"):
        engine.recommend(deep.histories, exclude=[np.array([1])])
    with pytest.raises(ValueError, match="one row of 0"):
        engine.score(deep.histories, np.zeros(3, int))
    with pytest.raises(InputError, match="do not fit the model's code levels"):
        Engine(deep.model, np.arange(5)[:, None], np.zeros((5, 5)), np.ones(5, bool))
    with pytest.raises(InputError, match="code levels"):
        Engine(deep.model, np.full((1, 3), 6), np.zeros((1, 5)), np.ones(1, bool))


def test_bound_model_and_its_state_are_interchangeable(deep):
    """Training hands over `nnx.state` of a model with other numbers; the engine takes it as it is."""
    other = nnx.clone(deep.model)  # merge(split) would share its variables, and other tests this model
    nnx.update(other, jax.tree.map(lambda x: 2 * x, nnx.state(other)))
    fresh = Engine(other, deep.engine.codes, np.asarray(deep.engine.items.content)[:CATALOGUE], np.asarray(deep.engine.items.seen)[:CATALOGUE], length=48)  # fmt: skip
    swapped = Engine.__new__(Engine)
    swapped.__dict__.update(deep.engine.__dict__)
    swapped.params = nnx.state(other)
    assert (
        swapped.recommend(deep.histories, k=K, beams=BEAMS).rows
        == fresh.recommend(deep.histories, k=K, beams=BEAMS).rows
    ).all()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), most=st.sampled_from([0, 1, 7, CATALOGUE]), levels=st.sampled_from([1, 3]))
def test_ranking_candidates_is_recommending_among_nothing_else(seed, most, levels):
    """Each user has candidates of their own; a filter that lets these through, asked alone, gives the same list."""
    w, rng = world(levels), np.random.default_rng(seed)
    asked = {name: part for name, part in requests(w, seed).items() if name in ("memory", "gate")}
    candidates = [rng.permutation(CATALOGUE)[: rng.integers(most + 1)] for _ in w.histories]
    ranked = w.engine.rank(w.histories, candidates, temperature=1.7, **asked)
    assert ranked.rows.shape == (len(w.histories), max(map(len, candidates))) and ranked.exact.all()
    for u, own in enumerate(candidates):
        assert sorted(ranked.rows[u, : len(own)].tolist()) == sorted(own.tolist())
        assert (ranked.rows[u, len(own) :] == -1).all() and (ranked.scores[u, len(own) :] == -np.inf).all()
        allowed = np.isin(np.arange(CATALOGUE), own)
        rows, mass = asked["memory"]
        expected = reference(w, [w.histories[u]], (rows[[u]], mass[[u]]), asked["gate"][[u]], None, allowed, 1.7)[0]
        np.testing.assert_allclose(
            ranked.scores[u, : len(own)], np.sort(expected)[::-1][: len(own)], rtol=1e-5, atol=1e-4
        )
        np.testing.assert_allclose(
            ranked.scores[u, : len(own)], expected[ranked.rows[u, : len(own)]], rtol=1e-5, atol=1e-4
        )


def test_candidates_that_are_none_are_named(deep):
    with pytest.raises(ValueError, match="8 histories, 1 lists of candidates"):
        deep.engine.rank(deep.histories, [np.array([1])])
    for wrong in (-1, CATALOGUE):
        with pytest.raises(ValueError, match="candidates of user 0: a row outside"):
            deep.engine.rank(deep.histories[:1], [np.array([wrong])])
