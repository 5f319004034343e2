"""The data card: which tables there are, what their columns mean, how they are cleaned and split.

Parsed strictly: every refusal is one line that names the card, the key, the value found and the way out.
"""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import yaml

from m6rec_jax.data.card_checks import example, is_frame, known, short
from m6rec_jax.data.card_types import (
    UNSAID,
    Card,
    CardTask,
    Clean,
    Content,
    Corpus,
    Events,
    Impressions,
    Items,
    Privacy,
    Quality,
    Split,
    Users,
)
from m6rec_jax.errors import InputError

__all__ = ["Card", "CardTask", "Clean", "Content", "Corpus", "Events", "Impressions", "Items", "Privacy", "Quality", "Split", "Users", "load_card"]  # fmt: skip

SECTIONS: dict[str, type] = {
    "events": Events,
    "items": Items,
    "users": Users,
    "corpus": Corpus,
    "impressions": Impressions,
    "split": Split,
    "clean": Clean,
    "privacy": Privacy,
    "quality": Quality,
    "content": Content,
}


def load_card(source: Path | str | dict | Card) -> Card:
    """Read a card from a YAML file, or from a dict (whose paths may be DataFrames).

    Raises InputError on an unknown key, a value of the wrong type, a missing file or a contradiction.
    """
    if isinstance(source, Card):
        return source
    if isinstance(source, dict):
        return _parse(source, "card", Path())
    path = Path(source)
    if path.is_dir():
        raise InputError(
            f"{path}: a folder, not a card; name a file in it, or draft one: m6rec data card --from {path}"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such card; write one, or draft it: m6rec data card --from FOLDER")
    try:
        data = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save the card as UTF-8") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}; correct that line") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: {short(data)} where keys are needed; a card has at least `name:` and `events:`")
    return _parse(data, str(path), path.parent)


class _Loader(yaml.SafeLoader):
    """YAML whose only booleans are true and false (a column may be called `no` or `on`), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_UNWANTED = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in _UNWANTED]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _parse(data: dict, origin: str, folder: Path) -> Card:
    names = [f.name for f in fields(Card) if f.name not in UNSAID]
    made: dict[str, Any] = {}
    for key, value in data.items():
        if key not in names:
            raise InputError(f"{origin}: {key}: unknown key (value {short(value)}); {known(key, names, 'known keys')}")
        if value is None:
            raise InputError(f"{origin}: {key}: empty; give it a value or remove the line")
        if key == "split" and isinstance(value, str):
            value = {"rule": value}
        if key == "tasks":
            value = _tasks(value, origin, folder)
        if key in SECTIONS and not isinstance(value, SECTIONS[key]):
            value = _section(key, value, origin, folder)
        made[key] = value
    for key in ("name", "events"):
        if key not in made:
            raise InputError(f"{origin}: {key}: missing; a card has at least `name:` and `events:`")
    made["name"] = _name(made["name"], f"{origin}: name")
    return Card(**made, origin=origin, given=frozenset(made))


def _tasks(value: Any, origin: str, folder: Path) -> dict[str, CardTask]:
    """Tasks by name; a list names those that are made from the other tables with nothing else to say."""
    if isinstance(value, list | tuple):
        value = {_name(one, f"{origin}: tasks"): {} for one in value}
    if not isinstance(value, dict) or not value:
        raise InputError(f"{origin}: tasks: {short(value)} where tasks are needed; write name: {{...}}, or a list of names")  # fmt: skip
    made = {}
    for name, given in value.items():
        name = _name(name, f"{origin}: tasks")
        task = given if isinstance(given, CardTask) else _section(f"tasks.{name}", given or {}, origin, folder)
        if str(task.template).endswith((".yaml", ".yml")):
            task = replace(task, template=_located(str(task.template), folder))
        made[name] = task
    return made


def _section(section: str, value: Any, origin: str, folder: Path) -> Any:
    kind = SECTIONS.get(section, CardTask)
    names = [f.name for f in fields(kind)]
    if not isinstance(value, dict):
        raise InputError(f"{origin}: {section}: {short(value)} where keys are needed; {known('', names, 'its keys')}")
    types = {f.name: f.type for f in fields(kind)}
    made: dict[str, Any] = {}
    for key, given in value.items():
        where = f"{origin}: {section}.{key}"
        if key not in types:
            raise InputError(f"{where}: unknown key (value {short(given)}); {known(key, names, 'known keys')}")
        if given is None:
            raise InputError(f"{where}: empty; give it a value or remove the key")
        made[key] = _convert(str(types[key]), given, where, folder)
    for f in fields(kind):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in made:
            raise InputError(f"{origin}: {section}.{f.name}: missing; {example(section, f.name)}")
    if made.get("key"):
        made["key"] = str(_located(made["key"], folder))
    return kind(**made)


def _convert(declared: str, given: Any, where: str, folder: Path) -> Any:
    """`given` as the type that a field declares (by name: annotations are strings here)."""
    if declared == "Table":
        return given if is_frame(given) else _files(given, where, folder)
    if declared.startswith("dict"):
        if not isinstance(given, dict):
            raise InputError(f"{where}: {short(given)} where names are needed; write {{field: column}}")
        return {
            _name(key, where): _convert("dict", one, where, folder) if isinstance(one, dict) else _name(one, where)
            for key, one in given.items()
        }
    if "Columns" in declared:
        if isinstance(given, list | tuple):
            return tuple(_name(one, where) for one in given)
        return _name(given, where) if "str" in declared else (_name(given, where),)
    if declared.startswith("float"):
        if isinstance(given, bool) or not isinstance(given, int | float) or math.isnan(given):
            raise InputError(f"{where}: {short(given)} is not a number; write one such as 0.1")
        return float(given)
    if declared.startswith("int"):
        if isinstance(given, bool) or not isinstance(given, int):
            raise InputError(f"{where}: {short(given)} is not a whole number; write one such as 3")
        return given
    return _name(given, where)


def _files(given: Any, where: str, folder: Path) -> Path | tuple[Path, ...]:
    """One file, or in reading order those of a list or of a pattern with `*`."""
    if isinstance(given, list | tuple):
        if not given:
            raise InputError(f"{where}: an empty list; name at least one file")
        return tuple(_located(_name(one, where), folder) for one in given)
    path = _located(_name(given, where), folder)
    if "*" not in path.name or path.is_file():
        return path
    found = tuple(sorted(path.parent.glob(path.name)))
    if not found:
        raise InputError(f"{where}: {path}: no file matches; name one that exists")
    return found


def _name(given: Any, where: str) -> str:
    if isinstance(given, dict | list | tuple) or given is None or (not isinstance(given, Path) and is_frame(given)):
        raise InputError(f"{where}: {short(given)} where one name is needed; write the name alone")
    return str(given)


def _located(given: str, folder: Path) -> Path:
    path = Path(given).expanduser()
    return path if path.is_absolute() else folder / path
