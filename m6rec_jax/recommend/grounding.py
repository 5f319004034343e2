"""Whether a text is grounded: what it names is true of the item or the history, and it is not another's text copied.

A text is read as tokens: words and numbers, and single characters of scripts without spaces. What it *names* are categories,
attribute values, titles and telling words of titles of the catalogue, and every number. Each is looked for in the facts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl
import xxhash

LEAST = 0.8  # share of what a text names that must be true
MOST_COPIED = 0.5  # share of its n-grams that may stand in one text of training about something else
WINDOW = 8  # tokens of an n-gram: fewer are how people, and templates, speak
LONGEST = 24  # tokens of a name that is looked for
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
TOKEN = re.compile(rf"[{CJK}]|\d+(?:\.\d+)?|[^\W\d_{CJK}]+")
COMMON = frozenset(
    TOKEN.findall(
        "a about after all also an and any are as at be because but by can for from had has have he her his how i if in into is it its "
        "like many me more most my new no not of on one or other our out over part she so some such than that the their them "
        "then there they this to too two up us was we were what when where which who why will with you your user item"
    )
)  # words that are in titles, and say nothing of them
Gram = tuple[str, ...]


def tokens_of(text: str) -> list[str]:
    """The tokens of a text, in small letters."""
    return TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def is_cjk(token: str) -> bool:
    """Whether a token is a character of a script without spaces."""
    return re.fullmatch(rf"[{CJK}]", token) is not None


@dataclass(frozen=True)
class Lexicon:
    """What a text may name: `names` (token sequences of categories, attribute values and titles) by their first token, and
    `words` of titles, of scripts without spaces pairs of characters."""

    names: dict[str, frozenset[Gram]]
    words: frozenset[Gram]

    @classmethod
    def of(cls, items: pl.DataFrame) -> Lexicon:
        """The names of a catalogue."""
        titles = [tokens_of(title) for title in items["title"].drop_nulls().unique().to_list()]
        values = [] if "attributes" not in items.columns else items["attributes"].explode().drop_nulls().unique().to_list()  # fmt: skip
        known = [tokens_of(name) for name in items["categories"].explode().drop_nulls().unique().to_list()]
        known += [tokens_of(value.partition(": ")[2] or value) for value in values]
        known += [title for title in titles if len(title) > 1]  # one word alone is a telling word
        names: dict[str, set[Gram]] = {}
        for name in known:
            if 0 < len(name) <= LONGEST and not _is_number(name) and (len(name) > 1 or name[0] not in COMMON):
                names.setdefault(name[0], set()).add(tuple(name))
        labels = {tuple(tokens_of(value.partition(": ")[0])) for value in values if ": " in value}  # true of every item
        words = {gram for title in titles for gram in _telling(title)} - labels
        return cls({first: frozenset(some) for first, some in names.items()}, frozenset(words))

    def named(self, text: str) -> list[Gram]:
        """What a text names, each once, in order: the longest name at each place, else a telling word; every number."""
        tokens, found, at = tokens_of(text), dict[Gram, None](), 0
        while at < len(tokens):
            here = [name for name in self.names.get(tokens[at], ()) if tuple(tokens[at : at + len(name)]) == name]
            pair = tuple(tokens[at : at + 2])
            if here:
                longest = max(here, key=len)
                found[longest] = None
                at += len(longest)
                continue
            if tokens[at][0].isdigit() or (tokens[at],) in self.words:
                found[(tokens[at],)] = None
            elif len(pair) == 2 and pair in self.words:
                found[pair] = None
            at += 1
        return list(found)


def _is_number(name: Sequence[str]) -> bool:
    return len(name) == 1 and name[0][0].isdigit()


def _telling(title: Sequence[str]) -> Iterable[Gram]:
    """The words of a title that tell it from others: not too short, not common; pairs of characters without spaces."""
    for word in title:
        if len(word) > 1 and not word[0].isdigit() and word not in COMMON and not is_cjk(word):
            yield (word,)
    for pair in pairwise(title):
        if is_cjk(pair[0]) and is_cjk(pair[1]):
            yield pair


class Facts:
    """Texts that are true of what is spoken of."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._text = "\x1e".join("\x1f" + "\x1f".join(tokens_of(text)) + "\x1f" for text in texts if text)

    def hold(self, gram: Sequence[str]) -> bool:
        """Whether the tokens stand side by side in one of the texts."""
        return "\x1f" + "\x1f".join(gram) + "\x1f" in self._text


# -- copies --------------------------------------------------------------------------------------------------------


class Copies:
    """The n-grams of n texts of training: `hashes` sorted, `owners` the text of each, `about [n]` what each speaks of."""

    def __init__(self, texts: Sequence[str], about: Sequence[Collection[str]]) -> None:
        hashes, owners = [], []
        for number, text in enumerate(texts):
            own = np.unique(_hashes(tokens_of(text)))
            hashes.append(own)
            owners.append(np.full(len(own), number, np.int32))
        every = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
        order = np.argsort(every, kind="stable")
        self.hashes = every[order]
        self.owners = (np.concatenate(owners) if owners else np.zeros(0, np.int32))[order]
        self.about = [frozenset(one) for one in about]

    def share(self, text: str, facts: Facts, mine: Collection[str]) -> float:
        """The largest share of the text's n-grams that stand in one text of training which speaks of nothing of `mine`;
        n-grams of the facts are nobody's. A text shorter than an n-gram copies nothing."""
        tokens = tokens_of(text)
        grams = [tokens[i : i + WINDOW] for i in range(len(tokens) - WINDOW + 1)]
        if not grams or not len(self.hashes):
            return 0.0
        counts: dict[int, int] = {}
        for gram, hashed in zip(grams, _hashes(tokens).tolist(), strict=True):
            if facts.hold(gram):
                continue
            first, last = (int(np.searchsorted(self.hashes, np.uint64(hashed), side)) for side in ("left", "right"))
            for owner in self.owners[first:last].tolist():
                counts[owner] = counts.get(owner, 0) + 1
        others = (n for owner, n in counts.items() if self.about[owner].isdisjoint(mine))
        return max(others, default=0) / len(grams)


def _hashes(tokens: Sequence[str]) -> np.ndarray:
    """uint64 `[n]`: a hash of every run of `WINDOW` tokens."""
    runs = (tokens[i : i + WINDOW] for i in range(len(tokens) - WINDOW + 1))
    return np.array(
        [xxhash.xxh3_64_intdigest("\x1f".join(run).encode("utf-8", "surrogatepass")) for run in runs], np.uint64
    )


# -- both ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grounding:
    """`share` of the names in a text that are true, `found` and `missing`; `copied`; `holds`: whether it may be said."""

    share: float
    copied: float
    found: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return self.share >= LEAST and self.copied <= MOST_COPIED


def ground(text: str, lexicon: Lexicon, facts: Facts, copies: Copies, mine: Collection[str] = ()) -> Grounding:
    """How a text stands to the facts and to training; one that names nothing has nothing to stand on: share 0."""
    named = lexicon.named(text)
    true = [gram for gram in named if facts.hold(gram)]
    false = [gram for gram in named if not facts.hold(gram)]
    share = len(true) / len(named) if named else 0.0
    return Grounding(share, copies.share(text, facts, mine), tuple(map(_said, true)), tuple(map(_said, false)))


def _said(gram: Gram) -> str:
    """A name as one text, written as its script is."""
    return ("" if all(map(is_cjk, gram)) else " ").join(gram)
