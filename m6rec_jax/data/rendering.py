"""Templates filled in: the named fields of an instance become segments of text, and items to be spelled.

Only the template is ever read for braces: a value is data, whatever it looks like.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from m6rec_jax.data.template import Field, Maybe, Nodes, Template


@dataclass(frozen=True)
class ItemRef:
    """An item to be spelled by its codes: its catalogue row."""

    row: int


Part: TypeAlias = str | ItemRef
Parts: TypeAlias = tuple[Part, ...]


@dataclass(frozen=True)
class Segment:
    """A piece of the source; `past`: an event of a history, which a tight budget drops, the oldest first."""

    parts: Parts
    past: bool = False


@dataclass(frozen=True)
class Rendered:
    """An instance as text: segments of the source, the oldest event first; what opens the target; the answer."""

    segments: tuple[Segment, ...]
    opening: Parts
    answer: Parts

    def text(self) -> str:
        """All of it in one line, for people."""
        return " ".join(said(parts) for parts in (*(s.parts for s in self.segments), self.opening, self.answer) if parts)  # fmt: skip


def said(parts: Parts) -> str:
    """Parts as one text, for people: an item that is spelled shows as its row."""
    return "".join(part if isinstance(part, str) else f"<item {part.row}>" for part in parts)


def render(template: Template, fields: Mapping[str, Any]) -> Rendered:
    """A template filled in. `fields`: text or numbers, for a history a sequence of events (text, or mappings of fields),
    for an item to be spelled its catalogue row. None, "" and a history without events are empty.

    Raises KeyError for a field that the template needs and `fields` does not have.
    """
    return next(render_all(template, [fields]))


def render_all(template: Template, rows: Iterable[Mapping[str, Any]]) -> Iterator[Rendered]:
    """`render` for many rows; an event that several of them tell is filled in once."""
    told: dict[Any, Segment | None] = {}
    for fields in rows:
        segments = []
        for number, line in enumerate(template.source):
            if not line.each:
                if parts := _fill(line.nodes, fields, False):
                    segments.append(Segment(parts))
                continue
            for event in fields.get(line.each) or ():
                event = event if isinstance(event, Mapping) else {"title": event}
                key = (number, *event.keys(), *event.values())
                if key not in told:
                    parts = _fill(line.nodes, event, True)
                    told[key] = Segment(parts, True) if parts else None
                if (segment := told[key]) is not None:
                    segments.append(segment)
        opening: list[Part] = []
        for line in template.opening:
            if parts := _fill(line.nodes, fields, False):
                opening += [" ", *parts] if opening else parts
        yield Rendered(tuple(segments), _merged(opening), _fill(template.target, fields, True))


def _fill(nodes: Nodes, fields: Mapping[str, Any], lenient: bool) -> Parts:
    """The parts of a line; none when a field outside brackets is empty (`lenient`: or not there)."""
    made: list[Part] = []
    for node in nodes:
        if isinstance(node, str):
            made.append(node)
        elif isinstance(node, Maybe):
            inner = [part if isinstance(part, str) else _value(part, fields.get(part.name)) for part in node.nodes]
            if None not in inner:
                made += inner  # type: ignore[arg-type]
        else:
            value = _value(node, fields.get(node.name) if lenient else fields[node.name])
            if value is None:
                return ()
            made.append(value)
    merged = _merged(made)
    return () if all(isinstance(part, str) and not part.strip() for part in merged) else merged


def _value(field: Field, value: Any) -> Part | None:
    """A value as it is written; None when it is empty."""
    if value is None or value != value:
        return None
    if field.codes:
        return ItemRef(int(value)) if int(value) >= 0 else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value if isinstance(value, str) else str(value)
    return text if text.strip() else None


def _merged(parts: Sequence[Part]) -> Parts:
    """Neighbouring texts as one, spaces at both ends gone."""
    made: list[Part] = []
    for part in parts:
        if made and isinstance(part, str) and isinstance(made[-1], str):
            made[-1] += part
        elif part != "":
            made.append(part)
    return tuple(made)
