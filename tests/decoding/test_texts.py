"""Texts as their tokens come: whole characters, ends at stop strings, and requests that cannot be asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from m6rec_jax.data.tokenizer import normalise
from m6rec_jax.decoding.texts import Desk, Spool
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import BOS, SPECIALS, Vocab
from tests.decoding.worlds import CATALOGUE, tokenizer

WORDS = "小米手机", "red", " ", "shoes", "世界", "你", "好", "龘", "é", "👕", "a", "b", "ab", "�"
texts = st.lists(st.sampled_from(WORDS), max_size=12).map("".join)
drawn = st.lists(st.integers(len(SPECIALS), tokenizer().size - 1), max_size=30)  # mostly bytes that spell nothing
spelled = texts.map(tokenizer().encode)
stops = st.lists(texts.filter(bool), max_size=3)
rounds = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def written(ids: list[int], stop: list[str], sizes: list[int]) -> tuple[list[str], Spool]:
    """The pieces given out when tokens come in rounds of these sizes."""
    spool, pieces, at, turn = Spool(tokenizer(), stop), [], 0, 0
    while at < len(ids) and not spool.stopped:
        for token in ids[at : at + sizes[turn % len(sizes)]]:
            spool.add(token)
            if spool.stopped:
                break
        at += sizes[turn % len(sizes)]
        turn += 1
        pieces.append(spool.take(spool.stopped or at >= len(ids)))
    return pieces, spool


def slow(ids: list[int], stop: list[str]) -> tuple[str, int, bool]:
    """The text, how many tokens it took and whether it was stopped, by decoding everything again after each token."""
    for n in range(1, len(ids) + 1):
        text = tokenizer().decode(ids[: n - tokenizer().unfinished(ids[:n])])
        for end in range(1, len(text) + 1):
            if found := [s for s in stop if text[:end].endswith(s)]:
                return text[: end - max(map(len, found))], n, True
    return tokenizer().decode(ids[: len(ids) - tokenizer().unfinished(ids)]), len(ids), False


@given(st.one_of(spelled, drawn), stops, rounds)
@example(tokenizer().encode("ab龘好 shoes"), ["龘好"], [8])  # over three bytes and a piece
@example(tokenizer().encode("abab shoes"), ["abab sh", "ba"], [1])
@example(tokenizer().encode("小米手机 red"), ["手机 r", "机 r"], [3])
def test_pieces_make_the_text_that_ends_before_the_first_stop_string_however_the_tokens_come(ids, stop, sizes):
    text, used, stopped = slow(ids, stop)
    pieces, spool = written(ids, stop, sizes)
    assert "".join(pieces) == spool.text == text
    assert spool.tokens == ids[:used] and spool.stopped == stopped


@given(texts, rounds)
@example("龘", [1])
@example("👕👕", [3])
def test_no_half_character_is_ever_given_out(text, sizes):
    ids = tokenizer().encode(text)
    pieces, _ = written(ids, [], sizes)
    assert "".join(pieces) == normalise(text)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    cut, _ = written(ids[:-1], [], sizes)  # a text that ends in the middle of a character ends before it
    assert normalise(text).startswith("".join(cut))


def test_what_may_become_a_stop_string_is_held_back_and_given_out_when_it_does_not():
    spool = Spool(tokenizer(), ["ab龘"])
    said = []
    for token in tokenizer().encode("xab"):
        spool.add(token)
        said.append(spool.take(False))
    assert "".join(said) == "x"
    for token in tokenizer().encode("好")[1:]:
        spool.add(token)
    assert spool.take(False) == "ab好" and not spool.stopped


# -- requests ------------------------------------------------------------------------------------------------------

DESK = Desk(Vocab(tokenizer().size, (6, 6, 6)), tokenizer(), CATALOGUE, 48)


@pytest.mark.parametrize(
    ("prompt", "setting", "message"),
    [
        ([], {}, r"the prompt is empty: begin with <s> \(id 2\)"),
        ([BOS] * 49, {}, "the prompt has 49 tokens and the model reads 48: shorten it"),
        ("红" * 60, {}, "and the model reads 48: shorten it"),
        ([BOS, 100_000], {}, "its ids go from 2 to 100000, the model's from 0 to"),
        ([BOS, -1], {}, "its ids go from -1 to 2"),
        ([0.5], {}, "whole numbers, not float64"),
        ([BOS], {"stop": ""}, "stop string '' of the prompt"),
        ([BOS], {"stop": ["a", ""]}, "stop string '' of the prompt"),
        ([BOS], {"stop": [5]}, "stop string 5 of the prompt"),
        ([BOS], {"most": -1}, "most=-1 of the prompt: it must be 0 or more"),
        ([BOS], {"temperature": -1.0}, "temperature=-1.0"),
        ([BOS], {"temperature": float("nan")}, "temperature=nan"),
        ([BOS], {"top_p": 0.0}, "top_p=0.0 of the prompt: it must be above 0, up to 1"),
        ([BOS], {"top_k": -1}, "top_k=-1"),
        ([BOS], {"repetition": 0.0}, "repetition=0.0"),
        ([BOS], {"seed": -1}, "seed=-1"),
        ([BOS], {"item_rows": [CATALOGUE]}, "give one row of 0..89, or -1, a token"),
        ([BOS], {"item_rows": [-1, -1]}, r"item_rows \[2\] of the prompt"),
    ],
)
def test_what_cannot_be_asked_is_one_line_that_names_it(prompt, setting, message):
    with pytest.raises(InputError, match=message) as error:
        DESK.request(prompt, **setting)
    assert "\n" not in str(error.value)


def test_requests_take_a_setting_for_all_or_one_each_and_say_which_prompt_is_wrong():
    prompts = ["red", [BOS], np.array([BOS, 300])]
    made = DESK.requests(prompts, stop=["a", "b"], most=[1, 2, 3], temperature=0.5)
    assert [(r.stop, r.limit, r.temperature) for r in made] == [(("a", "b"), most, 0.5) for most in (1, 2, 3)]
    assert made[0].tokens.tolist() == [BOS, *tokenizer().encode("red")]
    own = DESK.requests(prompts, stop=[["a"], [], ["b", "c"]])
    assert [r.stop for r in own] == [("a",), (), ("b", "c")]
    assert DESK.request([BOS] * 40, most=64).limit == 8  # prompt and text together are what the model reads
    with pytest.raises(InputError, match="top_k: 2 values for 3 prompts"):
        DESK.requests(prompts, stop=(), top_k=[1, 2])
    with pytest.raises(InputError, match="prompt 1 is empty"):
        DESK.requests(["", []], stop=())
