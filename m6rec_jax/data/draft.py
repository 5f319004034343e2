"""A first data card for a folder of tables: which file is what, which column means what, in commented YAML.

It guesses by names and values and says so; its reader corrects what is wrong. What it writes can be prepared as it is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from m6rec_jax.data import values
from m6rec_jax.data.draft_guess import Sample, find, find_all, list_separator, look, overlap, time_unit
from m6rec_jax.errors import InputError

SHOWN = ("impression", "impressions", "shown", "exposure", "exposures", "exposed")
LOGS = ("event", "events", "train", "training", "interactions", "inter", "ratings", "reviews", "log", "logs", "clicks")
OURS = ("card.yaml", "manifest.json")
WEIGHTS = (
    (("search", "query"), 0.0),
    (("view", "pv", "impression", "show", "browse"), 0.3),
    (("click", "open"), 0.5),
    (("fav", "like", "cart", "wish", "save", "share"), 0.7),
)  # a buy, and whatever we do not know, counts in full


@dataclass(frozen=True)
class Role:
    """A section of the card: lines of (key, value, comment), from which files."""

    files: tuple[Sample, ...]
    keys: tuple[tuple[str, Any, str], ...]

    def get(self, key: str) -> Any:
        return next((value for name, value, _ in self.keys if name == key), "")


def draft_card(folder: Path | str, beside: Path | str | None = None) -> str:
    """YAML text of a card for the tables in `folder`; paths are relative to `beside`, the card's folder (default: it).

    Raises InputError when no table has a user and an item column.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--from {folder}: no such folder; name one with tables in it")
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name not in OURS and not p.name.startswith(".")]
    samples = [sample for path in files if (sample := look(path)) is not None]
    events = _events(samples)
    if events is None:
        seen = "; ".join(f"{s.path.name} ({', '.join(s.columns[:8])})" for s in samples[:6]) or "no table at all"
        raise InputError(f"--from {folder}: no table with a user and an item column; found {seen}; rename columns, or write the card by hand")  # fmt: skip
    left = [s for s in samples if s not in events.files]
    roles: dict[str, Role | None] = {"events": events}
    roles["items"] = _items(left, events)
    left = [s for s in left if s not in _files(roles["items"])]
    roles["impressions"] = _impressions(left)
    left = [s for s in left if s not in _files(roles["impressions"])]
    roles["users"] = _users(left)
    left = [s for s in left if s not in _files(roles["users"])]
    roles["corpus"] = _corpus(left)
    left = [s for s in left if s not in _files(roles["corpus"])]
    return _written(folder, Path(beside) if beside is not None else folder, events, roles, [s.path.name for s in left])


def _events(samples: list[Sample]) -> Role | None:
    candidates = [s for s in samples if s.format == "sequences" or (find(s, "user") and find(s, "item"))]
    candidates = [s for s in candidates if not _named(s, SHOWN)] or candidates
    if not candidates:
        return None
    best = max(candidates, key=lambda s: (_named(s, LOGS), s.format != "sequences", s.path.stat().st_size))
    if best.format == "sequences":
        note = "each line: user item item ..., in the order of time"
        return Role((best,), (("format", "sequences", note),))
    user = find(best, "user")
    lists = [c for c in best.columns if c in best.lists and _like_ids(best, c, find(best, "item"))]
    if lists:  # a history in a cell, what came next in another; files of the same columns are parts of one log
        parts = tuple(s for s in candidates if s.columns == best.columns)
        parts = tuple(sorted(parts, key=lambda s: (not _named(s, LOGS), _named(s, ("test",)), s.path.name)))
        item = [*lists, find(best, "item")]
        note = "whole histories, in order; windows that slide over one history are joined"
        return Role(parts, (("user", user, ""), ("item", item, note)))
    item = find(best, "item", [user])
    keys: list[tuple[str, Any, str]] = [("user", user, ""), ("item", item, "")]
    time = find(best, "time", [user, item])
    unit = time_unit(best.frame[time]) if time else "order"
    if time and unit:
        keys += [("time", time, ""), ("time_unit", unit, _time_note(best.frame[time], unit))]
    else:
        keys += [("time_unit", "order", "no time column was recognised: the rows count in the order they stand")]
    used = [user, item, time]
    if (kind := find(best, "kind", used)) and 1 < best.frame[kind].n_unique() <= 16:
        keys.append(("kind", kind, "its weights stand under `kinds` below"))
    used.append(kind)
    if (value := find(best, "value", used)) and best.frame[value].cast(pl.Float64, strict=False).null_count() == 0:
        keys.append(("value", value, ""))
    if query := find(best, "query", used):
        keys.append(("text", query, "what was searched for"))
    return Role((best,), tuple(keys))


