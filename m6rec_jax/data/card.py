"""The data card: which tables there are, what their columns mean, how they are cleaned and split.

Parsed strictly into frozen dataclasses. Every refusal is one line that names the card, the key, the value
found and the way out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

import polars as pl
import yaml

from m6rec_jax.errors import InputError
from m6rec_jax.vocab import N_KINDS

FORMATS = ("parquet", "csv", "tsv", "jsonl", "json", "recbole", "sequences")
TIME_UNITS = ("s", "ms", "iso", "order")
SPLIT_RULES = ("leave-one-out", "global-time", "ratio")
SUFFIXES = {
    **{".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"},
    **{".json": "json", ".inter": "recbole", ".item": "recbole", ".user": "recbole"},
}
COMPRESSED = (".gz", ".zst")

Table: TypeAlias = Any  # Path, or a polars/pandas DataFrame
Columns: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Events:
    """Who did what to which item when. With several `item` columns, or one in a list, a row is a whole history.

    Args:
        path: file beside the card, or a DataFrame.
        format: guessed from the file's ending when left out.
        user, item, time: column names; time may be left out with time_unit order (the rows' own order counts).
        time_unit: s, ms, iso, or order (any number that sorts).
        kind, value, text: optional columns: view/buy/..., rating, search query.
        encoding: of a text file.
    """

    path: Table
    format: str = ""
    user: str = ""
    item: str | Columns = ""
    time: str = ""
    time_unit: str = "s"
    kind: str = ""
    value: str = ""
    text: str = ""
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Items:
    """The catalogue.

    Args:
        path, format, encoding: as for events.
        id, title: column names.
        text: columns of running text, joined in this order.
        categories: columns with a category, a list, or a nested list of them.
        attributes: columns said as "name: value".
        numbers: columns of numbers (price, weight).
        type: column with the kind of item, for catalogues that mix them.
        published: column with a year, a date, or seconds or milliseconds since 1970.
        list_separator: between the values of a list that a text file writes as one cell.
        image, audio, video: columns with a path or address, carried along.
    """

    path: Table
    format: str = ""
    id: str = ""
    title: str = ""
    text: Columns = ()
    categories: Columns = ()
    attributes: Columns = ()
    numbers: Columns = ()
    type: str = ""
    published: str = ""
    list_separator: str = ""
    image: str = ""
    audio: str = ""
    video: str = ""
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Users:
    """What is known of users, said as "name: value"."""

    path: Table
    format: str = ""
    id: str = ""
    attributes: Columns = ()
    list_separator: str = ""
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Corpus:
    """Plain text documents for the language objectives."""

    path: Table
    format: str = ""
    text: Columns = ()
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Impressions:
    """What was shown, and whether it was clicked; `time_unit` is that of the events when left out."""

    path: Table
    format: str = ""
    user: str = ""
    item: str = ""
    time: str = ""
    time_unit: str = ""
    clicked: str = ""
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Split:
    """How events are parted; `valid` and `test` are shares of time (global-time) or of each user (ratio)."""

    rule: str
    valid: float = 0.1
    test: float = 0.1


@dataclass(frozen=True)
class Clean:
    """Thresholds of cleaning: minimum counts (of events that stay), unknown items, longest texts in characters."""

    min_user_events: int = 1
    min_item_events: int = 1
    unknown_items: str = "drop"
    max_title: int = 500
    max_text: int = 10_000


@dataclass(frozen=True)
class Privacy:
    """How user ids are written: as they are, or as a keyed hash (the key file stays outside the dataset)."""

    ids: str = "plain"
    key: str = ""


@dataclass(frozen=True)
class Quality:
    """Limits past which `prepare` refuses the data (exit 2); None sets no limit. Shares lie in [0, 1]."""

    max_rejected: float | None = None
    max_duplicate_events: float | None = None
    max_unknown_items: float | None = None
    max_missing_titles: float | None = None
    max_near_duplicates: float | None = None
    max_bot_events: float | None = None
    max_new_item_events: float | None = None
    max_gini: float | None = None
    max_top_share: float | None = None
    min_events: int | None = None
    min_users: int | None = None
    min_items: int | None = None


@dataclass(frozen=True)
class Card:
    """A whole card. `origin` is how messages name it; relative paths were resolved against its folder."""

    name: str
    events: Events
    items: Items | None = None
    users: Users | None = None
    corpus: Corpus | None = None
    impressions: Impressions | None = None
    split: Split | None = None
    clean: Clean = field(default_factory=Clean)
    repeat: bool = False
    privacy: Privacy = field(default_factory=Privacy)
    kinds: dict[str, float] = field(default_factory=dict)
    quality: Quality = field(default_factory=Quality)
    origin: str = "card"

    def __post_init__(self) -> None:
        _check_card(self)

    @property
    def split_rule(self) -> Split:
        """The split asked for, or the default: global-time, and leave-one-out where there is only an order."""
        if self.split is not None:
            return self.split
        return Split("leave-one-out" if self.events.time_unit == "order" else "global-time")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest: no defaults, files by name only, DataFrames as "<table>"."""
        return {
            f.name: _plain(v)
            for f in fields(self)
            if f.name != "origin" and (v := getattr(self, f.name)) != _default(f)
        }


TABLES: dict[str, type] = {
    "events": Events, "items": Items, "users": Users, "corpus": Corpus, "impressions": Impressions,
}  # fmt: skip
SECTIONS: dict[str, type] = {**TABLES, "split": Split, "clean": Clean, "privacy": Privacy, "quality": Quality}
REQUIRED = {"events": ("user", "item", "time"), "items": ("id",), "users": ("id",), "corpus": ("text",),
            "impressions": ("user", "item", "time", "clicked")}  # fmt: skip


class _Loader(yaml.SafeLoader):
    """YAML with 1.2 booleans (a column may be called `no` or `on`) and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def load_card(source: Path | str | dict | Card) -> Card:
    """Read a card from a YAML file or a dict (whose paths may be DataFrames).

    Raises InputError on an unknown key, a value of the wrong type, a missing file or a contradiction.
    """
    if isinstance(source, Card):
        return source
    if isinstance(source, dict):
        return _parse(source, "card", Path())
    path = Path(source)
    if path.is_dir():
        raise InputError(
            f"{path}: a folder, not a card; name its card file, or draft one: m6rec data card --from {path}"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such card; write one, or draft it: m6rec data card --from FOLDER")
    try:
        data = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)  # noqa: S506 (a SafeLoader)
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save the card as UTF-8") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}; correct that line") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds {type(data).__name__}, not keys; a card has at least `name:` and `events:`")
    return _parse(data, str(path), path.parent)


def is_frame(value: Any) -> bool:
    """Whether a table was given as a DataFrame (polars, pandas, or anything that polars can take over)."""
    return isinstance(value, pl.DataFrame | pl.LazyFrame) or hasattr(value, "__dataframe__") or hasattr(value, "__arrow_c_stream__")  # fmt: skip


def known(given: Any, choices: tuple[str, ...] | list[str], what: str) -> str:
    """The tail of a message: the choices, and the nearest one when the value looks like a slip."""
    near = difflib.get_close_matches(str(given), choices, 1)
    return f"{what}: {', '.join(choices) or 'none'}" + (f" (did you mean {near[0]}?)" if near else "")


def _parse(data: dict, origin: str, folder: Path) -> Card:
    names = [f.name for f in fields(Card) if f.name != "origin"]
    made: dict[str, Any] = {}
    for key, value in data.items():
        if key not in names:
            raise InputError(f"{origin}: {key}: unknown key (value {_short(value)}); {known(key, names, 'known keys')}")
        if value is None:
            raise InputError(f"{origin}: {key}: empty; give it a value or remove the line")
        if key == "split" and isinstance(value, str):
            value = {"rule": value}
        if key in SECTIONS:
            made[key] = value if isinstance(value, SECTIONS[key]) else _section(key, value, origin, folder)
        else:
            made[key] = value
    for key in ("name", "events"):
        if key not in made:
            raise InputError(f"{origin}: {key}: missing; a card has at least `name:` and `events:`")
    made["name"] = str(made["name"])
    return Card(**made, origin=origin)


def _section(section: str, value: Any, origin: str, folder: Path) -> Any:
    kind = SECTIONS[section]
    if not isinstance(value, dict):
        raise InputError(f"{origin}: {section}: {_short(value)} where keys are needed; {known('', list(kind.__dataclass_fields__), 'its keys')}")  # fmt: skip
    made = {}
    for key, given in value.items():
        where = f"{origin}: {section}.{key}"
        if key not in kind.__dataclass_fields__:
            raise InputError(f"{where}: unknown key (value {_short(given)}); {known(key, list(kind.__dataclass_fields__), 'known keys')}")  # fmt: skip
        if given is None:
            raise InputError(f"{where}: empty; give it a value or remove the key")
        made[key] = _convert(kind.__dataclass_fields__[key].type, given, where, folder)
    for f in fields(kind):
        if f.default is MISSING and f.name not in made:
            raise InputError(f"{origin}: {section}.{f.name}: missing; {_example(section, f.name)}")
    if section == "privacy" and made.get("key"):
        made["key"] = str(_absolute(made["key"], folder))
    return kind(**made)


def _convert(declared: str, given: Any, where: str, folder: Path) -> Any:
    """`given` as the type that a field declares; the declarations are strings here (postponed annotations)."""
    if declared == "Table":
        return given if is_frame(given) else _absolute(given, folder)
    if declared in ("Columns", "str | Columns"):
        if isinstance(given, list | tuple):
            return tuple(_name(one, where) for one in given)
        return _name(given, where) if declared == "str | Columns" else (_name(given, where),)
    if declared.startswith("float"):
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise InputError(f"{where}: {_short(given)} is not a number; write one such as 0.1")
        return float(given)
    if declared.startswith("int"):
        if isinstance(given, bool) or not isinstance(given, int):
            raise InputError(f"{where}: {_short(given)} is not a whole number; write one such as 3")
        return given
    return _name(given, where)


def _name(given: Any, where: str) -> str:
    if isinstance(given, dict | list | tuple) or given is None:
        raise InputError(f"{where}: {_short(given)} where one name is needed; write the name alone")
    return str(given)


def _absolute(given: Any, folder: Path) -> Path:
    path = Path(str(given)).expanduser()
    return path if path.is_absolute() else folder / path


def _check_card(card: Card) -> None:
    """Everything that can be wrong without opening a table."""
    origin = card.origin

    def refuse(key: str, value: Any, why: str) -> None:
        raise InputError(f"{origin}: {key}: {_short(value)}: {why}")

    def choice(key: str, value: str, choices: tuple[str, ...]) -> None:
        if value not in choices:
            refuse(key, value, known(value, choices, "choose one of"))

    for section in TABLES:
        if (table := getattr(card, section)) is not None:
            _check_table(section, table, origin, choice, refuse)
    if not isinstance(card.repeat, bool):
        refuse("repeat", card.repeat, "write true or false")
    rule = card.split_rule
    choice("split.rule", rule.rule, SPLIT_RULES)
    if rule.rule == "global-time" and card.events.time_unit == "order":
        refuse("split.rule", rule.rule, "events.time_unit is order, which is no common clock; use leave-one-out or ratio, or give real times")  # fmt: skip
    for key in ("valid", "test"):
        if not 0 < getattr(rule, key) < 1:
            refuse(f"split.{key}", getattr(rule, key), "a share must lie between 0 and 1")
    if rule.valid + rule.test >= 1:
        refuse("split.valid", rule.valid, f"with split.test {rule.test} nothing is left for training; lower one")
    choice("clean.unknown_items", card.clean.unknown_items, ("drop", "keep"))
    for key in ("min_user_events", "min_item_events"):
        if getattr(card.clean, key) < 0:
            refuse(f"clean.{key}", getattr(card.clean, key), "a count cannot be negative")
    for key in ("max_title", "max_text"):
        if getattr(card.clean, key) < 1:
            refuse(f"clean.{key}", getattr(card.clean, key), "must be at least 1 character")
    choice("privacy.ids", card.privacy.ids, ("plain", "hmac"))
    if card.privacy.ids == "hmac" and not card.privacy.key:
        refuse("privacy.ids", "hmac", "needs `key:`, a file of random bytes outside the dataset")
    if card.privacy.ids == "plain" and card.privacy.key:
        refuse("privacy.key", card.privacy.key, "has no effect while privacy.ids is plain; set ids: hmac or remove key")
    _check_kinds(card, refuse)


def _check_table(section: str, table: Any, origin: str, choice: Callable, refuse: Callable) -> None:
    frame = is_frame(table.path)
    if not frame:
        path = Path(table.path)
        if not path.is_file():
            refuse(f"{section}.path", str(path), "no such file; " + _files_beside(path))
        if not format_of(table):
            refuse(
                f"{section}.path", str(path), f"its ending says no format; add `format:`, one of {', '.join(FORMATS)}"
            )
    if table.format:
        choice(f"{section}.format", table.format, FORMATS)
    sequences = not frame and format_of(table) == "sequences"
    if sequences:
        if section != "events":
            refuse(f"{section}.format", "sequences", "only events can be sequences; choose another format")
        for key in ("user", "item", "time", "kind", "value", "text"):
            if getattr(table, key):
                refuse(f"events.{key}", getattr(table, key), "a sequences file has no columns (a line is: user item item ...); remove this key")  # fmt: skip
        if table.time_unit != "order":
            object.__setattr__(table, "time_unit", "order")  # its lines hold nothing but an order
        return
    whole_histories = section == "events" and isinstance(table.item, tuple)
    if whole_histories and table.time:
        refuse("events.time", table.time, "with a list of item columns a row is a whole history, whose order is the time; remove this key")  # fmt: skip
    if whole_histories:
        object.__setattr__(table, "time_unit", "order")
    for key in REQUIRED[section]:
        if key == "time" and section == "events" and table.time_unit == "order":
            continue
        if not getattr(table, key):
            raise InputError(f"{origin}: {section}.{key}: missing; {_example(section, key)}")
    if section in ("events", "impressions") and table.time_unit:
        choice(f"{section}.time_unit", table.time_unit, TIME_UNITS)


def _check_kinds(card: Card, refuse: Callable) -> None:
    if not isinstance(card.kinds, dict):
        refuse("kinds", card.kinds, "write kind: weight pairs, such as {view: 0.3, buy: 1.0}")
    for kind, weight in card.kinds.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            refuse(f"kinds.{kind}", weight, "a weight is a number of at least 0")
    if card.kinds and not any(card.kinds.values()):
        refuse("kinds", card.kinds, "every weight is 0, so no event could be a target; give one a weight above 0")
    if len(card.kinds) > N_KINDS:
        refuse("kinds", len(card.kinds), f"at most {N_KINDS} kinds; merge some")


def format_of(table: Any) -> str:
    """The format of a file table: declared, or guessed from its ending; "" when neither says."""
    if table.format:
        return table.format
    suffixes = [s for s in Path(table.path).suffixes if s not in COMPRESSED]
    return SUFFIXES.get(suffixes[-1].lower(), "") if suffixes else ""


def _files_beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either; paths are relative to the card"
    names = sorted(p.name for p in path.parent.iterdir() if p.is_file())[:20]
    return known(path.name, names, f"files in {path.parent}")


def _example(section: str, key: str) -> str:
    if key == "path":
        return f"name its file, such as {section}: {{path: {section}.csv, ...}}"
    if key == "time":
        return "name the column with the time, or set time_unit: order to take the rows in the order they stand"
    return f"name the column that holds it, such as {key}: {'user_id' if key == 'user' else 'item_id' if key in ('item', 'id') else key}"


def _short(value: Any) -> str:
    text = "<table>" if is_frame(value) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _default(f: Any) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _plain(value: Any) -> Any:
    if is_frame(value):
        return "<table>"
    if isinstance(value, Path):
        return value.name
    if isinstance(value, tuple):
        return list(value)
    if hasattr(value, "__dataclass_fields__"):
        made = {f.name: getattr(value, f.name) for f in fields(value)}
        kept = {k: v for k, v in made.items() if is_frame(v) or v != _default(value.__dataclass_fields__[k])}
        if isinstance(value, Privacy):
            kept.pop("key", None)  # where the key lies is nobody's business
        return {k: _plain(v) for k, v in kept.items()}
    return value
