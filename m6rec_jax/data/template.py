"""Templates: how the named fields of an instance become text (M6-Rec, section 3: behaviour as plain text).

A template is a YAML file. Its lines are the fine segments of the source, `{field}` stands for a value, and what stands in
`[brackets]` is left out when a field in it is empty or not there; a line whose field is empty is left out. `\\` before
one of `{}[]\\` takes it as it is. Only the template is ever read for braces: a value is data, whatever it looks like.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from m6rec_jax.data.card_checks import known, short
from m6rec_jax.errors import InputError

FOLDER = Path(__file__).parent / "templates"
LANGUAGES = ("en", "zh")
OBJECTIVES = ("scoring", "classify", "retrieval", "plausibility", "text")
WITH_OPTIONS = ("scoring", "classify")
KEYS = ("task", "language", "objective", "metric", "source", "opening", "target", "options")
TAKEN = ("instance", "user_id", "item_id", "split", "label", "answer")  # columns of every table of instances
CODES = "codes"  # `{field:codes}`: an item spelled by its codes, not said by its text


@dataclass(frozen=True)
class Field:
    """`{name}` or `{name:codes}` in a template."""

    name: str
    codes: bool = False


@dataclass(frozen=True)
class Maybe:
    """`[...]` in a template: left out as a whole when a field in it is empty or not there."""

    nodes: tuple[str | Field, ...]


Nodes: TypeAlias = tuple[str | Field | Maybe, ...]


@dataclass(frozen=True)
class Line:
    """One segment of a source, or one an event where `each` names a history."""

    nodes: Nodes
    each: str = ""


@dataclass(frozen=True)
class Template:
    """How instances of a task read in one language. `options`: names of the options, where the template names them;
    `opening`: lines after the source; `target`: the answer, or the item of a retrieval. `body`: what `parse_template` read."""

    task: str
    language: str
    objective: str
    metric: str
    source: tuple[Line, ...]
    opening: tuple[Line, ...] = ()
    target: Nodes = ()
    options: tuple[str, ...] = ()
    origin: str = "template"
    body: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def with_options(self) -> bool:
        """Whether an instance is answered by the number of an option."""
        return self.objective in WITH_OPTIONS

    @property
    def needed(self) -> tuple[str, ...]:
        """Fields that a table must have, in the order of their first mention."""
        return tuple(dict.fromkeys(name for name, may in self._fields() if not may))

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field that is mentioned, those within brackets included."""
        return tuple(dict.fromkeys(name for name, _ in self._fields()))

    @property
    def histories(self) -> tuple[str, ...]:
        """Fields that are lists of events."""
        return tuple(dict.fromkeys(line.each for line in (*self.source, *self.opening) if line.each))

    @property
    def spelled(self) -> tuple[str, ...]:
        """Fields that are items to be spelled by codes."""
        every = (*self.source, *self.opening, Line(self.target))
        return tuple(
            dict.fromkeys(f.name for line in every if not line.each for f, _ in _mentioned(line.nodes) if f.codes)
        )

    def spelled_events(self, history: str) -> tuple[str, ...]:
        """What of the events of a history are items to be spelled by codes."""
        every = (line for line in (*self.source, *self.opening) if line.each == history)
        return tuple(dict.fromkeys(f.name for line in every for f, _ in _mentioned(line.nodes) if f.codes))

    @property
    def answer_fields(self) -> tuple[str, ...]:
        """Fields of the answer."""
        return tuple(dict.fromkeys(field.name for field, _ in _mentioned(self.target)))

    def _fields(self) -> Iterator[tuple[str, bool]]:
        for line in (*self.source, *self.opening, Line(self.target)):
            if line.each:
                yield line.each, True  # a user without a history is a user all the same
            else:
                yield from ((field.name, may) for field, may in _mentioned(line.nodes))


def _mentioned(nodes: Nodes) -> Iterator[tuple[Field, bool]]:
    for node in nodes:
        if isinstance(node, Field):
            yield node, False
        elif isinstance(node, Maybe):
            yield from ((part, True) for part in node.nodes if isinstance(part, Field))


