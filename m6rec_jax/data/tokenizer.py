"""Text to token ids: SentencePiece unigram with byte fallback, in any language.

Reserved ids are *control* symbols, which no text can produce; our own normalisation comes first and
SentencePiece's is off, so that decoding gives back exactly the normalised text.
"""

from __future__ import annotations

import codecs
import heapq
import io
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece as spm
import xxhash

from m6rec_jax.artifacts.atomic import atomic_path
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import CONTROL_SYMBOLS, CORE_SPECIALS, SPECIALS

BYTES = 256
LEAST_SIZE = len(SPECIALS) + BYTES + 64
SENTENCES = 400_000  # the tokenizer is trained on at most this many, chosen by hash
SENTENCE_CHARS = 1_000  # longer text is cut into pieces of this many characters for training
COVERAGE = 0.9995  # share of character occurrences that get a piece of their own; the rest are spelled in bytes
RECURS = 3  # times that a word occurs before it is worth a piece
WORD_CHARS = 15
_QUIET = 2


def _translation() -> dict[int, str | None]:
    """Control characters go (white space among them becomes a space), as do lone surrogates; "▁" is SentencePiece's space."""
    table: dict[int, str | None] = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)))
    table.update(dict.fromkeys(map(ord, "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85"), " "))
    table.update(dict.fromkeys(range(0xD800, 0xE000), "\ufffd"))
    table[0x2581] = "_"
    return table


_TRANSLATION = _translation()


def normalise(text: str) -> str:
    """NFKC, no control characters, single spaces; `decode(encode(text)) == normalise(text)`."""
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    return " ".join(unicodedata.normalize("NFKC", text.translate(_TRANSLATION)).split())


class Tokenizer:
    """A trained SentencePiece model; ids 0..3 are pad, unknown, begin and end, the controls of `vocab` follow."""

    def __init__(self, model: bytes):
        self.model = model
        self._processor = spm.SentencePieceProcessor(model_proto=model)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Raises InputError when the file is no SentencePiece model or lacks this project's control symbols."""
        try:
            made = cls(Path(path).read_bytes())
            size = made.size
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: not readable as a tokenizer ({reason}); prepare the dataset again") from None
        for name, wanted in SPECIALS.items():
            if wanted >= size or made._processor.id_to_piece(wanted) != name:
                raise InputError(
                    f"{path}: {name} is not id {wanted}: a tokenizer of another make; prepare the dataset again"
                )
        return made

    def save(self, path: Path | str) -> None:
        with atomic_path(path) as partial:
            partial.write_bytes(self.model)

    @property
    def size(self) -> int:
        """Pieces, specials included."""
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of one text; never a reserved id."""
        return self._processor.encode(normalise(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts."""
        return self._processor.encode([normalise(t) for t in texts]) if len(texts) else []

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; reserved ids and ids of items say nothing."""
        size = self.size
        kept = [int(i) for i in ids if len(SPECIALS) <= int(i) < size]
        return self._processor.decode(kept)

    def unfinished(self, ids: Sequence[int]) -> int:
        """How many ids at the end, at most 3, spell the first bytes of a character that more bytes may complete."""
        last = b""
        for i in reversed(ids[-3:]):
            if not self._processor.is_byte(int(i)):
                break
            last = bytes([int(self._processor.id_to_piece(int(i))[1:-1], 16)]) + last
        for n in range(len(last), 0, -1):
            try:
                if codecs.utf_8_decode(last[-n:], "strict", False)[1] == 0:
                    return n
            except UnicodeDecodeError:
                continue
        return 0


def train_tokenizer(texts: Iterable[str], path: Path | str, size: int) -> Tokenizer:
    """Train on `texts` and save to `path`; the same texts in any order give the same bytes.

    The result is smaller than `size` when the texts cannot fill it: read `.size`. Raises InputError when `size` has no
    room beside specials and bytes.
    """
    if size < LEAST_SIZE:
        raise InputError(f"vocab_size={size}: {LEAST_SIZE - 64} ids are reserved for control symbols and bytes; give at least {LEAST_SIZE}")  # fmt: skip
    sentences = _sample(texts)
    rare = _rare(sentences, (size - len(SPECIALS) - BYTES) // 2)
    if rare:
        blank = dict.fromkeys(map(ord, rare), " ")
        sentences = [s.translate(blank) for s in sentences]
    # A data set without any text still needs specials and bytes.
    sentences = [s for s in sentences if not s.isspace()] or ["a b"]
    sentences += _again(sentences)
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars="▁",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=list(CONTROL_SYMBOLS),
        pad_id=0, unk_id=1, bos_id=2, eos_id=3,
        pad_piece=CORE_SPECIALS[0], unk_piece=CORE_SPECIALS[1], bos_piece=CORE_SPECIALS[2], eos_piece=CORE_SPECIALS[3],
        num_threads=1,
        max_sentence_length=SENTENCE_CHARS * 8,
        minloglevel=_QUIET,
    )  # fmt: skip
    made = Tokenizer(model.getvalue())
    made.save(path)
    return made


def _sample(texts: Iterable[str]) -> list[str]:
    """Up to `SENTENCES` pieces of text, sorted; which ones depends on their hash alone, not on their order."""

    def hashed() -> Iterator[tuple[int, str]]:
        for text in texts:
            clean = normalise(text)
            for start in range(0, len(clean), SENTENCE_CHARS):
                piece = clean[start : start + SENTENCE_CHARS]
                yield xxhash.xxh3_64_intdigest(piece.encode("utf-8")), piece

    return sorted(piece for _, piece in heapq.nsmallest(SENTENCES, hashed()))


def _again(sentences: list[str]) -> list[str]:
    """Each word that recurs, written twice without a space.

    SentencePiece takes as candidates what occurs in two *distinct* words, so a word always written alone would never
    become a piece, however frequent.
    """
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(sentence.split())
    return sorted(word + word for word, n in counts.items() if n >= RECURS and 2 <= len(word) <= WORD_CHARS)


def _rare(sentences: list[str], limit: int) -> list[str]:
    """Characters that get no piece: all but the most frequent, up to `COVERAGE` of the text and up to `limit`."""
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(sentence)
    counts.pop(" ", None)
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    share = np.cumsum([counts[c] for c in ranked]) / max(counts.total(), 1)
    keep = min(int(np.searchsorted(share, COVERAGE)) + 1, limit)
    # SentencePiece keeps U+2585 for itself and would leave out every sentence that holds it.
    return [c for i, c in enumerate(ranked) if i >= keep or c == "\u2585"]
