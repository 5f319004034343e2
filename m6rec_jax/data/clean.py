"""Cleaning rules over canonical tables: each one counted, each rejected row recorded with its rule.

Idempotent: cleaning what was cleaned changes nothing and rejects nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import polars as pl

from m6rec_jax.data.card import Card
from m6rec_jax.data.sources import REJECTED_SCHEMA, Tables, rejected_rows
from m6rec_jax.data.text import clean_column, clean_lists
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import N_KINDS

# Rule -> what it says of the rows it counts: rejected, repaired, or noted and left as they are.
REJECTING = {
    "missing_user": "no user id",
    "missing_item": "neither an item id nor a text",
    "missing_time": "no time",
    "bad_time": "a time that could not be understood",
    "future_time": "a time after now",
    "missing_kind": "no kind, where the card has kinds",
    "unknown_kind": "a kind that the card's kinds do not list",
    "duplicate_event": "the same event again (user, item, time, kind, value, text)",
    "unknown_item": "an item that the items table does not hold",
    "few_item_events": "an item with fewer events than clean.min_item_events",
    "few_user_events": "a user with fewer events than clean.min_user_events",
    "duplicate_item": "an item id that an earlier row has",
    "duplicate_user": "a user id that an earlier row has",
    "empty_document": "a document without text",
    "duplicate_document": "a document that was there before",
}
REPAIRING = {
    "bad_value": "values that are no number, set to none",
    "bad_number": "item numbers that are no number, set to none",
    "html": "texts with HTML tags, removed",
    "entities": "texts with HTML entities, decoded",
    "mojibake": "texts in a wrong encoding, repaired",
    "control_characters": "texts with control characters, removed",
    "nfkc": "texts with compatibility characters, normalised",
    "white_space": "texts with superfluous white space, collapsed",
    "overlong": "texts longer than clean.max_title or max_text, cut",
}
NOTING = {
    "empty_title": "items without a title",
    "empty_text": "items without any text",
    "added_item": "items known from events alone, added without text",
    "near_duplicate_item": "items whose title has the words of an earlier one",
}
RULES = {**REJECTING, **REPAIRING, **NOTING}
HINTS = {
    "future_time": "look at events.time_unit (seconds, or ms?)",
    "bad_time": "look at events.time and events.time_unit (s, ms, iso or order)",
    "unknown_item": "look at events.item and items.id, or set clean.unknown_items: keep",
    "unknown_kind": "look at events.kind and kinds",
    "few_user_events": "lower clean.min_user_events",
    "few_item_events": "lower clean.min_item_events",
    "missing_user": "look at events.user",
    "missing_item": "look at events.item",
    "missing_time": "look at events.time",
}
PHRASE_LIMIT = 200  # characters of a category or an attribute phrase


@dataclass(frozen=True)
class Cleaned:
    """Clean tables, how many rows or texts each rule met, and the rejected rows (table, row, rule, content)."""

    tables: Tables
    counts: dict[str, int]
    rejected: pl.DataFrame


def clean(tables: Tables, card: Card, now: float | None = None) -> Cleaned:
    """Apply every rule. `now` (seconds since 1970) bounds times; the clock's by default.

    Events come out sorted by (user's first row, time at the source's precision, row); each has an item of the items table, or, a query,
    none and a text. Every item has a title and a text, perhaps empty. Raises InputError when no event is left.
    """
    counts = dict.fromkeys(RULES, 0)
    for rule, n in tables.counts.items():
        counts[rule] += n
    rejected = [tables.rejected]
    for rule, n in tables.rejected["rule"].value_counts().iter_rows():
        counts[rule] += n

    def reject(table: str, rule: str, frame: pl.DataFrame, mask: pl.Series) -> pl.DataFrame:
        if not (n := int(mask.sum())):
            return frame
        counts[rule] += n
        rejected.append(rejected_rows(table, rule, frame.filter(mask)))
        return frame.filter(~mask)

    items = clean_items(tables.items, card, counts, reject) if tables.items is not None else None
    events = clean_rows(tables.events, card, counts, reject, time.time() if now is None else now)
    check_kinds(events["kind"].n_unique(), card)
    events = without_repeats(events, reject)
    if items is not None and card.clean.unknown_items == "drop":
        events = without_unknown(events, items["item_id"], reject)
    events = _apply_minimums(events, card, reject)
    if events["item_id"].null_count() == events.height:
        n = tables.events.height + tables.rejected.filter(pl.col("table") == "events").height
        raise InputError(nothing_left(n, card, counts))
    events = sort_events(events)
    items = with_event_items(items, events, counts)
    count_items(items, counts)
    made = Tables(
        events=events,
        items=items,
        users=_clean_users(tables.users, counts, reject),
        corpus=clean_corpus(tables.corpus, card, counts, reject),
        impressions=_clean_impressions(tables.impressions, items, reject),
    )
    return Cleaned(made, counts, pl.concat(rejected) if rejected else pl.DataFrame(schema=REJECTED_SCHEMA))


def clean_rows(events: pl.DataFrame, card: Card, counts: dict, reject, now: float) -> pl.DataFrame:
    """The rules that judge an event by its own row."""
    if events["text"].null_count() < events.height:
        text = clean_column(events["text"], card.clean.max_text, counts)
        events = events.with_columns(text.replace("", None).alias("text"))
    events = reject("events", "missing_user", events, events["user_id"].is_null())
    events = reject("events", "missing_item", events, events["item_id"].is_null() & events["text"].is_null())
    events = reject("events", "missing_time", events, events["time"].is_null())
    if card.events.time_unit != "order":
        events = reject("events", "future_time", events, events["time"] > int(now))
    if card.events.kind and card.kinds:
        events = reject("events", "missing_kind", events, events["kind"].is_null())
        events = reject("events", "unknown_kind", events, ~events["kind"].is_in(list(card.kinds)))
    return events


def check_kinds(kinds: int, card: Card) -> None:
    """Raise InputError when the events have too many different `kinds` (none is one) and the card lists none."""
    if not (card.events.kind and card.kinds) and kinds > N_KINDS:
        raise InputError(f"{card.origin}: events.kind: {card.events.kind!r}: {kinds} different kinds, at most {N_KINDS} are possible; list those that count under `kinds:`")  # fmt: skip


def without_repeats(events: pl.DataFrame, reject) -> pl.DataFrame:
    """Each event once: the first of those that are equal in all but their row."""
    same = ["user_id", "item_id", "time", "fraction", "kind", "value", "text"]
    return reject("events", "duplicate_event", events, _repeated(events, same))


def without_unknown(events: pl.DataFrame, item_ids: pl.Series, reject) -> pl.DataFrame:
    """Events on one of `item_ids`, and queries."""
    unknown = events["item_id"].is_not_null() & ~events["item_id"].is_in(item_ids.implode())
    return reject("events", "unknown_item", events, unknown)


def _repeated(frame: pl.DataFrame, columns: list[str]) -> pl.Series:
    """True where an earlier row has the same values in `columns`."""
    used = [c for c in columns if frame[c].null_count() < frame.height] or columns[:1]
    return ~frame.select(pl.struct(used).is_first_distinct()).to_series()


def _apply_minimums(events: pl.DataFrame, card: Card, reject) -> pl.DataFrame:
    """Drop events of rare items and of short users until neither is left; queries do not count, but go with their user."""
    least_user, least_item = card.clean.min_user_events, card.clean.min_item_events
    if least_user <= 1 and least_item <= 1:
        return events
    user, item, real = _codes(events["user_id"]), _codes(events["item_id"]), events["item_id"].is_not_null().to_numpy()
    n_users, n_items = int(user.max(initial=0)) + 1, int(item.max(initial=0)) + 1
    kept = np.ones(events.height, bool)
    few_item, few_user = np.zeros_like(kept), np.zeros_like(kept)
    while True:
        bad = kept & real & (np.bincount(item[kept & real], minlength=n_items)[item] < least_item)
        few_item |= bad
        kept &= ~bad
        short = kept & (np.bincount(user[kept & real], minlength=n_users)[user] < least_user)
        few_user |= short
        kept &= ~short
        if not bad.any() and not short.any():
            break
    left = reject("events", "few_item_events", events, pl.Series(few_item))
    return reject("events", "few_user_events", left, pl.Series(few_user[~few_item]))


def _codes(series: pl.Series) -> np.ndarray:
    """Whole numbers from 0, equal where the strings are."""
    unique = series.unique().to_frame("x").with_row_index("code")
    return (
        series.to_frame("x")
        .join(unique, on="x", how="left", maintain_order="left", nulls_equal=True)["code"]
        .to_numpy()
    )


def sort_events(events: pl.DataFrame) -> pl.DataFrame:
    """By the user's first row, then time, then row."""
    first = pl.col("row").min().over("user_id")
    return events.sort(first, "time", "fraction", "row")


