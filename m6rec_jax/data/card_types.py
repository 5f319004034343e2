"""The parts of a data card as frozen dataclasses; a key of the card is a field here, its type the field's."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from m6rec_jax.data.card_checks import CONTENT_FIELDS, check_card, is_frame

Table: TypeAlias = Any  # a path, several of them in a tuple, or a polars or pandas DataFrame
Columns: TypeAlias = tuple[str, ...]
UNSAID = ("origin", "given")  # fields of a card that no card file has


@dataclass(frozen=True)
class Events:
    """Who did what to which item when. With a list of `item` columns a row is a whole history, in their order.

    Args:
        path: a file beside the card, a pattern (log-*.csv) or a list of files with the same columns, or a DataFrame.
        format: guessed from the file's ending when left out.
        user, item, time: column names; with time_unit order, time may be left out (the rows' own order counts).
        time_unit: s, ms, iso, or order (any number that sorts).
        kind, value, text: optional columns: view or buy, a rating, a search query.
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

    def __post_init__(self) -> None:
        if isinstance(self.item, list):
            object.__setattr__(self, "item", tuple(self.item))
        if self.format == "sequences" or isinstance(self.item, tuple):
            object.__setattr__(self, "time_unit", "order")  # whole histories know no other time


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
        list_separator: parts a list that a text file writes as one cell ("|"; a space in recbole files).
        image, audio, video: columns with a path or an address, carried along.
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

    def __post_init__(self) -> None:
        _tuples(self, "text", "categories", "attributes", "numbers")


@dataclass(frozen=True)
class Users:
    """What is known of users: `attributes` are columns, said as "name: value"."""

    path: Table
    format: str = ""
    id: str = ""
    attributes: Columns = ()
    list_separator: str = ""
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        _tuples(self, "attributes")


@dataclass(frozen=True)
class Corpus:
    """Plain text documents for the language objectives; a row is one, its `text` columns joined."""

    path: Table
    format: str = ""
    text: Columns = ()
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        _tuples(self, "text")


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
    """How events are parted; `valid` and `test` are shares of all events by time (global-time) or of each user's (ratio)."""

    rule: str
    valid: float = 0.1
    test: float = 0.1


@dataclass(frozen=True)
class Clean:
    """Least events of a user and of an item (1: no limit), unknown items (drop, keep), longest texts in characters."""

    min_user_events: int = 1
    min_item_events: int = 1
    unknown_items: str = "drop"
    max_title: int = 500
    max_text: int = 10_000


@dataclass(frozen=True)
class Privacy:
    """How user ids are written: plain, or hmac: hashed with the bytes of the file `key`, which stays outside the dataset."""

    ids: str = "plain"
    key: str = ""


@dataclass(frozen=True)
class Content:
    """What an item's content vector is made from.

    Args:
        fields: what is read of an item: any of title, categories, attributes, numbers, text.
        encoder: tfidf (TF-IDF and a truncated SVD, fitted on the catalogue), multilingual (a sentence encoder, extra
            `text`), or the name of an encoder of another package.
    """

    fields: Columns = CONTENT_FIELDS
    encoder: str = "tfidf"

    def __post_init__(self) -> None:
        _tuples(self, "fields")


@dataclass(frozen=True)
class Quality:
    """Limits past which `prepare` refuses the data (exit 2); None sets no limit. Shares lie in [0, 1].

    Args:
        max_rejected: event rows rejected by cleaning.
        max_duplicate_events: event rows that repeat another.
        max_unknown_items: event rows whose item the items table does not hold.
        max_missing_titles: items without a title.
        max_near_duplicates: items whose title has the words of an earlier one.
        max_bot_events: events of suspected bots.
        max_new_item_events: held-out events on items that training has not seen.
        max_gini: Gini coefficient of events over items.
        max_top_share: events on the most popular 1 % of items.
        min_events, min_users, min_items: least that must be left after cleaning.
    """

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
class CardTask:
    """A task: rows of an own table or, without `path`, made from events, items, users and impressions.

    Args:
        template: a built-in template, or a YAML file beside the card; left out, the task's own name.
        language: en or zh; left out, that of the template file, English for a built-in one.
        path, format, encoding: the own table, as for events.
        fields: field of the template -> column; for a history a column of lists, or {title: column, time: column, ...} of
            lists as long as each other. A field left out is the column of its name.
        target: column with the right option (its name or number) or, for a text, with the answer.
        options: their names in the order of their numbers; left out, those of the template, or those that the data has.
        group: column with the user; all rows of one go to one split.
        item: column with an item id, kept with each instance.
        split: column with train, valid or test, where the parts are made already.
        time, time_unit: column by which the newest rows are held out, and its unit as in events.
        valid, test: shares of the groups, or of the rows, that are held out.
        list_separator: parts a list that a text file writes as one cell.
        least: value from which on a rated event counts as liked, where nothing was shown and clicked.
        most: at most so many instances of a split are made where there is no table.
    """

    template: str | Path = ""
    language: str = ""
    path: Table = None
    format: str = ""
    encoding: str = "utf-8"
    fields: dict[str, Any] = field(default_factory=dict)
    target: str = ""
    options: Columns = ()
    group: str = ""
    item: str = ""
    split: str = ""
    time: str = ""
    time_unit: str = "s"
    valid: float = 0.1
    test: float = 0.1
    list_separator: str = "|"
    least: float | None = None
    most: int = 100_000

    def __post_init__(self) -> None:
        _tuples(self, "options")


@dataclass(frozen=True)
class Card:
    """A whole card, checked when made. `origin` is how messages name it, `given` the keys it states itself.

    `split` left out is global-time, and leave-one-out where events have only an order. `kinds` gives each kind of
    event its weight as a target; 0 makes it input only. `tasks`: behaviour as text, by name (docs/tasks.md).
    """

    name: str
    events: Events
    items: Items | None = None
    users: Users | None = None
    corpus: Corpus | None = None
    impressions: Impressions | None = None
    split: Split = None  # type: ignore[assignment]
    clean: Clean = field(default_factory=Clean)
    repeat: bool = False
    privacy: Privacy = field(default_factory=Privacy)
    kinds: dict[str, float] = field(default_factory=dict)
    quality: Quality = field(default_factory=Quality)
    content: Content = field(default_factory=Content)
    tasks: dict[str, CardTask] = field(default_factory=dict)
    origin: str = "card"
    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.given:  # made in Python: a default says nothing
            object.__setattr__(
                self, "given", frozenset(f.name for f in fields(self) if _given(f, getattr(self, f.name)))
            )
        if self.split is None:
            rule = "leave-one-out" if self.events.time_unit == "order" else "global-time"
            object.__setattr__(self, "split", Split(rule))
        elif isinstance(self.split, str):
            object.__setattr__(self, "split", Split(self.split))
        check_card(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest: what differs from the defaults; files by name alone, DataFrames as "<table>"."""
        return {f.name: _plain(value) for f in fields(self) if f.name not in UNSAID and _given(f, value := getattr(self, f.name))}  # fmt: skip


def _tuples(part: Any, *names: str) -> None:
    """Let a part made in Python name one column as a string, or several in a list."""
    for name in names:
        value = getattr(part, name)
        object.__setattr__(part, name, (value,) if isinstance(value, str) and value else tuple(value))


def _given(f: Any, value: Any) -> bool:
    return is_frame(value) or value != (f.default_factory() if f.default_factory is not MISSING else f.default)


def _plain(value: Any) -> Any:
    if is_frame(value):
        return "<table>"
    if isinstance(value, Path):
        return value.name
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, Privacy):
        return {"ids": value.ids}  # where the key lies is nobody's business
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(v) for f in fields(value) if _given(f, v := getattr(value, f.name))}
    return value
