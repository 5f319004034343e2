"""Texts written in slots: what full forwards would have drawn, the same in any company, in any order, as they come."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m6rec_jax.decoding import programs
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.decoding.gather import Busy
from m6rec_jax.decoding.sampling import draw, penalise
from m6rec_jax.decoding.texts import Text
from m6rec_jax.errors import InputError
from m6rec_jax.model.transformer import causal
from m6rec_jax.vocab import BOS, EOS, SPECIALS
from tests.decoding.worlds import CATALOGUE, text_engine, tokenizer, world

LONG = 60.0  # nobody waits so long, or the test fails
LENGTH = 48  # tokens that the engines read
ALL = list(range(10))
draw = jax.jit(draw)


@cache
def engine_of(slots: int) -> Engine:
    return text_engine(slots)


@pytest.fixture
def engine() -> Engine:
    return engine_of(4)


@cache
def asked() -> tuple[list[list[int]], list[dict]]:
    """Prompts of several lengths with settings of all kinds."""
    rng = np.random.default_rng(3)
    kinds = [
        {"temperature": 0.0}, {}, {"temperature": 1.5, "top_k": 20}, {"top_p": 0.7}, {"repetition": 3.0},
        {"temperature": 0.0, "repetition": 1.5}, {"temperature": 2.0, "top_p": 0.9, "top_k": 90},
    ]  # fmt: skip
    shapes = [(0, 30), (3, 2), (12, 9), (1, 25), (30, 40), (2, 1), (9, 16), (20, 8), (5, 0), (4, 12)]
    prompts = [[BOS, *rng.integers(len(SPECIALS), tokenizer().size, n).tolist()] for n, _ in shapes]
    return prompts, [kinds[i % len(kinds)] | {"seed": 40 + i, "most": most} for i, (_, most) in enumerate(shapes)]


def write(engine: Engine, order: list[int], **more) -> list[Text]:
    """The texts of `asked` in this order."""
    prompts, settings = ([some[i] for i in order] for some in asked())
    default = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition": 1.0}
    each = {name: [(default | own)[name] for own in settings] for name in (*default, "most")}
    return engine.write(prompts, seeds=[own["seed"] for own in settings], **each, **more)


@cache
def alone() -> list[Text]:
    """Each of `asked` by itself."""
    return [write(engine_of(4), [i])[0] for i in ALL]


def at_once(engine: Engine, most: list[int]) -> list[Future[Text]]:
    """Greedy texts of so many tokens, all asked for before the first is begun."""
    requests = engine.texts.desk.requests([[BOS]] * len(most), stop=(), most=most, temperature=0.0)
    return engine.texts.submit(requests, engine._checkpoint(), [None] * len(most))


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """The thread stands still, one text in its hands, until the block is left."""
    begun, go = threading.Event(), threading.Event()
    first = engine.submit_text([BOS], temperature=0.0, on_text=lambda _: (begun.set(), go.wait(LONG)))
    assert begun.wait(LONG)
    yield
    go.set()
    assert first.result(LONG)


@partial(jax.jit, static_argnums=0)
def whole(define, params, items, tokens, length):
    model = nnx.merge(define, params)
    hidden = model.hidden(tokens, jnp.full_like(tokens, -1), causal(tokens.shape, length), items)
    return model.logits(hidden[jnp.arange(1), length - 1], 0, items)


def slow(engine: Engine, prompt: list[int], setting: dict) -> tuple[tuple[int, ...], str]:
    """Tokens and finish of one text, with the whole prefix read again for each token and nothing kept."""
    sampling, text = engine.texts.desk.request(prompt, **setting).sampling(), engine.vocab.text
    ids = np.arange(text.padded)
    may = (ids == EOS) | ((ids >= len(SPECIALS)) & (ids < text.size))
    tokens, start = list(prompt), len(prompt)
    for place in range(min(setting["most"], LENGTH - start)):
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = whole(engine._define, engine.params, engine.items, padded, np.array([len(tokens)]))
        scores = jnp.where(may, penalise(logits, np.isin(ids, tokens)[None], sampling.repetition), -jnp.inf)
        token = int(draw(scores, sampling, np.array([place], np.int32))[0])
        if token == EOS:
            return tuple(tokens[start:]), "end"
        tokens.append(token)
    return tuple(tokens[start:]), "length"


def test_texts_are_what_full_forwards_would_have_drawn(engine):
    for got, prompt, setting in zip(alone(), *asked(), strict=True):
        assert (got.tokens, got.finish) == slow(engine, prompt, setting)
        unfinished = tokenizer().unfinished(got.tokens)
        assert got.text == tokenizer().decode(got.tokens[: len(got.tokens) - unfinished])


@pytest.mark.parametrize("slots", [1, 4])
def test_same_request_same_answer_in_any_order_slot_and_number_of_slots(slots):
    engine = engine_of(slots)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(ALL).tolist()
        assert write(engine, order) == [alone()[i] for i in order]
    assert write(engine, [3, 3, 0, 3]) == [alone()[i] for i in (3, 3, 0, 3)]


def test_the_seed_decides(engine):
    first, second, again = engine.write(["red shoes"] * 3, seeds=[1, 2, 1], most=16)
    assert first == again != second


def test_rounds_of_other_sizes_change_nothing(engine, monkeypatch):
    monkeypatch.setattr(engine.texts, "steps", 3)
    assert write(engine, ALL, stop="b") == [write(engine, [i], stop="b")[0] for i in ALL]
    three = write(engine, ALL, stop="b")
    monkeypatch.setattr(engine.texts, "steps", 8)
    assert write(engine, ALL, stop="b") == three


def test_a_long_text_holds_up_no_short_one(monkeypatch):
    engine, done, rounds, original = engine_of(4), [], [], programs.advance_texts

    def counted(*args):
        rounds.append(int(args[-1].sum()))
        return original(*args)

    monkeypatch.setattr(programs, "advance_texts", counted)
    most = [40, *[8] * 12]  # tokens; greedy texts of this model do not end by themselves
    futures = at_once(engine, most)
    for i, future in enumerate(futures):
        future.add_done_callback(lambda _, i=i: done.append(i))
    assert [len(f.result(LONG).tokens) for f in futures] == most
    assert done[-1] == 0 and rounds == [4, 4, 4, 4, 1]  # texts a round of 8; fixed batches would take 5 + 3 rounds


def test_reserved_ids_are_never_written_and_texts_end_where_they_should(engine):
    many = {"temperature": 3.0, "seeds": list(range(40))}
    texts = engine.write([[BOS]] * 40, most=30, **many)
    assert all(len(SPECIALS) <= token < tokenizer().size for text in texts for token in text.tokens)
    assert {text.finish for text in texts} == {"end", "length"}
    assert all((len(text.tokens) == 30) == (text.finish == "length") for text in texts)
    short = engine.write([[BOS]] * 40, most=3, **many)
    assert [text.tokens for text in short] == [text.tokens[:3] for text in texts]


def test_a_heavy_penalty_writes_nothing_twice_while_there_is_anything_else(engine):
    prompts = ["good coffee", "你好 世界"]
    free = engine.write(prompts, most=16, temperature=0.0)
    assert any(len(set(text.tokens)) < len(text.tokens) for text in free)  # greedy text repeats itself
    one, other = engine.write(prompts, most=16, temperature=0.0, repetition=[1e6, 1.0])
    assert other == free[1]  # a setting of one request is no other's
    assert len(set(one.tokens)) == len(one.tokens)
    # What the prompt holds counts too: one that has said already what comes next.
    said = [BOS, *tokenizer().encode(prompts[0]), *free[0].tokens[:10]]
    again, other = engine.write([said, said], most=16, temperature=0.0, repetition=[1.0, 1e6])
    assert {*again.tokens} & {*said} and not {*other.tokens} & {*said}


def test_prompts_may_speak_of_items(engine):
    spelled = [BOS, *engine.vocab.spell(engine.codes[7]).tolist()]
    plain, told = engine.write([spelled, spelled], item_rows=[[-1] * 4, [-1, -1, -1, 7]], most=16)
    assert plain == engine.write([spelled], most=16)[0] != told


# -- stop strings and streams --------------------------------------------------------------------------------------


def test_a_text_ends_before_a_stop_string_that_straddles_tokens(engine):
    checked = 0
    for i, free in enumerate(alone()):
        for at in range(0, len(free.text) - 3, 5):
            stop = free.text[at + 1 : at + 4]
            if len(tokenizer().encode(stop)) < 2:
                continue
            [got] = write(engine, [i], stop=[stop, "never written"])
            assert got.text == free.text[: free.text.find(stop)] and got.finish == "stop"
            assert got.tokens == free.tokens[: len(got.tokens)]
            checked += 1
    assert checked > 5


def test_a_stop_string_of_one_request_is_no_others(engine):
    free = alone()
    stops = [[text.text[2:4]] if i % 2 and len(text.text) > 4 else [] for i, text in enumerate(free)]
    assert sum(map(len, stops)) > 2
    for i, got in enumerate(write(engine, ALL, stop=stops)):
        assert got.text == (free[i].text[: free[i].text.find(stops[i][0])] if stops[i] else free[i].text)


def test_chinese_is_written_whole(engine):
    texts = engine.write(["小米手机"] * 24, temperature=2.0, seeds=list(range(24)), most=30)
    chinese = [char for text in texts for char in text.text if "\u4e00" <= char <= "\u9fff"]
    assert len(chinese) > 20
    text = next(text.text for text in texts if any("\u4e00" <= char <= "\u9fff" for char in text.text[1:]))
    stop = next(char for char in text[1:] if "\u4e00" <= char <= "\u9fff")
    seed = [text.text for text in texts].index(text)
    [got] = engine.write(["小米手机"], temperature=2.0, seeds=seed, most=30, stop=stop)
    assert got.text == text[: text.find(stop)] and got.finish == "stop"


def test_pieces_of_a_stream_make_the_text(engine):
    for prompt, setting, text in zip(*asked(), alone(), strict=True):
        pieces = list(engine.stream(prompt, **setting))
        assert "".join(pieces) == text.text and all(pieces)
    assert len(list(engine.stream(asked()[0][0], **asked()[1][0]))) > 1  # it came bit by bit


def test_pieces_of_many_texts_make_each_of_them(engine):
    pieces: list[list[str]] = [[] for _ in ALL]
    stops = [text.text[5:7] or "x" for text in alone()]
    texts = write(engine, ALL, stop=[[s] for s in stops], on_text=lambda i, piece: pieces[i].append(piece))
    assert ["".join(some) for some in pieces] == [text.text for text in texts]
    assert sum(text.finish == "stop" for text in texts) > 3


def test_who_closes_a_stream_gives_up_the_slot(engine, monkeypatch):
    rounds, original = [], programs.advance_texts
    monkeypatch.setattr(programs, "advance_texts", lambda *args: rounds.append(1) or original(*args))
    monkeypatch.setattr(engine.texts, "steps", 1)
    stream = engine.stream([BOS], temperature=0.0, most=40)
    next(stream)
    stream.close()
    _idle(engine)
    assert len(rounds) < 40


def _idle(engine: Engine) -> None:
    thread = engine.texts._thread
    if thread is not None:
        thread.join(LONG)
    assert engine.texts._thread is None


# -- bounds and errors ---------------------------------------------------------------------------------------------


def test_no_room_is_no_text(engine):
    [none] = engine.write(["red"], most=0)
    assert none == Text("", (), "length")
    assert list(engine.stream("red", most=0)) == []
    full = [BOS] * LENGTH
    assert engine.write([full, full[1:]], temperature=0.0)[0] == Text("", (), "length")
    assert len(engine.write([full[1:]], temperature=0.0)[0].tokens) == 1
    assert engine.write([]) == []
    assert engine.write([""], most=1)[0].tokens  # a text from nothing
    with pytest.raises(InputError, match="prompt 1 has 49 tokens and the model reads 48"):
        engine.write([[BOS], [BOS] * 49])
    with pytest.raises(InputError, match="stop string ''"):
        engine.stream("red", stop="")
    with pytest.raises(InputError, match="the prompt is empty"):
        engine.submit_text([])


def test_an_engine_without_the_models_tokenizer_says_so():
    w = world(3)
    with pytest.raises(InputError, match="give it the model's tokenizer"):
        w.engine.write(["red"])
    content, seen = (np.asarray(x)[:CATALOGUE] for x in w.engine.items)
    with pytest.raises(InputError, match=f"tokenizer has {tokenizer().size} pieces and the model 190"):
        Engine(w.model, w.engine.codes, content, seen, tokenizer=tokenizer())


def test_what_on_text_raises_is_its_own_texts_error(engine):
    def angry(piece):
        raise KeyError("not mine")

    futures = [engine.submit_text([BOS], temperature=0.0, most=m, on_text=angry if m == 20 else None) for m in (9, 20, 30)]  # fmt: skip
    with pytest.raises(KeyError, match="not mine"):
        futures[1].result(LONG)
    assert [len(futures[i].result(LONG).tokens) for i in (0, 2)] == [9, 30]
    with pytest.raises(KeyError):
        engine.write(["a", "b"], on_text=lambda i, piece: angry(piece))


def test_on_text_may_submit_and_cannot_wait(engine):
    more, refused = [], []

    def on_text(piece):
        more.append(engine.submit_text([BOS], most=2))
        with pytest.raises(RuntimeError, match="on_text cannot wait") as error:
            engine.write([[BOS]])
        refused.append(error)

    assert engine.submit_text([BOS], temperature=0.0, most=3, on_text=on_text).result(LONG)
    assert refused and all(future.result(LONG) for future in more)


def test_a_program_that_fails_fails_what_it_wrote_and_nothing_after(engine, monkeypatch):
    original = programs.advance_texts

    def broken(*args):
        monkeypatch.setattr(programs, "advance_texts", original)
        original(*args)  # it has the slots, and does not give them back
        raise MemoryError("no room on the device")

    monkeypatch.setattr(programs, "advance_texts", broken)
    futures = at_once(engine, [5] * 6)
    for future in futures[:4]:
        with pytest.raises(MemoryError, match="no room on the device"):
            future.result(LONG)
    assert [len(future.result(LONG).tokens) for future in futures[4:]] == [5, 5]


def test_cancelled_texts_leave_and_others_go_on(engine):
    with held(engine):
        futures = [engine.submit_text([BOS], temperature=0.0, most=30) for _ in range(9)]
        assert all(future.cancel() for future in futures[::2])
    assert [len(future.result(LONG).tokens) for future in futures[1::2]] == [30] * 4
    _idle(engine)
    with pytest.raises(CancelledError):
        futures[0].result(LONG)
    assert wait(futures, LONG).not_done == set()


def test_too_many_are_refused_and_closing_writes_what_was_asked_for():
    engine = text_engine(4)  # its programs are those of `engine_of(4)`
    engine.texts.room = 6
    with held(engine):
        futures = at_once(engine, [9] * 12)  # nobody waited, so a call may be longer than the room
        with pytest.raises(Busy, match="12 texts wait already: ask again later, or give `room` more than 6"):
            engine.submit_text([BOS])
    engine.close()
    assert all(future.done() and len(future.result().tokens) == 9 for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit_text([BOS])
    engine.close()


# -- threads, checkpoints, lifetimes -------------------------------------------------------------------------------


def test_what_was_compiled_ahead_serves_every_text():
    engine = text_engine(3)
    engine.compile(batches=(), texts=True)
    made = programs.advance_texts._cache_size(), programs.begin_text._cache_size()
    write(engine, ALL, stop="x")
    assert (programs.advance_texts._cache_size(), programs.begin_text._cache_size()) == made


def test_several_threads_write_at_once(engine):
    prompts, settings = asked()
    asks = [
        lambda i: engine.submit_text(prompts[i], **settings[i]).result(LONG).text,
        lambda i: "".join(engine.stream(prompts[i], **settings[i])),
        lambda i: write(engine, [i])[0].text,
    ]
    with ThreadPoolExecutor(9) as pool:
        futures = [pool.submit(ask, i) for i in ALL for ask in asks]
        texts = [future.result(LONG) for future in futures]
    assert texts == [text.text for text in alone() for _ in asks]


def test_a_text_is_written_by_the_checkpoint_it_was_asked_of():
    engine, old = engine_of(4), engine_of(4).params
    prompts, settings = asked()
    programs_before = programs.advance_texts._cache_size(), programs.begin_text._cache_size()
    by_old = alone()[4]
    try:
        with held(engine):
            first = engine.submit_text(prompts[4], **settings[4])
            engine.params = text_engine(4, seed=6).params
            second = engine.submit_text(prompts[4], **settings[4])  # its checkpoint waits for the first to end
            engine.params = old
            third = engine.submit_text(prompts[4], **settings[4])
        assert first.result(LONG) == third.result(LONG) == by_old
        assert second.result(LONG).tokens != by_old.tokens
    finally:
        engine.params = old
    assert (programs.advance_texts._cache_size(), programs.begin_text._cache_size()) == programs_before


def test_what_was_submitted_is_what_was_there_then(engine):
    prompt, rows = np.array(asked()[0][0], np.int32), np.full(1, -1, np.int32)
    with held(engine):
        future = engine.submit_text(prompt, item_rows=rows, **asked()[1][0])
        prompt[:], rows[:] = 300, 5
    assert future.result(LONG) == alone()[0]


def test_an_idle_engine_can_be_collected():
    engine = text_engine(4)
    assert engine.write(["red"], most=2)
    with pytest.raises(ValueError, match="outside the catalogue"):
        engine.submit(np.array([999])).result(LONG)
    _idle(engine)
    engine.queue.close()  # or its thread may not have ended yet
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None


def test_a_stream_that_nobody_began_to_read_is_given_up(engine, monkeypatch):
    futures, submit = [], engine.texts.submit
    monkeypatch.setattr(engine.texts, "submit", lambda *asked: futures.extend(made := submit(*asked)) or made)
    engine.stream([BOS], most=30).close()
    with pytest.raises(CancelledError):
        futures[0].result(timeout=LONG)


def test_a_fault_after_the_program_is_heard_of_and_the_next_text_is_written(engine, monkeypatch):
    expected = engine.write([[BOS]], most=4, seeds=1)
    with monkeypatch.context() as broken:
        broken.setattr(engine.texts, "_read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.write([[BOS]], most=4, seeds=1)
    assert engine.write([[BOS]], most=4, seeds=1) == expected
