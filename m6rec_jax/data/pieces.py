"""Which text each id of a tokenizer stands for: SentencePiece, or the `tokenizer.json` of Hugging Face."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece as spm

from m6rec_jax.errors import InputError

SPACE = "▁"  # of SentencePiece
BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Pieces:
    """Ids by what they stand for: `texts` by bytes of UTF-8, `singles` by the byte alone, `controls` by name."""

    texts: dict[bytes, int] = field(default_factory=dict)
    singles: dict[int, int] = field(default_factory=dict)
    controls: dict[str, int] = field(default_factory=dict)

    def cut(self, text: bytes) -> list[int]:
        """Ids that spell a text, from its start the longest piece each time; none when a byte has no piece."""
        made, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + self._longest), at, -1)
            end = next((end for end in ends if text[at:end] in self.texts), at + 1)
            one = self.texts.get(text[at:end], self.singles.get(text[at]))
            if one is None:
                return []
            made.append(one)
            at = end
        return made

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.texts), default=0)


def stand_for(ours: Pieces, theirs: Pieces) -> dict[int, list[int]]:
    """For each of our text ids the ids of theirs that spell the same: one, several, or none."""
    made = {i: [theirs.texts[text]] if text in theirs.texts else theirs.cut(text) for text, i in ours.texts.items()}
    alone = {byte: [theirs.singles[byte]] if byte in theirs.singles else theirs.cut(bytes([byte])) for byte in ours.singles}  # fmt: skip
    return made | {i: alone[byte] for byte, i in ours.singles.items()}


def read_pieces(folder: Path) -> Pieces:
    """The pieces of `tokenizer.json` or, where that is not there, of `tokenizer.model`; InputError when neither is."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        file = folder / "tokenizer.model"
        if not file.is_file():
            raise InputError(f"{folder}: no tokenizer.json and no tokenizer.model in it, so nothing says whose row is whose; fetch one of them")  # fmt: skip
        try:
            return of_sentencepiece(file.read_bytes())
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{file}: no SentencePiece model ({reason}); fetch its tokenizer.json") from None
    try:
        return of_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not readable as a tokenizer ({type(error).__name__}: {error}); fetch it again") from None  # fmt: skip


def of_sentencepiece(model: bytes) -> Pieces:
    """The pieces of a SentencePiece model; RuntimeError when it is none."""
    processor, made = spm.SentencePieceProcessor(model_proto=model), Pieces()
    for i in range(processor.get_piece_size()):
        piece = processor.id_to_piece(i)
        if processor.is_control(i) or processor.is_unknown(i):
            made.controls[piece] = i
        elif not processor.is_unused(i):
            _enter(made, piece, i)
    return made


def of_json(body: Mapping[str, Any]) -> Pieces:
    """The pieces of a `tokenizer.json`: BPE, over characters or over bytes, or unigram. Raises InputError for another
    kind, KeyError and the like for what is none."""
    model, made = body["model"], Pieces()
    kind = model.get("type", "BPE")
    if kind not in ("BPE", "Unigram"):
        raise InputError(f"tokenizer.json: a model of type {kind}; BPE and Unigram are read")
    added = {one["content"]: int(one["id"]) for one in body.get("added_tokens") or ()}
    special = {one["content"] for one in body.get("added_tokens") or () if one.get("special")}
    vocab = model["vocab"] if kind == "BPE" else {piece: i for i, (piece, _) in enumerate(model["vocab"])}
    of_bytes = '"ByteLevel"' in json.dumps([body.get("pre_tokenizer"), body.get("decoder")])
    letters = _letters() if of_bytes else {}
    for piece, i in vocab.items():
        if piece in special:
            continue
        if not of_bytes:
            _enter(made, piece, int(i))
        elif all(letter in letters for letter in piece):
            text = bytes(letters[letter] for letter in piece)
            made.texts[text] = int(i)
            if len(text) == 1:
                made.singles[text[0]] = int(i)
    for piece, i in added.items():
        if piece in special:
            made.controls[piece] = i
        else:
            made.texts.setdefault(piece.encode("utf-8"), i)
    return made


def _enter(made: Pieces, piece: str, i: int) -> None:
    """A piece over characters: a single byte is written `<0x41>`, a space as SPACE."""
    if byte := BYTE.fullmatch(piece):
        made.singles[int(byte[1], 16)] = i
    else:
        made.texts[piece.replace(SPACE, " ").encode("utf-8", "surrogatepass")] = i


def _letters() -> dict[str, int]:
    """The byte that each letter of byte-level BPE stands for: bytes that print, and the others from U+0100 on in order
    (Radford et al. 2019)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
