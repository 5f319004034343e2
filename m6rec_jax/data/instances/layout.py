"""An instance as tokens: encoded once, whole, and laid out anew for whatever room there is.

`<s> <source> segment <sep> segment ... </source> <target> opening ...`: M6-Rec's [BOS'] ... [EOS'] [BOS] ... [EOS]. What
is answered by an option ends in `</target>`, where the option is predicted; text goes on with the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from m6rec_jax.data.records import INSTANCE, Record
from m6rec_jax.data.rendering import ItemRef, Parts, Rendered
from m6rec_jax.data.template import WITH_OPTIONS
from m6rec_jax.data.tokenizer import Tokenizer
from m6rec_jax.vocab import BOS, END_SOURCE, END_TARGET, EOS, ITEM, SEP, SOURCE, TARGET, Vocab

AROUND = {"scoring": 5, "classify": 5, "retrieval": 6, "plausibility": 4, "text": 4}  # control symbols but <sep>


@dataclass(frozen=True)
class Laid:
    """An instance in the room it was given: `source` and `target` tokens, and the catalogue row that each completes.

    `bounds` [s, 2]: where the segments that are left begin and end in `source`, for what runs each of them alone. `target`
    is the answer and `</s>` (which is missing where the answer was cut), the other text of a retrieval, or nothing.
    """

    source: np.ndarray
    source_rows: np.ndarray
    target: np.ndarray
    target_rows: np.ndarray
    bounds: np.ndarray


def encode_instances(
    rendered: Sequence[Rendered],
    tokenizer: Tokenizer,
    vocab: Vocab,
    codes: np.ndarray,
    task: int = -1,
    labels: Sequence[int] | None = None,
) -> Iterator[Record]:
    """Records of instances, in order. An item to be spelled becomes `<item>` and its codes [L], by id; every text goes
    through the tokenizer, which never gives a control symbol."""
    distinct = dict.fromkeys(parts for one in rendered for parts in (*(s.parts for s in one.segments), one.opening, one.answer))  # fmt: skip
    texts = list(dict.fromkeys(part for parts in distinct for part in parts if isinstance(part, str)))
    coded = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    spelled = {parts: _spelled(parts, coded, vocab, codes) for parts in distinct}
    for number, one in enumerate(rendered):
        found = [(spelled[segment.parts], segment.past) for segment in one.segments]
        body = [(line, past) for line, past in found if len(line[0])]
        opening, answer = spelled[one.opening], spelled[one.answer]
        rows = np.concatenate([*(line[1] for line, _ in body), opening[1], answer[1]])
        yield Record(
            INSTANCE,
            number,
            task=task,
            tokens=np.concatenate([line[0] for line, _ in body]) if body else opening[0][:0],
            segments=np.array([len(line[0]) for line, _ in body], np.int32),
            past=np.array([past for _, past in body], np.uint8),
            opening=opening[0],
            answer=answer[0],
            label=-1 if labels is None else int(labels[number]),
            rows=rows if (rows >= 0).any() else rows[:0],
        )


def _spelled(parts: Parts, coded: Mapping[str, list[int]], vocab: Vocab, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Tokens of a line `[t]`, and the catalogue row that each completes."""
    tokens: list[int] = []
    rows: list[int] = []
    for part in parts:
        own = [ITEM, *vocab.spell(codes[part.row]).tolist()] if isinstance(part, ItemRef) else coded[part]
        tokens += own
        rows += [-1] * len(own)
        if isinstance(part, ItemRef):
            rows[-1] = part.row
    return np.array(tokens, np.int32), np.array(rows, np.int32)


def whole_length(record: Record, objective: str) -> int:
    """Tokens of source and target together where nothing is cut: what `lay_out` needs, the option counted."""
    body = len(record.tokens) + max(len(record.segments) - 1, 0) + len(record.opening) + len(record.answer)
    return AROUND[objective] + body + (objective != "retrieval")  # the option, or </s>


