"""One id space: specials and text pieces | code level 1 | code level 2 | ... | code levels of a second domain | ... | options

Every slice is padded to a multiple of 128 with spare rows, so that new items or codes fill
spare rows without moving any id, and so that a slice divides over a mesh axis (DESIGN section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

PAD_MULTIPLE = 128
OPTIONS = "options"  # the name of the slice behind all others

# Ids 0..3 are SentencePiece's own; the rest are *control* symbols, which text can never produce.
CORE_SPECIALS = ("<pad>", "<unk>", "<s>", "</s>")
GAPS = (("<gap:hour>", 3600), ("<gap:day>", 86_400), ("<gap:week>", 604_800),
        ("<gap:month>", 2_592_000), ("<gap:year>", 31_536_000))  # fmt: skip
N_KINDS, N_SPANS, N_TASKS, N_RESERVED = 16, 64, 16, 32
CONTROL_SYMBOLS = (
    *("<mask>", "<sep>", "<item>", "<next>", "<spell>", "<say>", "<fill>", "<user>", "<context>"),
    *("<source>", "</source>", "<target>", "</target>"),  # M6-Rec's [BOS'] [EOS'] [BOS] [EOS]
    *(name for name, _ in GAPS),
    *(f"<kind:{i}>" for i in range(N_KINDS)),
    *(f"<span:{i}>" for i in range(N_SPANS)),
    *(f"<task:{i}>" for i in range(N_TASKS)),
    *(f"<reserved:{i}>" for i in range(N_RESERVED)),
)
SPECIALS = {name: i for i, name in enumerate((*CORE_SPECIALS, *CONTROL_SYMBOLS))}
PAD, UNK, BOS, EOS = (SPECIALS[s] for s in CORE_SPECIALS)
MASK, SEP, ITEM, NEXT = (SPECIALS[s] for s in ("<mask>", "<sep>", "<item>", "<next>"))
SPELL, SAY, FILL = (SPECIALS[s] for s in ("<spell>", "<say>", "<fill>"))
USER, SOURCE, TARGET = (SPECIALS[s] for s in ("<user>", "<source>", "<target>"))
END_SOURCE, END_TARGET = SPECIALS["</source>"], SPECIALS["</target>"]
KIND_0, SPAN_0 = SPECIALS["<kind:0>"], SPECIALS["<span:0>"]


@dataclass(frozen=True)
class Slice:
    """A run of ids: `offset .. offset + size` in use, up to `offset + padded` spare."""

    name: str
    offset: int
    size: int
    domain: int = 0
    atomic: bool = False  # the only level of its domain: a code is an item

    @property
    def padded(self) -> int:
        return -(-self.size // PAD_MULTIPLE) * PAD_MULTIPLE

    @property
    def end(self) -> int:
        return self.offset + self.padded


@dataclass(frozen=True)
class Vocab:
    """`pieces` text ids (specials included) and one codebook size a level; `others`: those of further domains.

    Domains share text and are trained together; a dataset, and what decodes for it, knows its own levels only (`domain`).
    `options`: how many options each task with options has, in the order of the tasks; all of them lie in one last slice.
    """

    pieces: int
    codebooks: tuple[int, ...]
    others: tuple[tuple[int, ...], ...] = ()
    options: tuple[int, ...] = ()

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """The text slice, then one slice a code level, domain after domain; where there are options, theirs."""
        made = [Slice("text", 0, self.pieces)]
        for domain, sizes in enumerate((self.codebooks, *self.others)):
            prefix = domain_prefix(domain)
            for level, size in enumerate(sizes, 1):
                made.append(Slice(f"{prefix}level{level}", made[-1].end, size, domain, len(sizes) == 1))
        if self.options:
            made.append(Slice(OPTIONS, made[-1].end, sum(self.options)))
        return tuple(made)

    @property
    def text(self) -> Slice:
        return self.slices[0]

    @property
    def levels(self) -> tuple[Slice, ...]:
        """The code levels of the only domain, or of the first."""
        return self.slices[1 : 1 + len(self.codebooks)]

    @property
    def domains(self) -> int:
        """How many domains there are."""
        return 1 + len(self.others)

    def domain(self, number: int) -> Vocab:
        """The id space of one domain alone: the same text, its levels right behind it, no options."""
        return Vocab(self.pieces, (self.codebooks, *self.others)[number])

    def joined(self, other: Vocab) -> Vocab:
        """This id space with the levels of another one behind its own, and so with options; both have the same text."""
        others = (*self.others, other.codebooks, *other.others)
        return Vocab(self.pieces, self.codebooks, others, (*self.options, *other.options))

    def option(self, task: int, label: int) -> int:
        """The token id of option `label` of a task, whose number counts the tasks with options from 0."""
        if not 0 <= label < self.options[task]:
            raise ValueError(f"option {label} of {self.options[task]}")
        return self.slices[-1].offset + sum(self.options[:task]) + label

    @property
    def codes_end(self) -> int:
        """Where the code levels of all domains end, and options begin."""
        return self.slices[sum(map(len, (self.codebooks, *self.others)))].end

    @property
    def size(self) -> int:
        return self.slices[-1].end

    def spell(self, codes: np.ndarray) -> np.ndarray:
        """Token ids `[..., L]` of codes `[..., L]` (each in `0..codebook`)."""
        offsets = np.array([s.offset for s in self.levels], np.int32)
        return (codes + offsets).astype(np.int32)

    def slice_index(self, tokens: np.ndarray) -> np.ndarray:
        """Index into `slices` of each token."""
        ends = np.array([s.end for s in self.slices])
        return np.searchsorted(ends, tokens, side="right")

    def as_dict(self) -> dict[str, object]:
        made: dict[str, object] = {"pieces": self.pieces, "codebooks": list(self.codebooks)}
        made |= {"others": [list(sizes) for sizes in self.others]} if self.others else {}
        return made | ({"options": list(self.options)} if self.options else {})

    @classmethod
    def from_dict(cls, data: dict) -> Vocab:
        sizes = [tuple(int(n) for n in some) for some in (data["codebooks"], *data.get("others", ()))]
        return cls(int(data["pieces"]), sizes[0], tuple(sizes[1:]), tuple(int(n) for n in data.get("options", ())))


def domain_prefix(domain: int) -> str:
    """What names of a domain's own parts begin with: nothing for the first, so that one domain has plain names."""
    return f"domain{domain + 1}_" if domain else ""


def gap_token(seconds: int) -> int | None:
    """The token that says how long the pause before an event was; None under an hour."""
    chosen = None
    for name, least in GAPS:
        if seconds >= least:
            chosen = SPECIALS[name]
    return chosen


def gap_tokens(seconds: Sequence[int] | np.ndarray) -> np.ndarray:
    """`gap_token` for many pauses at once; 0 (`<pad>`) where no token is written."""
    bounds = np.array([least for _, least in GAPS])
    bucket = np.searchsorted(bounds, np.asarray(seconds), side="right")
    ids = np.array([PAD, *(SPECIALS[name] for name, _ in GAPS)], np.int32)
    return ids[bucket]