def built_in(language: str) -> list[str]:
    """Names of the templates that come with the package."""
    return sorted(path.stem for path in (FOLDER / language).glob("*.yaml"))


def load_template(name_or_path: str | Path, language: str = "") -> Template:
    """A built-in template by its name (English unless `language` says otherwise), or one from a YAML file.

    Raises InputError, in one line that names file, key and value, for anything that is not a template.
    """
    if language and language not in LANGUAGES:
        raise InputError(f"language: {language}: {known(language, LANGUAGES, 'choose one of')}")
    name = str(name_or_path)
    if name in built_in(language or "en"):
        return _read(FOLDER / (language or "en") / f"{name}.yaml")
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        there = known(name, built_in(language or "en"), "built in")
        raise InputError(f"template: {name}: no such template; {there}; or name a YAML file")
    if not path.is_file():
        raise InputError(f"template: {path}: no such file; write one (docs/tasks.md), or name a built-in template")
    made = _read(path)
    if language and made.language != language:
        raise InputError(f"{path}: language: {made.language}: the task asks for {language}; write them alike")
    return made


@cache
def _parsed(path: Path, stamp: tuple[int, int]) -> Template:
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save the template as UTF-8") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}; correct that line") from None
    return parse_template(body, str(path))


def _read(path: Path) -> Template:
    stat = path.stat()
    return _parsed(path, (stat.st_mtime_ns, stat.st_size))


def parse_template(body: Any, origin: str = "template") -> Template:
    """The template that a mapping spells out; InputError for an unknown key or language, or for what is missing."""
    if not isinstance(body, dict):
        raise InputError(f"{origin}: {short(body)} where keys are needed: {', '.join(KEYS)}")
    for key, value in body.items():
        if key not in KEYS:
            raise InputError(f"{origin}: {key}: unknown key (value {short(value)}); {known(key, KEYS, 'known keys')}")
        if value is None or value in ("", []):
            raise InputError(f"{origin}: {key}: empty; give it a value or remove the line")
    for key in ("task", "language", "objective", "metric", "source"):
        if key not in body:
            raise InputError(f"{origin}: {key}: missing; a template has at least task, language, objective, metric and source")  # fmt: skip
    for key in ("task", "language", "objective", "metric"):
        if not isinstance(body[key], str):
            raise InputError(f"{origin}: {key}: {short(body[key])} where one word is needed; write it in quotes")
    for key, choices in (("language", LANGUAGES), ("objective", OBJECTIVES)):
        if body[key] not in choices:
            raise InputError(f"{origin}: {key}: {body[key]}: {known(body[key], choices, 'choose one of')}")
    with_options = body["objective"] in WITH_OPTIONS
    if with_options and "target" in body:
        raise InputError(f"{origin}: target: a {body['objective']} template is answered by one of its options; remove the line, or choose another objective")  # fmt: skip
    if not with_options and "target" not in body:
        raise InputError(f'{origin}: target: missing; say what is to be written, such as target: "{{reason}}"')
    if not with_options and "options" in body:
        raise InputError(f"{origin}: options: only scoring and classify have options, and this is {body['objective']}; remove the line")  # fmt: skip
    target = body.get("target", "")
    if not isinstance(target, str) or (not with_options and not target.strip()):
        raise InputError(f"{origin}: target: {short(target)}: empty, or no text; write a line such as '{{reason}}'")
    nodes = _nodes(target, f"{origin}: target") if target else ()
    if target and not any(True for _ in _mentioned(nodes)):
        raise InputError(f"{origin}: target: {short(target)}: has no field, so every answer would be the same; put one in braces")  # fmt: skip
    made = Template(
        body["task"],
        body["language"],
        body["objective"],
        body["metric"],
        _lines(body["source"], f"{origin}: source"),
        _lines(body["opening"], f"{origin}: opening") if "opening" in body else (),
        nodes,
        _options(body, origin),
        origin,
        body,
    )
    if taken := [name for name in made.fields if name in TAKEN]:
        raise InputError(f"{origin}: {{{taken[0]}}}: a column that every task has; give the field another name")
    return made