def lay_out(record: Record, objective: str, room: int) -> Laid:
    """An instance in at most `room` tokens, the option counted (it is not in `target`; the caller knows its id).

    Over budget the oldest events of histories go first, one after the other; then the longest fields are cut at their
    end, until all that is left has one length. Raises ValueError when not even the control symbols fit.
    """
    has_answer = objective not in WITH_OPTIONS
    spare = room - AROUND[objective] - (objective != "retrieval")
    if spare < 2:
        raise ValueError(f"an instance does not fit {room} tokens")
    ends = np.cumsum(record.segments, dtype=np.int64)
    starts = ends - record.segments
    keep = _without_oldest(record, spare)
    fields = [(int(starts[i]), int(ends[i])) for i in np.flatnonzero(keep).tolist()]
    at = len(record.tokens)
    others = [(at, at + len(record.opening))]
    at += len(record.opening)
    others.append((at, at + len(record.answer)))
    fields, others, whole = _cut(fields, others, spare)
    every = np.concatenate([record.tokens, record.opening, record.answer]).astype(np.int32)
    rows = record.rows if len(record.rows) else np.full(len(every), -1, np.int32)
    source, bounds = _Line(every, rows), []
    source.add(BOS, SOURCE)
    for number, span in enumerate(fields):
        if number:
            source.add(SEP)
        begin = len(source.tokens)
        source.take(span)
        bounds.append((begin, len(source.tokens)))
    source.add(END_SOURCE)
    target = _Line(every, rows)
    if objective == "retrieval":
        target.add(BOS, TARGET)
        target.take(others[0])
        target.take(others[1])
        target.add(END_TARGET)
    else:
        source.add(TARGET)
        source.take(others[0])
        if has_answer:
            target.take(others[1])
            if whole:
                target.add(EOS)
        else:
            source.add(END_TARGET)
    bounds_array = np.array(bounds, np.int32).reshape(-1, 2)
    return Laid(*source.arrays(), *target.arrays(), bounds_array)


def encode_instance(
    rendered: Rendered, tokenizer: Tokenizer, vocab: Vocab, codes: np.ndarray, objective: str, room: int
) -> Laid:
    """One instance from its text, as a request brings it: `encode_instances` and `lay_out` at once."""
    return lay_out(next(encode_instances([rendered], tokenizer, vocab, codes)), objective, room)


class _Line:
    """Tokens being put together, and the row that each completes."""

    def __init__(self, every: np.ndarray, rows: np.ndarray):
        self.tokens: list[int] = []
        self.rows: list[int] = []
        self._every, self._rows = every, rows

    def add(self, *controls: int) -> None:
        self.tokens += controls
        self.rows += [-1] * len(controls)

    def take(self, span: tuple[int, int]) -> None:
        self.tokens += self._every[slice(*span)].tolist()
        self.rows += self._rows[slice(*span)].tolist()

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.tokens, np.int32), np.array(self.rows, np.int32)


def _without_oldest(record: Record, spare: int) -> np.ndarray:
    """[s] bool: which segments stay when events go, the oldest first, until all fits or no event is left."""
    keep = np.ones(len(record.segments), bool)
    need = len(record.tokens) + max(len(record.segments) - 1, 0) + len(record.opening) + len(record.answer) - spare
    for place in np.flatnonzero(record.past):
        if need <= 0:
            break
        keep[place] = False
        need -= int(record.segments[place]) + (int(keep.sum()) > 0)
    return keep


Spans = list[tuple[int, int]]


def _cut(fields: Spans, others: Spans, spare: int) -> tuple[Spans, Spans, bool]:
    """Spans that fit `spare` tokens with a <sep> between fields, and whether the last of `others` is whole."""
    while True:
        lengths = np.array([stop - start for start, stop in (*fields, *others)])
        room = spare - max(len(fields) - 1, 0)
        if room >= np.count_nonzero(lengths) or not fields:
            break
        fields = fields[1:]  # not even a token each
    made = _levelled(lengths, room)
    spans = [(start, start + n) for (start, _), n in zip((*fields, *others), made.tolist(), strict=True)]
    return spans[: len(fields)], spans[len(fields) :], bool(made[-1] == lengths[-1])


def _levelled(lengths: np.ndarray, room: int) -> np.ndarray:
    """The lengths `[n]` cut to a sum of at most `room`: the longest first, down to one level."""
    if lengths.sum() <= room:
        return lengths
    low, high = 0, int(lengths.max())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(lengths, middle).sum() <= room else (low, middle - 1)
    made = np.minimum(lengths, low)
    more = np.flatnonzero(lengths > low)[: room - int(made.sum())]
    made[more] += 1
    return made
