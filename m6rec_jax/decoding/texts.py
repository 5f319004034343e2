"""What is asked for and given as text: a checked request, its text as the tokens come, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np

from m6rec_jax.data.tokenizer import Tokenizer
from m6rec_jax.decoding.sampling import Sampling
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import BOS, Vocab

Finish = Literal["end", "stop", "length", "item"]
Asked = str | Sequence[int] | np.ndarray  # text, or token ids from <s> on
MOST = 64  # tokens of a text, if nothing else is said


@dataclass(frozen=True)
class Text:
    """A written text. `tokens`: all that were drawn, also those of a stop string and of half a character at the end.

    `finish`: `end` (the model wrote </s>), `stop` (a stop string, which the text ends before), `length` (the limit, or
    the longest prefix that the model reads) or `item` (the model opened the spelling of an item).
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish


class Setting(TypedDict, total=False):
    """How one text is written: `most` tokens, the settings of `Sampling`, strings that end it, whether an item may be
    opened, and where the prompt completes a spelling whose features shall be read (`item_rows [T]`, else -1)."""

    most: int
    temperature: float
    top_k: int
    top_p: float
    repetition: float
    seed: int
    stop: str | Sequence[str]
    items: bool
    item_rows: Sequence[int] | np.ndarray | None


@dataclass(frozen=True)
class TextRequest:
    """A prompt `[T]` with its item rows, the settings of one text, and the most tokens it may have."""

    tokens: np.ndarray
    item_rows: np.ndarray
    limit: int
    temperature: float
    top_k: int
    top_p: float
    repetition: float
    seed: int
    stop: tuple[str, ...]
    items: bool = False

    def sampling(self) -> Sampling:
        """The settings as a program takes them, each `[1]`."""
        of = lambda value, kind: np.array([value], kind)  # noqa: E731
        return Sampling(
            of(self.temperature, np.float32), of(self.top_k, np.int32), of(self.top_p, np.float32),
            of(self.seed, np.uint32), of(self.limit, np.int32), of(self.repetition, np.float32),
            of(self.items, bool),
        )  # fmt: skip


@dataclass(frozen=True)
class Desk:
    """What requests are checked against: the model's ids, its tokenizer, items of the catalogue, tokens that it reads."""

    vocab: Vocab
    tokenizer: Tokenizer
    catalogue: int
    length: int

    def request(
        self, prompt: Asked, name: str = "the prompt", *, most: int = MOST, temperature: float = 1.0, top_k: int = 0,
        top_p: float = 1.0, repetition: float = 1.0, seed: int = 0, stop: str | Sequence[str] = (),
        items: bool = False, item_rows: Sequence[int] | np.ndarray | None = None,
    ) -> TextRequest:  # fmt: skip
        """The request, with copies of its arrays. Raises InputError, which calls the prompt `name`."""
        tokens = self._tokens(prompt, name)
        rows = np.full(len(tokens), -1, np.int32) if item_rows is None else np.array(item_rows, np.int32)
        if rows.shape != tokens.shape or not -1 <= rows.min() <= rows.max() < self.catalogue:
            raise InputError(f"item_rows {list(rows.shape)} of {name}: give one row of 0..{self.catalogue - 1}, or -1, a token")  # fmt: skip
        ranges = {
            "most": (most, most >= 0, "0 or more"), "temperature": (temperature, 0 <= temperature < np.inf, "0 or more"),
            "top_k": (top_k, 0 <= top_k < 1 << 31, "0 (all) or more"), "top_p": (top_p, 0 < top_p <= 1, "above 0, up to 1"),
            "repetition": (repetition, 0 < repetition < np.inf, "above 0"), "seed": (seed, 0 <= seed < 1 << 32, "0 to 2**32 - 1"),
        }  # fmt: skip
        for setting, (value, right, wanted) in ranges.items():
            if not right:
                raise InputError(f"{setting}={value} of {name}: it must be {wanted}")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        for string in stops:
            if not isinstance(string, str) or not string:
                raise InputError(f"stop string {string!r} of {name}: give text of at least one character, or leave it out")  # fmt: skip
        limit = min(int(most), self.length - len(tokens))
        return TextRequest(tokens, rows, limit, temperature, top_k, top_p, repetition, seed, stops, items)

    def requests(self, prompts: Sequence[Asked], *, stop: str | Sequence[str] | Sequence[Sequence[str]], **setting: Any) -> list[TextRequest]:  # fmt: skip
        """`request` for each prompt; a setting is one for all or one a prompt. Raises InputError."""
        n = len(prompts)
        alike = isinstance(stop, str) or all(isinstance(one, str) for one in stop)
        each = {name: [value] * n if value is None or np.isscalar(value) else value for name, value in setting.items()}
        each["stop"] = [stop] * n if alike else stop
        for name, values in each.items():
            if len(values) != n:
                raise InputError(f"{name}: {len(values)} values for {n} prompts; give one for all, or one a prompt")
        return [
            self.request(prompt, f"prompt {i}", **{name: values[i] for name, values in each.items()})
            for i, prompt in enumerate(prompts)
        ]

    def _tokens(self, prompt: Asked, name: str) -> np.ndarray:
        if isinstance(prompt, str):
            prompt = [BOS, *self.tokenizer.encode(prompt)]
        tokens = np.asarray(prompt)
        if not tokens.size:
            raise InputError(f"{name} is empty: begin with <s> (id {BOS}), or give a str")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise InputError(f"{name}: token ids are a list of whole numbers, not {tokens.dtype} {list(tokens.shape)}")
        if not 0 <= tokens.min() <= tokens.max() < self.vocab.size:
            raise InputError(f"{name}: its ids go from {tokens.min()} to {tokens.max()}, the model's from 0 to {self.vocab.size - 1}")  # fmt: skip
        if len(tokens) > self.length:
            raise InputError(f"{name} has {len(tokens)} tokens and the model reads {self.length}: shorten it")
        return np.array(tokens, np.int32)


class Spool:
    """One text as its tokens come: whole characters only, cut at the first stop string to be complete.

    Token by token, so that a text does not depend on how many came at once. Of stop strings that are complete with the
    same character the longest counts.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._told = 0  # characters that `take` gave out
        # Tokens before `_until` are whole characters. What follows is decoded together with those from `_from` on,
        # because the first token of a text loses its space.
        self._from = self._until = 0

    def add(self, token: int) -> None:
        """One more token; not after a stop string."""
        self.tokens.append(token)
        until = len(self.tokens) - self._tokenizer.unfinished(self.tokens)
        if until == self._until:
            return
        old, new = (self._tokenizer.decode(self.tokens[self._from : end]) for end in (self._until, until))
        self._from, self._until = self._until, until
        start = len(self.text)
        self.text += new[len(old) :]
        places = [(self.text.find(s, max(0, start - len(s) + 1)), len(s)) for s in self._stop]
        if found := [(at + length, at) for at, length in places if at >= 0]:
            self.text, self.stopped = self.text[: min(found)[1]], True

    def take(self, last: bool) -> str:
        """What is new and final; unless it is the `last`, without an end that may be the beginning of a stop string."""
        end = len(self.text) - (0 if last or self.stopped else self._held())
        piece, self._told = self.text[self._told : end], end
        return piece

    def _held(self) -> int:
        """Characters of the longest end of the text that a stop string begins with."""
        starts = (s[:n] for s in self._stop for n in range(1, len(s)))
        return max((len(start) for start in starts if self.text.endswith(start)), default=0)
