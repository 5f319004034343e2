"""A user at one moment, in words: who it is, the events before, what they are about, the pause until now."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import polars as pl

from m6rec_jax.data.instances.wording import gap_of, level_of, listed, rank_of, span_of, times_of
from m6rec_jax.data.instances.world import World
from m6rec_jax.data.splits import TRAIN

MOST_EVENTS = 30  # events of a history that are told; interests and statistics count all
MOST_TOPICS = 3
WINDOW = 14 * 86_400  # seconds over which a click rate is taken (M6-Rec's own)
LEAST_SHOWN = 10  # times shown before a click rate says anything
MOMENTS = 64  # points in time at which items are ranked by how often they were chosen
EVENT = pl.List(pl.Struct({"action": pl.String, "gap": pl.String, "title": pl.String}))


@dataclass(frozen=True)
class Moments:
    """k moments: user rows, where the history of each ends among the events (`ends`, the first event that is not in it),
    the time then, and the split."""

    users: np.ndarray
    ends: np.ndarray
    times: np.ndarray
    splits: np.ndarray

    def __len__(self) -> int:
        return len(self.users)


def told_users(world: World, moments: Moments, language: str) -> dict[str, pl.Series]:
    """`user`, `history`, `interests` and `since` of every moment."""
    told: list[dict[str, str] | None] = [None] * len(world.events.users)
    histories: list[list[dict[str, str]]] = [[]] * len(moments)
    interests = [""] * len(moments)
    since = [""] * len(moments)
    hidden = (world.user_splits > TRAIN)[moments.users] & (moments.splits == TRAIN)
    for place, counts in counted_topics(world, moments):
        user, end = int(moments.users[place]), int(moments.ends[place])
        start = int(world.starts[user])
        first = max(start, end - MOST_EVENTS)
        for e in range(first, end):
            if told[e] is None:
                told[e] = _event(world, e, start, language)
        histories[place] = told[first:end]  # type: ignore[assignment]
        if not hidden[place]:
            interests[place] = listed(top_topics(counts), language)
        if world.timed and end > start:
            since[place] = gap_of(int(moments.times[place] - world.events.times[end - 1]), language)
    return {
        "user": pl.Series([world.who[user] for user in moments.users.tolist()], dtype=pl.String),
        "history": pl.Series(histories, dtype=EVENT),
        "interests": pl.Series(interests, dtype=pl.String),
        "since": pl.Series(since, dtype=pl.String),
    }


def _event(world: World, e: int, start: int, language: str) -> dict[str, str]:
    events = world.events
    item = int(events.items[e])
    action = events.kind_names[int(events.kinds[e])] if events.kind_names else ""
    if item < 0 and not action:
        action = "搜索" if language == "zh" else "searched for"
    gap = gap_of(int(events.times[e] - events.times[e - 1]), language) if world.timed and e > start else ""
    return {"action": action, "gap": gap, "title": world.titles[item] if item >= 0 else events.texts[e] or ""}


def counted_topics(world: World, moments: Moments):
    """(place of a moment, Counter of the categories that the user chose before it), user by user. The counter goes on
    counting when the next is asked for."""
    order = np.lexsort((moments.ends, moments.users))
    counts, user, at = Counter[str](), -1, 0
    items, topics = world.events.items, world.said_categories
    for place in order.tolist():
        if int(moments.users[place]) != user:
            user = int(moments.users[place])
            counts, at = Counter(), int(world.starts[user])
        for e in range(at, int(moments.ends[place])):
            if items[e] >= 0:
                counts.update(topics[items[e]])
        at = max(at, int(moments.ends[place]))
        yield place, counts


def top_topics(counts: Counter[str], most: int = MOST_TOPICS) -> list[str]:
    """The most frequent topics, those of a name first among equals."""
    return [name for name, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:most]]


def told_items(world: World, items: np.ndarray, splits: np.ndarray, language: str) -> dict[str, pl.Series]:
    """`item`, `categories`, `attributes` and `description` of catalogue rows `[k]`: of an item that is held out for tasks
    on items, training hears the title alone."""
    held = (world.item_splits > TRAIN)[items] & (splits == TRAIN)

    def column(texts: list[str]) -> pl.Series:
        return pl.Series(["" if quiet else texts[i] for i, quiet in zip(items.tolist(), held.tolist(), strict=True)], dtype=pl.String)  # fmt: skip

    return {
        "item": pl.Series([world.titles[i] for i in items.tolist()], dtype=pl.String),
        "categories": column([listed(some, language) for some in world.categories]),
        "attributes": column(world.attributes),
        "description": column(world.descriptions),
    }


# -- statistics ----------------------------------------------------------------------------------------------------


def statistics(world: World, moments: Moments, items: np.ndarray, language: str) -> pl.Series:
    """What is known of candidate items `[k]` at each moment, in words: how often all users chose it, how often it was
    clicked of late, how often this user chose its category. Training events from before the moment alone are counted."""
    popular = _popularity(world, moments, items, language)
    clicked = _click_rates(world, moments, items, language)
    chosen = [""] * len(moments)
    for place, counts in counted_topics(world, moments):
        topics = world.said_categories[items[place]]
        if topics and (n := counts[topics[0]]):
            start = int(world.starts[moments.users[place]])
            span = span_of(int(moments.times[place] - world.events.times[start]), language) if world.timed else ""
            chosen[place] = _chosen(topics[0], times_of(n, language), span, language)
    joiner = "；" if language == "zh" else "; "
    return pl.Series([joiner.join(filter(None, parts)) for parts in zip(popular, clicked, chosen, strict=True)], dtype=pl.String)  # fmt: skip


def _chosen(topic: str, often: str, span: str, language: str) -> str:
    if language == "zh":
        return f"用户{f'在{span}内' if span else ''}选择过{topic}{often}"
    return f"the user chose {topic} {often}{f' in {span}' if span else ''}"


def _popularity(world: World, moments: Moments, items: np.ndarray, language: str) -> list[str]:
    """Where each item stands among all by training events before the moment; without a common clock, by all of them but
    the user's own."""
    events = world.events
    train = (world.label == TRAIN) & (events.items >= 0)
    if not train.any():
        return [""] * len(moments)
    if world.timed:
        at, when = events.items[train].astype(np.int64), events.times[train]
        order = np.lexsort((when, at))
        at, when = at[order], when[order]
        cuts = np.unique(np.quantile(when, np.linspace(0, 1, MOMENTS), method="lower"))
        known = np.stack([np.sort(np.bincount(at[when <= cut], minlength=world.items.height)) for cut in cuts])
        counts = _before(at, when, items, moments.times)
        row = np.clip(np.searchsorted(cuts, moments.times, side="right") - 1, 0, len(cuts) - 1)
    else:
        own = _own(world, moments, items, train)
        counts = world.train_counts[items] - own
        known, row = np.sort(world.train_counts)[None], np.zeros(len(moments), np.int64)
    above = np.array([len(known[r]) - np.searchsorted(known[r], c, side="right") for r, c in zip(row.tolist(), counts.tolist(), strict=True)])  # fmt: skip
    new, name = ("尚无人选择", "热度") if language == "zh" else ("nobody chose it before", "popularity")
    mark = "：" if language == "zh" else " "
    return [f"{name}{mark}{rank_of(a / world.items.height, language)}" if c > 0 else new for a, c in zip(above.tolist(), counts.tolist(), strict=True)]  # fmt: skip


