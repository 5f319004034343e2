"""Tasks: what an example of each is made of. A task = builder + objective; a mixture weighs tasks.

A builder turns a stretch of one record into a source and a target. `sizes` says how long they will be, for many
records at once and before any is read; `build` keeps within that. Tasks of other packages join by the entry
point group `m6rec_jax.tasks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from m6rec_jax.data.examples import Example, text_example
from m6rec_jax.data.history import spell_history
from m6rec_jax.data.records import DOCUMENT, HISTORY, ITEM, Record
from m6rec_jax.plugins import load_points
from m6rec_jax.vocab import BOS, EOS, NEXT, SAY, SPELL, USER, Vocab
from m6rec_jax.vocab import ITEM as OPEN_ITEM

SAID_ROOM = 64  # text tokens of an item that translation tasks read or write


@dataclass(frozen=True)
class Facts:
    """What builders must know of a data set. `attributes(user row)` gives text tokens, of which `attribute_room` less
    one are used; `kind_weights [kinds]`."""

    vocab: Vocab
    codes: np.ndarray
    timed: bool
    kind_weights: np.ndarray
    attributes: Callable[[int], np.ndarray] | None = None
    attribute_room: int = 0

    @property
    def levels(self) -> int:
        return self.codes.shape[1]


@dataclass(frozen=True)
class Piece:
    """One entry of the plan, for a builder: at most `stretch` tokens of the record from token `start` on, and a `draw`
    in [0, 1) that `sizes` saw too."""

    stretch: int
    start: int
    draw: float


@dataclass(frozen=True)
class Task:
    """How examples of one kind are made.

    `stretch(room, facts)`: record tokens that fit when source and target have `room` tokens together.
    `sizes(tokens [n], draws [n], facts) -> (source [n], target [n])`: lengths at most, for stretches of `tokens`.
    `build(record, piece, facts)`: the example. `records`: kinds of record it is made from; `least`: fewest units
    (events of a history, tokens of a text); `windows`: a long record gives several entries, one a stretch, that
    overlap by `overlap(facts)` tokens; `by_draw`: whether `build` looks at the draw. `instance`: a dataset's own task
    number, whose instances alone it is made from.
    """

    name: str
    records: tuple[int, ...]
    objective: str
    stretch: Callable[[int, Facts], int]
    sizes: Callable[[np.ndarray, np.ndarray, Facts], tuple[np.ndarray, np.ndarray]]
    build: Callable[[Record, Piece, Facts], Example]
    least: int = 1
    windows: bool = True
    overlap: Callable[[Facts], int] = lambda facts: 0
    by_draw: bool = True
    instance: int = -1


def tasks() -> dict[str, Task]:
    """Every task by name, those of other packages included. Raises InputError when two have one name."""
    return load_points("m6rec_jax.tasks", BUILT_IN)


# -- behaviour ---------------------------------------------------------------------------------------------------


def window_starts(tokens: int, stretch: int, overlap: int) -> np.ndarray:
    """Where the windows of a record begin: enough to cover it, spread evenly, the last one ending at its end.

    Whatever is at most `overlap + 1` tokens long lies whole in one of them.
    """
    count = max(1, -(-(tokens - overlap) // (stretch - overlap)))
    return np.floor(np.linspace(0, max(tokens - stretch, 0), count)).astype(np.int64)


def _event_overlap(facts: Facts) -> int:
    """A pause, a kind and an item's codes are one event, less one token."""
    return facts.levels + 1


@dataclass(frozen=True)
class _Events:
    """Whole events of a history: tokens, the row each completes, event of each, loss weight of each."""

    tokens: np.ndarray
    rows: np.ndarray
    events: np.ndarray
    predict: np.ndarray


def _events(record: Record, piece: Piece, facts: Facts) -> _Events:
    """The events of a window, none cut in half. Where a record marks targets, they are its end and alone predicted."""
    n_kinds = len(facts.kind_weights)
    tokens, rows, events = spell_history(
        facts.vocab, facts.codes, record.items, record.times, record.kinds, facts.timed, n_kinds, record.queries
    )
    predict = np.where(tokens >= facts.vocab.text.end, 1.0, 0.0).astype(np.float32)
    if n_kinds > 1:
        predict *= facts.kind_weights[record.kinds[events]]
    if record.targets:
        predict *= events >= len(record.items) - record.targets
    if len(tokens) > piece.stretch:
        start, stop = piece.start, piece.start + piece.stretch
        whole = np.ones(len(record.items), bool)  # events that lie in the window with all their tokens
        whole[events[:start]] = False
        whole[events[stop:]] = False
        kept = whole[events]
        tokens, rows, events, predict = tokens[kept], rows[kept], events[kept], predict[kept]
    return _Events(tokens, rows, events, predict)


def _none(n: int) -> np.ndarray:
    return np.full(n, -1, np.int32)


def _history(record: Record, piece: Piece, facts: Facts) -> Example:
    """[BOS] history. Left to right, every event predicts the next item; masked, hidden items are found again."""
    s = _events(record, piece, facts)
    return Example(np.array([BOS], np.int32), _none(1), s.tokens, s.rows, s.predict, s.events)


def _continued(tokens: np.ndarray, draws: np.ndarray, levels: int) -> np.ndarray:
    """Target tokens of a stretch: its last 10 to 50 %, in whole items, at least one."""
    return np.maximum(1, ((0.1 + 0.4 * draws) * tokens / levels).astype(np.int64)) * levels


