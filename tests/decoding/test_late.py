"""Kept parts: scores equal those of whole rows, keys follow tokens and model, memory is bounded."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m6rec_jax.config import ModelConfig
from m6rec_jax.data.packing import pack_row
from m6rec_jax.decoding import late
from m6rec_jax.decoding.late import LateScorer, PartCache, keys_of, model_digest
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import View
from m6rec_jax.vocab import SPECIALS, Vocab
from tests.framed import WORDS, framed, instance, sequence, words

CONFIG = ModelConfig(layers=3, width=16, heads=2, ffn=32, late=1)
VOCAB = Vocab(len(SPECIALS) + WORDS, (40,))
ITEMS = jax.tree.map(jnp.asarray, item_table(np.random.default_rng(0).normal(size=(40, 4)), np.ones(40, bool)))
OPTIONS = jax.random.normal(jax.random.key(7), (3, 16))
SLOT = 16 * 4  # bytes of a token


def params_of(config, seed=0):
    made = Blueprint(config, VOCAB, 4).init(seed)
    made["part"] = jax.random.normal(jax.random.key(seed + 1), made["part"].shape)
    return made


def scorer(config=CONFIG, seed=0, **settings):
    return LateScorer(Blueprint(config, VOCAB, 4).bind(params_of(config, seed)), ITEMS, **settings)


def asked(tokens):
    return tokens, np.full(len(tokens), -1, np.int32)


@partial(jax.jit, static_argnums=0)
def _states(config, params, row):
    view = View(row["positions"], row["k_start"], row["k_end"])
    return Blueprint(config, VOCAB, 4).bind(params).hidden(row["tokens"], row["item_rows"], view, ITEMS)


def full(config, instances, seed=0):
    """Logits by one forward pass over whole rows, as in training."""
    of = [replace(sequence(tokens), item_rows=rows) for tokens, rows in instances]
    rows = [pack_row([(one, 0) for one in of[at : at + 5]], 256) for at in range(0, 20, 5)]
    row = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
    ends = np.stack([row["loss_weights"][i] > 0 for i in range(4)])
    return np.asarray(_states(config, params_of(config, seed), row))[ends] @ np.asarray(OPTIONS).T


def some(seed, count=7):
    rng = np.random.default_rng(seed)
    return [asked(instance(rng, int(n))) for n in rng.integers(1, 9, count)]


@pytest.mark.parametrize("joined", [1, 2, 3])
def test_scores_are_those_of_whole_rows_whether_parts_were_kept_or_not(joined):
    config = replace(CONFIG, late=joined)
    instances, made = some(1), scorer(config)
    expected = full(config, instances)
    for _ in range(2):
        np.testing.assert_allclose(made.score(instances, OPTIONS), expected, atol=1e-5)
    assert made.uses.kept >= made.uses.asked / 2
    again = [instances[3], instances[0]]
    np.testing.assert_allclose(made.score(again, OPTIONS), expected[[3, 0]], atol=1e-5)
    assert made.score([], OPTIONS).shape == (0, 3)


def test_what_was_kept_is_not_read_again(monkeypatch):
    made, read = scorer(), []
    monkeypatch.setattr(late, "_read_parts", lambda *of, own=late._read_parts: read.append(of[4]) or own(*of))
    rng = np.random.default_rng(2)
    parts = [words(rng, 3) for _ in range(4)]
    made.score([asked(framed(parts, [200]))], OPTIONS)
    assert sum((rows > 0).sum() for rows in read) == len(framed(parts, [200]))
    made.score([asked(framed(parts, [201])), asked(framed(parts[:3], [201]))], OPTIONS)
    assert sum((rows > 0).sum() for rows in read[1:]) == len([SPECIALS["<target>"], 201, SPECIALS["</target>"]])
    assert made.uses == (6 + 6 + 5, 5 + 4)


def test_an_item_told_by_its_features_is_another_part():
    tokens = instance(np.random.default_rng(3), 3)
    rows = np.full(len(tokens), -1, np.int32)
    told = rows.copy()
    told[2] = 5
    made = scorer()
    pair = [(tokens, rows), (tokens, told)]
    found = made.score(pair, OPTIONS)
    np.testing.assert_allclose(found, full(CONFIG, pair), atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_keys_follow_the_tokens_and_the_model():
    made = scorer()
    digest = made._current[1]
    one = asked(framed([[200, 201], [202]], [203]))
    keys, starts = keys_of(one, digest)
    assert len(keys) == len(starts) == len(set(keys)) == 4
    other, _ = keys_of(asked(framed([[200, 201], [204]], [203])), digest)
    assert [a == b for a, b in zip(keys, other, strict=True)] == [True, False, True, True]
    params = params_of(CONFIG)
    assert model_digest(nnx.state(Blueprint(CONFIG, VOCAB, 4).bind(params)), ITEMS) == digest
    params["block"]["key"] = params["block"]["key"].at[0, 0, 0, 0].add(1e-3)
    changed = model_digest(nnx.state(Blueprint(CONFIG, VOCAB, 4).bind(params)), ITEMS)
    assert changed != digest
    assert model_digest(made.params, ITEMS._replace(content=ITEMS.content * 2)) != digest
    assert not set(keys_of(one, changed)[0]) & set(keys)


def test_another_checkpoint_finds_nothing_of_the_last_one():
    instances, made = some(4), scorer()
    made.score(instances, OPTIONS)
    made.params = nnx.state(Blueprint(CONFIG, VOCAB, 4).bind(params_of(CONFIG, 9)))
    np.testing.assert_allclose(made.score(instances, OPTIONS), full(CONFIG, instances, 9), atol=1e-5)


def test_memory_is_bounded_and_scores_stay_right():
    instances = some(5, 20)
    longest = max(len(tokens) for tokens, _ in instances)
    made = scorer(cache_bytes=SLOT * (longest + 2))
    for start in range(0, 20, 5):
        some_of = instances[start : start + 5]
        np.testing.assert_allclose(made.score(some_of, OPTIONS), full(CONFIG, some_of), atol=1e-5)
        assert made.cache.tokens <= made.cache.size
        assert made._states.nbytes <= SLOT * (longest + 2)
    tight = scorer(cache_bytes=SLOT * (longest - 1))
    with pytest.raises(InputError, match=f"holds {longest - 1} tokens, and an instance has {longest}"):
        tight.score(instances, OPTIONS)


def test_the_part_that_was_not_asked_for_longest_leaves_first():
    cache = PartCache(10)
    slots = {name: cache.claim(name, 3).tolist() for name in (b"a", b"b", b"c")}
    assert len({slot for some in slots.values() for slot in some}) == cache.tokens == 9
    cache.find(b"a")
    new = cache.claim(b"d", 4)
    assert cache.find(b"b") is None
    assert cache.find(b"a").tolist() == slots[b"a"]
    assert not set(new.tolist()) & {*slots[b"a"], *slots[b"c"]}
    assert (cache.tokens, len(cache)) == (10, 3)


def test_a_program_that_fails_leaves_nothing_half_read(monkeypatch):
    instances, made = some(6), scorer()

    def broken(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(late, "_read_parts", broken)
        with pytest.raises(MemoryError):
            made.score(instances, OPTIONS)
    np.testing.assert_allclose(made.score(instances, OPTIONS), full(CONFIG, instances), atol=1e-5)


def test_a_model_without_late_interaction_is_refused():
    plain = Blueprint(replace(CONFIG, late=0), VOCAB, 4)
    with pytest.raises(InputError, match=r"model.late=0"):
        LateScorer(plain.bind(plain.init(0)), ITEMS)
