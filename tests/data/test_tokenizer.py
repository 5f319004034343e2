"""Any text goes in and comes out again; no text reaches a reserved id."""

import random
import unicodedata

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import example, given
from hypothesis import strategies as st

from m6rec_jax.data.tokenizer import LEAST_SIZE, Tokenizer, normalise, train_tokenizer
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import CONTROL_SYMBOLS, SPECIALS
from tests.fixtures import tiny_tables

TEXTS = [*tiny_tables()["items"]["title"], *tiny_tables()["docs"]["body"]] * 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 640)


@given(st.text(st.characters()))
@example("小米手机 👩‍👩‍👧 ﷺ ｆｕｌｌ　ｗｉｄｔｈ")
@example("▁a ▁\u2585\u2047 <0x41> \x00\ud800\t\n ⁇ ")
@example(" ".join(CONTROL_SYMBOLS))
def test_decoding_gives_back_the_normalised_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == normalise(text)
    assert all(len(SPECIALS) <= i < tokenizer.size for i in ids)


@given(st.text(st.characters()))
def test_normalising_twice_changes_nothing(text):
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFKC", once)


def test_ten_thousand_spelled_control_symbols_reach_no_reserved_id(tokenizer):
    rng = random.Random(0)
    wide = {c: chr(ord(c) + 0xFEE0) for c in map(chr, range(0x21, 0x7F))}
    noise = ["", " ", "▁", "\u200b", "\x00", "<", ">", "小米", "👕", "</s>", "<s>", "<unk>", "<pad>", "　"]
    texts = []
    for _ in range(10_000):
        symbol = rng.choice((*CONTROL_SYMBOLS, "<pad>", "<unk>", "<s>", "</s>"))
        share = rng.choice((0, 0.3, 1))
        spelled = "".join(wide[c] if c in wide and rng.random() < share else c for c in symbol)
        texts.append(rng.choice(noise) + spelled + rng.choice(noise) + rng.choice((symbol, "", "x")))
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids and min(ids) >= len(SPECIALS), text
        assert ids == tokenizer.encode(text)


def test_the_same_texts_in_any_order_give_the_same_bytes(tmp_path, tokenizer):
    shuffled = random.Random(1).sample(TEXTS, len(TEXTS))
    assert train_tokenizer(shuffled, tmp_path / "other.model", 640).model == tokenizer.model
    assert Tokenizer.load(tmp_path / "other.model").encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_frequent_words_of_any_script_are_pieces(tokenizer):
    assert len(tokenizer.encode("小米手机")) < len("小米手机".encode()) / 2
    assert len(tokenizer.encode("lipstick")) <= 3
    assert len(tokenizer.encode("☕")) <= 2


@pytest.mark.parametrize(
    "texts",
    [[], [""], ["a"], [chr(0x4E00 + i) * 3 for i in range(3000)], ["x" * 20_000 + " y"], ["<mask> <sep>"] * 50,
     ["\u2585 hi"] * 9, ["\x00"], ["😀" * 5000]],
    ids=["none", "empty", "one", "3000 characters", "long word", "symbols", "U+2585", "NUL", "emoji"],
)  # fmt: skip
def test_a_corpus_that_cannot_fill_the_vocabulary_gives_a_smaller_one(tmp_path, texts):
    made = train_tokenizer(texts, tmp_path / "t.model", 700)
    assert len(SPECIALS) + 256 <= made.size <= 700
    for text in ("hello 小米 🎉 a", *texts[:1]):
        assert made.decode(made.encode(text)) == normalise(text)


def test_a_ten_megabyte_text_is_encoded(tokenizer):
    text = "小米手机壳 shoes " * 450_000
    ids = tokenizer.encode(text)
    assert np.mean(ids) > len(SPECIALS) and tokenizer.decode(ids) == normalise(text)


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"vocab_size=300.*at least {LEAST_SIZE}"):
        train_tokenizer(TEXTS, tmp_path / "t.model", 300)


def test_training_is_silent(tmp_path, capfd):
    train_tokenizer(TEXTS, tmp_path / "t.model", 640)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_or_foreign_model_is_refused(tmp_path, tokenizer):
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(tokenizer.model[: len(tokenizer.model) // 2])
    with pytest.raises(InputError, match="damaged.model"):
        Tokenizer.load(damaged)
    with pytest.raises(InputError, match="missing.model"):
        Tokenizer.load(tmp_path / "missing.model")
    spm.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "foreign"), vocab_size=100,
                                   hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    with pytest.raises(InputError, match="foreign.model.*another make"):
        Tokenizer.load(tmp_path / "foreign.model")
