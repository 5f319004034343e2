"""Kept prefixes: warm answers are cold answers, and pages are never more, never shared, never another user's."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec_jax.config import ModelConfig
from m6rec_jax.decoding import programs
from m6rec_jax.decoding.cache import Prefix
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.decoding.requests import Requests
from m6rec_jax.decoding.reuse import PAGE, PrefixCache, write_pages, write_tail
from m6rec_jax.decoding.wave import Wave
from tests.decoding.worlds import CATALOGUE, world

ASK = {"k": 7, "beams": 2}
BUDGET = 12 * PAGE


@cache
def engine_of(levels: int) -> Engine:
    """The engine of a world with room for few users."""
    w = world(levels)
    content, seen = (np.asarray(x)[:CATALOGUE] for x in w.engine.items)
    return Engine(w.model, w.engine.codes, content, seen, length=48, cache_tokens=BUDGET)


@pytest.fixture(params=[1, 3], ids=["L1", "L3"])
def engine(request) -> Engine:
    made = engine_of(request.param)
    made.cache.clear()
    return made


@pytest.fixture
def deep() -> Engine:
    made = engine_of(3)
    made.cache.clear()
    return made


@pytest.fixture
def read(monkeypatch) -> list[tuple[str, int]]:
    """(how their prefixes came about, users) of all batches since."""
    ran: list[tuple[str, int]] = []
    for name in ("read", "keep", "append"):
        original = getattr(Wave, name)

        def spy(wave, asked, *args, name=name, original=original):
            ran.append((name, int((np.asarray(asked.lengths) > 1).sum())))
            return original(wave, asked, *args)

        monkeypatch.setattr(Wave, name, spy)
    return ran


def some(engine: Engine, *tokens: int, seed: int = 0) -> list[np.ndarray]:
    """Random histories whose prefixes have at most so many tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(CATALOGUE, size=(n - 1) // engine.trie.levels) for n in tokens]


def grown(histories: list[np.ndarray], events: int = 1, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.append(h, rng.integers(CATALOGUE, size=events)) for h in histories]


def same_as_cold(engine: Engine, histories: list[np.ndarray], users: list) -> None:
    warm, cold = engine.recommend(histories, users=users, **ASK), engine.recommend(histories, **ASK)
    np.testing.assert_allclose(warm.scores, cold.scores, atol=1e-4)
    np.testing.assert_allclose(warm.model_logp, cold.model_logp, atol=1e-4)
    assert (warm.rows == cold.rows).all() and (warm.exact == cold.exact).all()
    assert engine.cache.tokens <= BUDGET


def test_known_new_and_changed_users_in_one_batch(engine, read):
    histories = some(engine, 32, 13, 40, 25, 32)  # the first and the last grow into another page
    same_as_cold(engine, histories, list("abcde"))
    a, b, c, d, _ = histories
    changed = d.copy()
    changed[0] = (changed[0] + 1) % CATALOGUE
    asked = [*grown([a]), b, *grown([c]), changed, *some(engine, 9, 17, seed=2), c[:-1], *grown([changed])]
    read.clear()
    same_as_cold(engine, asked, ["a", "b", "c", "d", "f", None, "g", "h"])
    assert read == [
        ("append", 3), ("keep", 4), ("read", 1), ("read", 8),
    ]  # fmt: skip


def test_events_one_after_another_read_themselves_only(deep, read):
    histories = some(deep, 1, 31, 28, 19)
    deep.recommend(histories, users=list("abcd"), **ASK)
    read.clear()
    for turn in range(4):
        histories = grown(histories, seed=turn)
        same_as_cold(deep, histories, list("abcd"))
    assert [name for name, _ in read[::2]] == ["append"] * 4


def test_a_window_that_slides_is_read_anew(deep, read):
    histories = some(deep, 48, 48, 48, 48)
    deep.recommend(histories, users=list("abcd"), **ASK)
    read.clear()
    same_as_cold(deep, grown(histories), list("abcd"))
    assert read[0] == ("keep", 4)


def test_other_parameters_know_nobody(deep, read):
    histories = some(deep, 10, 20, 30, 40)
    deep.recommend(histories, users=list("abcd"), **ASK)
    old = deep.params
    try:
        deep.params = jax.tree.map(lambda x: 1.5 * x, old)
        read.clear()
        same_as_cold(deep, histories, list("abcd"))
        assert read[0] == ("keep", 4)
    finally:
        deep.params = old
    same_as_cold(deep, histories, list("abcd"))


def test_what_a_page_held_before_is_never_read(deep):
    deep.recommend(some(deep, 10, 20, 30, 40), users=list("abcd"), **ASK)
    deep.cache.arrays = tuple(jnp.full_like(x, jnp.nan) for x in deep.cache.arrays)
    deep.cache.clear()
    histories = some(deep, 29, 31, 32, 13)
    for turn in range(3):
        same_as_cold(deep, histories, list("abcd"))
        histories = grown(histories, seed=turn)


def test_more_users_than_pages_are_all_answered(deep):
    histories = some(deep, *[40] * 8)  # 2 pages each, 12 there are
    users = list("abcdefgh")
    for turn in range(3):
        same_as_cold(deep, histories, users)
        histories = [*grown(histories[:4], seed=turn), *histories[4:]]
        users = users[::-1]
    assert deep.cache.tokens == BUDGET


def test_who_grows_takes_no_pages_of_who_is_asked_for_too(deep, read):
    two_pages, one_page = some(deep, *[40] * 4), some(deep, *[31] * 4, seed=2)
    deep.recommend([*two_pages, *one_page], users=list("abcdefgh"), **ASK)
    assert deep.cache.tokens == BUDGET
    read.clear()
    first, *rest = two_pages
    same_as_cold(deep, [*grown([first], 2), *rest, *grown(one_page)], list("abcdefgh"))
    assert read[:2] == [("append", 7), ("append", 1)]  # the first waits while others want room
    assert set("abcd") <= set(deep.cache.users)


def test_a_user_asked_for_twice_is_kept_as_asked_last(deep, read):
    first, last, other, new = *some(deep, 20, 24, 28), np.array([3])
    same_as_cold(deep, [first, last, other, new], ["a", "a", "b", "c"])
    read.clear()
    same_as_cold(deep, grown([last, other, new, first]), ["a", "b", "c", None])
    assert read[0] == ("append", 3)


def test_pages_are_changed_in_place(deep):
    histories = some(deep, 10, 20, 30, 40)
    deep.recommend(histories, users=list("abcd"), **ASK)
    before = [x.unsafe_buffer_pointer() for x in deep.cache.arrays]
    deep.recommend(grown(histories), users=list("abcd"), **ASK)
    assert [x.unsafe_buffer_pointer() for x in deep.cache.arrays] == before


def test_after_a_failure_nothing_is_believed(deep, monkeypatch):
    histories = some(deep, 10, 20, 30, 40)
    deep.recommend(histories, users=list("abcd"), **ASK)

    def failing(*args):
        raise MemoryError("no more")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(programs, "read_on", failing)
        deep.recommend(grown(histories), users=list("abcd"), **ASK)
    same_as_cold(deep, grown(histories, 1), list("abcd"))


def test_a_failure_before_the_program_is_one_too(deep, monkeypatch):
    histories = some(deep, 10, 20, 30, 40)
    deep.recommend(histories, users=list("abcd"), **ASK)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Requests, "asked", lambda *args: (_ for _ in ()).throw(MemoryError("no more")))
        deep.recommend(grown(histories), users=list("abcd"), **ASK)
    same_as_cold(deep, grown(histories, 1), list("abcd"))