def _own(world: World, moments: Moments, items: np.ndarray, train: np.ndarray) -> np.ndarray:
    """How often each moment's user has its item among the training events."""
    size = world.items.height
    keys, n = np.unique(world.events.users[train].astype(np.int64) * size + world.events.items[train], return_counts=True)  # fmt: skip
    wanted = moments.users.astype(np.int64) * size + items
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, n[place], 0)


def _before(at: np.ndarray, when: np.ndarray, items: np.ndarray, times: np.ndarray) -> np.ndarray:
    """How many of the (item, time) pairs, sorted so, are of each item and before each time `[k]`."""
    low = int(min(when.min(), times.min()))
    width = int(max(when.max(), times.max())) - low + 1
    keys = at.astype(np.int64) * width + (when - low)
    wanted = items.astype(np.int64) * width
    return np.searchsorted(keys, wanted + (times - low), side="left") - np.searchsorted(keys, wanted, side="left")


def _click_rates(world: World, moments: Moments, items: np.ndarray, language: str) -> list[str]:
    """How the click rate of each item over the last `WINDOW` stands among those of all moments; "" where it was seldom shown
    or nothing says what was."""
    if world.shown is None or not world.timed or not len(moments):
        return [""] * len(moments)
    rows = {item: row for row, item in enumerate(world.items["item_id"].to_list())}
    at = np.array([rows.get(item, -1) for item in world.shown["item_id"].to_list()], np.int64)
    when = world.shown["time"].to_numpy()
    known = at >= 0
    if (held := moments.times[moments.splits > TRAIN]).size:
        known &= when < held.min()
    clicked = world.shown["clicked"].fill_null(False).to_numpy()
    if not known.any():
        return [""] * len(moments)

    def within(mask: np.ndarray) -> np.ndarray:
        if not mask.any():
            return np.zeros(len(moments), np.int64)
        order = np.lexsort((when[mask], at[mask]))
        pairs = at[mask][order], when[mask][order]
        return _before(*pairs, items, moments.times) - _before(*pairs, items, moments.times - WINDOW)

    shown, hits = within(known), within(known & clicked)
    enough = shown >= LEAST_SHOWN
    rates = hits / np.maximum(shown, 1)
    scale = np.sort(rates[enough & (moments.splits == TRAIN)])
    if not len(scale):
        return [""] * len(moments)
    above = 1 - np.searchsorted(scale, rates, side="right") / len(scale)
    name = "近14天点击率" if language == "zh" else "CTR over the last 14 days "
    return [name + _rate(a, language) if ok else "" for a, ok in zip(above.tolist(), enough.tolist(), strict=True)]


def _rate(share: float, language: str) -> str:
    comma = "，" if language == "zh" else ", "
    return level_of(share, language) + comma + rank_of(share, language)