def _like_ids(sample: Sample, column: str, item: str) -> bool:
    """Whether a list column holds ids of the kind that column `item` holds."""
    return overlap(sample, column, set(values.ids(sample.frame[item].drop_nulls()).head(500).to_list())) > 0.2


def _items(samples: list[Sample], events: Role) -> Role | None:
    ids = _event_items(events)
    found = []
    for sample in samples:
        if find(sample, "user") and find(sample, "item"):
            continue
        shares = {c: overlap(sample, c, ids) for c in sample.columns if c not in sample.lists}
        column = max(shares, key=lambda c: shares[c], default="")
        named = find(sample, "item") or next((c for c in sample.columns if c.lower() == "id"), "")
        told = bool(find(sample, "title") or find_all(sample, "text") or find_all(sample, "categories"))
        unlike_users = not find(sample, "user") and not _named(sample, ("user", "users", "customers"))
        if unlike_users and (shares.get(column, 0) > 0.3 or (named and told)):
            sure = column if shares.get(named, 0) < 0.9 * shares.get(column, 0) or not named else named
            found.append((shares.get(sure, 0), sample, sure))
    if not found:
        return None
    _, sample, column = max(found, key=lambda one: one[0])
    keys: list[tuple[str, Any, str]] = [("id", column, "")]
    used = [column]

    def add(key: str, value: Any, note: str = "") -> None:
        if value:
            keys.append((key, value, note))
            used.extend([value] if isinstance(value, str) else value)

    add("title", find(sample, "title", used))
    add("text", find_all(sample, "text", used))
    categories = find_all(sample, "categories", used)
    add("categories", categories)
    if separator := list_separator(sample, categories):
        keys.append(("list_separator", separator, "parts the categories of a cell"))
    add("image", find(sample, "image", used))
    add("numbers", [c for c in find_all(sample, "numbers", used) if values.numbers(sample.frame[c])[1] == 0])
    published = find(sample, "published", used)
    add("attributes", [c for c in find_all(sample, "attributes", used) if c != published or "year" in c.lower()])
    if published:
        keys.append(("published", published, ""))
    return Role((sample,), tuple(keys))


def _event_items(events: Role) -> set[str]:
    sample, item = events.files[0], events.get("item")
    if sample.format == "sequences":
        column = values.sequences(sample.frame["items"], "").explode()
    else:
        column = sample.frame[item[-1] if isinstance(item, list) else item]
    return set(values.ids(column.drop_nulls()).unique().head(2000).to_list())


def _users(samples: list[Sample]) -> Role | None:
    for sample in samples:
        column = find(sample, "user") or next((c for c in sample.columns if c.lower() == "id"), "")
        known = find_all(sample, "person", [column])
        if column and not find(sample, "item", [column]) and (known or _named(sample, ("user", "users", "customers"))):
            return Role((sample,), (("id", column, ""), *([("attributes", known, "")] if known else [])))
    return None


def _impressions(samples: list[Sample]) -> Role | None:
    for sample in samples:
        keys = {key: find(sample, key) for key in ("user", "item", "time", "clicked")}
        if all(keys.values()):
            unit = time_unit(sample.frame[keys["time"]])
            return Role((sample,), (*((k, v, "") for k, v in keys.items()), ("time_unit", unit or "order", "")))
    return None


def _corpus(samples: list[Sample]) -> Role | None:
    for sample in samples:
        texts = find_all(sample, "text")
        if texts and not find(sample, "user") and not find(sample, "item"):
            title = find(sample, "title", texts)
            return Role((sample,), (("text", [title, *texts] if title else texts, ""),))
    return None


def _files(role: Role | None) -> tuple[Sample, ...]:
    return role.files if role else ()