def clean_items(items: pl.DataFrame, card: Card, counts: dict, reject) -> pl.DataFrame:
    """The rules of the items table."""
    items = reject("items", "missing_item", items, items["item_id"].is_null())
    items = reject("items", "duplicate_item", items, _repeated(items, ["item_id"]))
    return items.with_columns(
        clean_column(items["title"], card.clean.max_title, counts).fill_null(""),
        clean_column(items["text"], card.clean.max_text, counts).fill_null(""),
        clean_lists(items["categories"], PHRASE_LIMIT, counts),
        clean_lists(items["attributes"], PHRASE_LIMIT, counts),
    )


def with_event_items(items: pl.DataFrame | None, events: pl.DataFrame, counts: dict) -> pl.DataFrame:
    """The catalogue: the items table, then items known from events alone in the order of their first event row."""
    bought = events.drop_nulls("item_id").group_by("item_id").agg(pl.col("row").min()).sort("row").select("item_id")
    if items is None:
        items = pl.DataFrame(schema=ITEM_SCHEMA)
    added = bought.filter(~pl.col("item_id").is_in(items["item_id"].implode()))
    counts["added_item"] = added.height
    if not added.height:
        return items
    empty = added.with_columns(
        pl.lit("").alias("title"),
        pl.lit("").alias("text"),
        pl.lit([], dtype=pl.List(pl.String)).alias("categories"),
        pl.lit([], dtype=pl.List(pl.String)).alias("attributes"),
        pl.lit(-1, dtype=pl.Int64).alias("row"),
    )
    return pl.concat([items, empty], how="diagonal")