def _history_seq2seq_sizes(tokens: np.ndarray, draws: np.ndarray, facts: Facts) -> tuple[np.ndarray, np.ndarray]:
    target = _continued(tokens, draws, facts.levels)
    return tokens - target + facts.attribute_room + 2, target


def _history_seq2seq(record: Record, piece: Piece, facts: Facts) -> Example:
    """[BOS] who the user is, earlier events, [NEXT] -> the items that came after, in order."""
    s = _events(record, piece, facts)
    planned = min(len(s.tokens), piece.stretch)
    wanted = record.targets or int(_continued(np.array(planned), np.array(piece.draw), facts.levels)) // facts.levels
    item_events = s.events[s.rows >= 0]
    first = item_events[max(len(item_events) - wanted, min(1, len(item_events) - 1))]
    before, target = s.events < first, (s.events >= first) & (s.tokens >= facts.vocab.text.end)
    about = [BOS]
    if facts.attributes:
        about += [USER, *facts.attributes(record.row)[: facts.attribute_room - 1]]
    source = np.concatenate([np.array(about, np.int32), s.tokens[before], np.array([NEXT], np.int32)])
    source_rows = np.concatenate([_none(len(about)), s.rows[before], _none(1)])
    return Example(source, source_rows, s.tokens[target], s.rows[target], s.predict[target], s.events[target])


# -- text --------------------------------------------------------------------------------------------------------


def _text_causal(record: Record, piece: Piece, facts: Facts) -> Example:
    """[BOS] text [EOS], left to right."""
    text, ends = _text_window(record, piece)
    return text_example(np.array([BOS], np.int32), np.append(text, EOS).astype(np.int32) if ends else text)


def _text(record: Record, piece: Piece, facts: Facts) -> Example:
    """Text of which the objective hides a part."""
    return text_example(np.zeros(0, np.int32), _text_window(record, piece)[0])


def _text_window(record: Record, piece: Piece) -> tuple[np.ndarray, bool]:
    """A window of the text and whether it reaches its end."""
    stop = piece.start + piece.stretch
    return record.tokens[piece.start : stop], stop >= len(record.tokens)


# -- translation between text and codes ----------------------------------------------------------------------------


def _said_stretch(room: int, facts: Facts) -> int:
    return min(SAID_ROOM, room - facts.levels - 2)


def _read_length(tokens: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """How much of an item's text is read: from its first fifth (the title, mostly) to all of it."""
    return np.ceil(tokens * (0.2 + 0.8 * draws)).astype(np.int64)


def _text_to_codes(record: Record, piece: Piece, facts: Facts) -> Example:
    """[SPELL] text [ITEM] -> codes of the item."""
    n = int(_read_length(np.array(min(len(record.tokens), piece.stretch)), np.array(piece.draw)))
    source = np.concatenate([[SPELL], record.tokens[:n], [OPEN_ITEM]]).astype(np.int32)
    return text_example(source, facts.vocab.spell(facts.codes[record.row]))


def _codes_to_text(record: Record, piece: Piece, facts: Facts) -> Example:
    """Codes [SAY] -> text [EOS]; the item's features stay out of the source, or the answer would stand in it."""
    source = np.append(facts.vocab.spell(facts.codes[record.row]), SAY).astype(np.int32)
    return text_example(source, np.append(record.tokens[: piece.stretch], EOS).astype(np.int32))


_after_bos = lambda tokens, draws, facts: (np.ones_like(tokens), tokens)  # noqa: E731
_alone = lambda tokens, draws, facts: (np.zeros_like(tokens), tokens)  # noqa: E731

BUILT_IN = (
    Task(
        "next-item", (HISTORY,), "causal", lambda room, facts: room - 1, _after_bos, _history, overlap=_event_overlap,
        by_draw=False,
    ),
    Task(
        "behaviour-masked", (HISTORY,), "masked", lambda room, facts: room - 1, _after_bos, _history, least=2,
        overlap=_event_overlap,
    ),
    Task(
        "behaviour-seq2seq", (HISTORY,), "seq2seq",
        lambda room, facts: room - facts.attribute_room - 2, _history_seq2seq_sizes, _history_seq2seq, least=2,
        overlap=_event_overlap,
    ),
    Task(
        "text-causal", (ITEM, DOCUMENT), "causal",
        lambda room, facts: room - 2, lambda tokens, draws, facts: (np.ones_like(tokens), tokens + 1), _text_causal,
        by_draw=False,
    ),
    Task("text-masked", (ITEM, DOCUMENT), "masked", lambda room, facts: room, _alone, _text, least=2),
    Task(
        "behaviour-replaced", (HISTORY,), "replaced", lambda room, facts: room - 1, _after_bos, _history, least=2,
        overlap=_event_overlap,
    ),
    Task("text-replaced", (ITEM, DOCUMENT), "replaced", lambda room, facts: room, _alone, _text, least=2),
    Task("text-infill", (ITEM, DOCUMENT), "infill", lambda room, facts: room, _alone, _text, least=2),
    Task(
        "text-to-codes", (ITEM,), "seq2seq", _said_stretch,
        lambda tokens, draws, facts: (_read_length(tokens, draws) + 2, np.full_like(tokens, facts.levels)),
        _text_to_codes, windows=False,
    ),
    Task(
        "codes-to-text", (ITEM,), "seq2seq", _said_stretch,
        lambda tokens, draws, facts: (np.full_like(tokens, facts.levels + 1), tokens + 1),
        _codes_to_text, windows=False,
    ),
)  # fmt: skip