def _named(sample: Sample, names: tuple[str, ...]) -> bool:
    words = sample.path.name.lower().replace("-", ".").replace("_", ".").split(".")
    return any(word in names for word in words)


def _time_note(column: pl.Series, unit: str) -> str:
    if unit == "order":
        return "small numbers: an order, not a clock"
    seconds = values.times(column, unit).drop_nulls()
    first, last = (pl.from_epoch(pl.Series([moment]), "s").dt.strftime("%Y-%m-%d")[0] for moment in (seconds.min(), seconds.max()))  # fmt: skip
    return f"the first rows then lie between {first} and {last}"


def _written(folder: Path, beside: Path, events: Role, roles: dict[str, Role | None], left: list[str]) -> str:
    lines = [
        f"# Drafted from the files in {folder.resolve().name}/: read it, correct it, then run `m6rec prepare --card`.",
        f"# Paths are relative to this card, so keep it in {beside}.",
        f"name: {_scalar(folder.resolve().name)}",
        "",
    ]
    for section in ("events", "items", "users", "corpus", "impressions"):
        if (role := roles[section]) is None:
            continue
        paths = [os.path.relpath(s.path.resolve(), beside.resolve()) for s in role.files]
        said = (("path", paths[0] if len(paths) == 1 else paths, ""), *_format(role), *role.keys)
        lines.append(f"{section}:")
        for key, value, note in said:
            lines.append(f"  {key}: {_scalar(value)}" + (f"  # {note}" if note else ""))
        if unused := _unused(role):
            lines.append(f"  # not used: {', '.join(unused)}")
        lines.append("")
    lines += _rules(events)
    if left:
        lines += ["", f"# Files left out: {', '.join(left)}"]
    return "\n".join(lines) + "\n"


def _format(role: Role) -> tuple[tuple[str, Any, str], ...]:
    stated = role.get("format")
    return () if stated else (("format", role.files[0].format, ""),)


def _unused(role: Role) -> list[str]:
    if role.files[0].format == "sequences":
        return []
    used = {one for _, value, _ in role.keys for one in (value if isinstance(value, list) else [value])}
    return [c for c in role.files[0].columns if c not in used][:20]


def _rules(events: Role) -> list[str]:
    if "kind" in {key for key, _, _ in events.keys}:
        found = events.files[0].frame[events.get("kind")].drop_nulls().unique(maintain_order=True).to_list()
        weights = {kind: next((w for words, w in WEIGHTS if any(word in kind.lower() for word in words)), 1.0) for kind in found}  # fmt: skip
        if not any(weights.values()):
            weights = dict.fromkeys(found, 1.0)
        kinds = [f"kinds: {_scalar(weights)}  # weight as a target; 0 is input only; other kinds are rejected"]
    else:
        kinds = []
    ordered = events.get("time_unit") in ("order", "")
    split = "leave-one-out" if ordered else "global-time"
    other = "or ratio" if ordered else "or leave-one-out, or ratio; shares: {rule: global-time, valid: 0.1, test: 0.1}"
    repeats = _repeats(events)
    return [
        f"split: {split}  # {other}",
        f"repeat: {str(repeats).lower()}  # may an item be recommended again (music, grocery)?",
        *kinds,
        "# clean: {min_user_events: 3, min_item_events: 1, unknown_items: drop}",
        "# privacy: {ids: hmac, key: ../user.key}  # keyed hashes for user ids; the key stays outside the dataset",
        "# quality: {max_rejected: 0.2, max_missing_titles: 0.2}  # past these, prepare refuses the data",
    ]


def _repeats(events: Role) -> bool:
    """Whether users come back to items: more than a tenth of the pairs in the sample stand there again."""
    sample, item = events.files[0], events.get("item")
    if sample.format == "sequences" or isinstance(item, list):
        column = "items" if sample.format == "sequences" else item[0]
        lists = values.sequences(sample.frame[column], "").drop_nulls()
        total, distinct = lists.list.len().sum(), lists.list.n_unique().sum()
    else:
        pairs = sample.frame.select(events.get("user"), item).drop_nulls()
        total, distinct = pairs.height, pairs.unique().height
    return bool(total and distinct < 0.9 * total)


def _scalar(value: Any) -> str:
    """A value as YAML on one line, quoted where it has to be."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False)
    return text.removesuffix("\n...\n").strip()