ITEM_SCHEMA = {
    "item_id": pl.String,
    "title": pl.String,
    "text": pl.String,
    "categories": pl.List(pl.String),
    "attributes": pl.List(pl.String),
    "published": pl.Int64,
    "type": pl.String,
    "image": pl.String,
    "audio": pl.String,
    "video": pl.String,
    "row": pl.Int64,
}


def count_items(items: pl.DataFrame, counts: dict) -> None:
    """The rules that only note."""
    no_title = pl.col("title") == ""
    nothing = (
        no_title
        & (pl.col("text") == "")
        & (pl.col("categories").list.len() == 0)
        & (pl.col("attributes").list.len() == 0)
    )
    counts["empty_title"], counts["empty_text"] = items.select(no_title.sum().alias("a"), nothing.sum().alias("b")).row(
        0
    )
    groups = near_duplicates(items)
    counts["near_duplicate_item"] = int(groups["count"].sum() - groups.height) if groups.height else 0


def near_duplicates(items: pl.DataFrame) -> pl.DataFrame:
    """Groups of items whose titles hold the same set of words: item_ids, titles (lists), count, largest first."""
    words = (
        pl.col("title").str.to_lowercase().str.replace_all(r"[^\p{L}\p{M}\p{N}]+", " ").str.strip_chars().str.split(" ")
    )
    key = words.list.unique().list.sort().list.join(" ").alias("key")
    return (
        items.select("item_id", "title", key)
        .filter(pl.col("key") != "")
        .group_by("key", maintain_order=True)
        .agg(
            pl.col("item_id").alias("item_ids"), pl.col("title").alias("titles"), pl.len().cast(pl.Int64).alias("count")
        )
        .filter(pl.col("count") > 1)
        .drop("key")
        .sort("count", descending=True, maintain_order=True)
    )


def _clean_users(users: pl.DataFrame | None, counts: dict, reject) -> pl.DataFrame | None:
    if users is None:
        return None
    users = reject("users", "missing_user", users, users["user_id"].is_null())
    users = reject("users", "duplicate_user", users, _repeated(users, ["user_id"]))
    return users.with_columns(clean_lists(users["attributes"], PHRASE_LIMIT, counts))


def clean_corpus(corpus: pl.DataFrame | None, card: Card, counts: dict, reject) -> pl.DataFrame | None:
    """The rules of the corpus."""
    if corpus is None:
        return None
    corpus = corpus.with_columns(clean_column(corpus["text"], card.clean.max_text, counts).fill_null(""))
    corpus = reject("corpus", "empty_document", corpus, corpus["text"] == "")
    return reject("corpus", "duplicate_document", corpus, _repeated(corpus, ["text"]))


def _clean_impressions(shown: pl.DataFrame | None, items: pl.DataFrame, reject) -> pl.DataFrame | None:
    if shown is None:
        return None
    shown = reject("impressions", "missing_user", shown, shown["user_id"].is_null())
    shown = reject("impressions", "missing_item", shown, shown["item_id"].is_null())
    shown = reject("impressions", "missing_time", shown, shown["time"].is_null())
    return reject("impressions", "unknown_item", shown, ~shown["item_id"].is_in(items["item_id"].implode()))


def nothing_left(n: int, card: Card, counts: dict) -> str:
    """What to say when none of `n` event rows is left."""
    met = {rule: counts[rule] for rule in REJECTING if counts[rule]}
    worst = max(met, key=lambda rule: met[rule], default="missing_item")
    listed = ", ".join(f"{rule} {n}" for rule, n in met.items())
    return f"{card.origin}: events: none of {n} rows is left after cleaning ({listed}); {HINTS.get(worst, 'look at the card')}"