def test_a_mistake_costs_nobody_a_prefix(deep):
    deep.recommend(some(deep, 10, 20), users=list("ab"), **ASK)
    held = deep.cache.users
    with pytest.raises(ValueError, match="normalise"):
        deep.recommend(some(deep, 30), users=["c"], **ASK | {"normalise": "all"})
    assert deep.cache.arrays is not None and deep.cache.users == held


def test_no_budget_is_the_cold_way(deep, read):
    deep_cache, deep.cache = deep.cache, PrefixCache(ModelConfig(), PAGE - 1)
    try:
        same_as_cold(deep, some(deep, 10, 20, 30, 40), list("abcd"))
        assert {name for name, _ in read} == {"read"} and deep.cache.arrays is None
    finally:
        deep.cache = deep_cache


def test_a_prefix_that_is_not_causal_cannot_be_kept():
    kv = (jnp.zeros((1, 1, 1, PAGE, 2)),) * 2
    tokens = jnp.zeros((1, PAGE), jnp.int32)
    prefix = Prefix(tokens, tokens, jnp.ones(1, jnp.int32), kv, jnp.zeros((1, 2)))
    pages, table = tuple(jnp.zeros((1, 3, 1, PAGE, 2)) for _ in "kv"), jnp.zeros((1, 1), jnp.int32)
    write_pages(pages, table, prefix)
    for write in (lambda p: write_pages(pages, table, p), lambda p: write_tail(pages, table, p, p.lengths - 1, 1)):
        with pytest.raises(ValueError, match="not causal"):
            write(replace(prefix, causal=False))


def test_bad_arguments_are_named(deep):
    with pytest.raises(ValueError, match="2 histories, 1 users: name one"):
        deep.recommend([np.array([1]), np.array([2])], users=["a"])
    with pytest.raises(ValueError, match="cache_tokens=-1"):
        PrefixCache(ModelConfig(), -1)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5 * PAGE), st.booleans()), max_size=40), st.integers(0, 9))
def test_the_least_recently_used_leave_first_and_only_for_room(asks, pages):
    kept = PrefixCache(ModelConfig(), pages * PAGE + 7)
    text = np.random.default_rng(0).integers(100, size=5 * PAGE), np.full(5 * PAGE, -1)
    used: list[int] = []  # least recently used first
    held_of: dict[int, tuple[int, int]] = {}  # version and tokens
    need = lambda n: -(-n // PAGE)  # noqa: E731
    for version, (user, tokens, only_look) in enumerate(asks):
        prompt = text[0][:tokens], text[1][:tokens]
        if only_look:
            since, has = held_of.get(user, (0, 0))
            hit = user in used and has <= tokens
            assert kept.known(user, since, prompt) == (min(has, tokens - 1) if hit else 0)
            assert kept.known(user, since + 1, prompt) == 0
            if hit:
                used.remove(user)
                used.append(user)
            continue
        table = kept.claim([user], version, [prompt], (1, 5 * PAGE))
        if user in used:
            used.remove(user)
        fits = need(tokens) <= pages
        if fits:
            used.append(user)
            held_of[user] = version, tokens
            while sum(need(held_of[u][1]) for u in used) > pages:
                used.pop(0)
        assert kept.users == used
        assert (table < kept.size).sum() == (need(tokens) if fits else 0)
        held = kept.pages_of(used, (len(used), 5 * PAGE))
        held = held[held < kept.size].tolist()
        assert len(set(held)) == len(held) and PAGE * len(held) == kept.tokens <= kept.budget
        assert sorted(held + kept._free) == list(range(kept.size))