def _options(body: Mapping[str, Any], origin: str) -> tuple[str, ...]:
    given = body.get("options", [])
    where = f"{origin}: options"
    if not isinstance(given, list) or any(isinstance(one, dict | list) or one is None for one in given):
        raise InputError(f"{where}: {short(given)} where a list of names is needed, such as ['no', 'yes']")
    # YAML reads a bare yes or no as a truth value, and nobody who writes options means one.
    names = tuple({True: "yes", False: "no"}[one] if isinstance(one, bool) else str(one) for one in given)
    if len(set(names)) < len(names):
        raise InputError(f"{where}: {short(given)}: a name twice; every option needs its own")
    if given and body["objective"] == "scoring" and len(names) != 2:
        raise InputError(f"{where}: {len(names)} options: scoring has two, the negative first; choose classify for more")  # fmt: skip
    if "options" in body and len(names) < 2:
        raise InputError(f"{where}: {len(names)} options: at least two are needed")
    return names


def _lines(given: Any, where: str) -> tuple[Line, ...]:
    made = []
    for number, one in enumerate(given if isinstance(given, list) else [given], 1):
        here = f"{where}: line {number}"
        if isinstance(one, dict):
            unknown = [key for key in one if key not in ("each", "line")]
            if unknown:
                raise InputError(f"{here}: {unknown[0]}: unknown key; a line of events is {{each: FIELD, line: TEXT}}, and text with braces goes in quotes")  # fmt: skip
            each, text = one.get("each"), one.get("line")
            if not isinstance(each, str) or not each.isidentifier():
                raise InputError(f"{here}: each: {short(each)}: name the field that holds the events, such as history")
            if where.endswith("opening"):
                raise InputError(f"{here}: each: {each}: events belong into the source; move the line there")
            made.append(Line(_text(text, here), each))
        else:
            made.append(Line(_text(one, here)))
    return tuple(made)


def _text(text: Any, where: str) -> Nodes:
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: {short(text)} where text is needed; write it in quotes")
    return _nodes(text, where)


def _nodes(text: str, where: str) -> Nodes:
    """A line in parts. Raises InputError for a brace or bracket without its other half."""
    made: list[str | Field | Maybe] = []
    inner: list[str | Field] | None = None
    plain, at = "", 0

    def put(node: str | Field) -> None:
        if node != "":
            (made if inner is None else inner).append(node)

    while at < len(text):
        c = text[at]
        if c == "\\" and text[at + 1 : at + 2] in ("{", "}", "[", "]", "\\"):
            plain, at = plain + text[at + 1], at + 2
            continue
        if c not in "{}[]":
            plain, at = plain + c, at + 1
            continue
        put(plain)
        plain = ""
        if c == "{":
            end = text.find("}", at)
            name, _, how = text[at + 1 : end if end >= 0 else len(text)].partition(":")
            if end < 0 or not name.isidentifier() or how not in ("", CODES):
                raise InputError(f"{where}: {short(text[at:])}: no field; write {{name}}, or \\{{ for a brace")
            put(Field(name, how == CODES))
            at = end
        elif c == "[" and inner is None:
            inner = []
        elif c == "]" and inner is not None:
            if not any(isinstance(node, Field) for node in inner):
                raise InputError(f"{where}: {short(text)}: brackets without a field are never left out; write \\[ for a bracket")  # fmt: skip
            made.append(Maybe(tuple(inner)))
            inner = None
        else:
            raise InputError(f"{where}: {short(text[at:])}: {c} without its other half; write \\{c} for the character")
        at += 1
    put(plain)
    if inner is not None:
        raise InputError(f"{where}: {short(text)}: [ without its other half; write \\[ for the character")
    return tuple(made)
