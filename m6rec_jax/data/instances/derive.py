"""Instances made from the dataset itself: what users did, were shown, said and searched for.

The split of an instance is that of the event it asks for, so that nothing is asked in training that is held out anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl

from m6rec_jax.data.card_types import CardTask
from m6rec_jax.data.events import rows_of
from m6rec_jax.data.instances.answers import BEFORE, described, reason, searched
from m6rec_jax.data.instances.behaviour import Moments, counted_topics, statistics, told_items, told_users, top_topics
from m6rec_jax.data.instances.derive_text import TEXT_RECIPES
from m6rec_jax.data.instances.wording import listed
from m6rec_jax.data.instances.world import World, sampled, split_names
from m6rec_jax.data.splits import TEST, TRAIN, VALID
from m6rec_jax.data.template import Template
from m6rec_jax.errors import InputError


@dataclass(frozen=True)
class Asks:
    """What a recipe is asked for: `where` names the task in messages."""

    where: str
    task: CardTask
    template: Template
    world: World

    @property
    def language(self) -> str:
        return self.template.language

    def refuse(self, why: str) -> InputError:
        """The one line that says what the dataset lacks."""
        return InputError(f"{self.where}: {why}; give the task a table with path:, or leave it out")


Made = tuple[pl.DataFrame, tuple[str, ...]]
Recipe = Callable[[Asks], Made]


def derived_rows(where: str, task: CardTask, template: Template, world: World) -> Made:
    """(user_id, item_id, split, label and fields of every instance; the options), made by the recipe of the template's task.

    Raises InputError when the dataset lacks what the task is made from.
    """
    asks = Asks(where, task, template, world)
    made = RECIPES[template.task](asks)
    if not made[0].height:
        raise asks.refuse(f"nothing in events, items and users makes an instance of {template.task}")
    return made


def _frame(world: World, moments: Moments, items: np.ndarray | None, labels: np.ndarray | None, **fields: pl.Series) -> pl.DataFrame:  # fmt: skip
    n = len(moments)
    ids = world.items["item_id"].gather(items) if items is not None else pl.repeat(None, n, dtype=pl.String, eager=True)
    return pl.DataFrame(
        [
            world.users["user_id"].gather(moments.users).alias("user_id"),
            ids.alias("item_id"),
            split_names(moments.splits).alias("split"),
            pl.Series("label", np.full(n, -1) if labels is None else labels, dtype=pl.Int32),
            *(series.alias(name) for name, series in fields.items()),
        ]
    )


def _moments(world: World, events: np.ndarray) -> Moments:
    """The moments before some events."""
    every = world.events
    return Moments(every.users[events], events, every.times[events], world.label[events])


def _targets(asks: Asks, least_before: int) -> np.ndarray:
    """Events that may be predicted and have so many events of their user before them, as many as are wanted."""
    world = asks.world
    before = np.arange(len(world.events.users)) - world.starts[world.events.users]
    chosen = np.flatnonzero(world.events.is_target & (before >= least_before))
    return sampled(chosen, world.label, asks.task.most)


# -- scoring -------------------------------------------------------------------------------------------------------


def _click(asks: Asks) -> Made:
    """Impressions and whether they were clicked; where nothing was recorded as shown, rated events."""
    return _shown(asks) if asks.world.shown is not None else _rated(asks)


def _conversion(asks: Asks) -> Made:
    """Rated events; impressions where there is no rating."""
    return _rated(asks) if np.isfinite(asks.world.values).any() or asks.world.shown is None else _shown(asks)


def _shown(asks: Asks) -> Made:
    world = asks.world
    shown = world.shown
    if shown is None:
        raise asks.refuse(f"{asks.template.task} is made from impressions or rated events, and there are neither")
    shown = shown.drop_nulls("clicked")
    users, items = rows_of(shown["user_id"], world.users["user_id"]), rows_of(shown["item_id"], world.items["item_id"])
    known = (users >= 0) & (items >= 0)
    users, items, times = users[known].astype(np.int64), items[known], shown["time"].to_numpy()[known]
    labels = shown["clicked"].cast(pl.Int32).to_numpy()[known]
    splits = _split_at(world, users, times)
    chosen = sampled(np.arange(len(users)), splits, asks.task.most)
    users, items, times, splits, labels = (x[chosen] for x in (users, items, times, splits, labels))
    moments = Moments(users, _ends(world, users, times, splits), times, splits)
    return _scored(asks, moments, items, labels)


def _split_at(world: World, users: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The split of a moment of each user: that which the user's own events, or, of one without any held out, all events
    have reached by then."""
    made = np.zeros(len(users), np.uint8)
    far = np.iinfo(np.int64).max
    for number in (VALID, TEST):
        first = np.full(world.users.height, far, np.int64)
        late = world.label >= number
        np.minimum.at(first, world.events.users[late], world.events.times[late])
        everyone = int(world.events.times[late].min(initial=far)) if world.timed else far
        made[times >= np.where(first == far, everyone, first)[users]] = number
    return made


def _ends(world: World, users: np.ndarray, times: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """Where each user's events before a time end; of a training moment training events alone."""
    ends = np.empty(len(users), np.int64)
    for place, (user, time, split) in enumerate(zip(users.tolist(), times.tolist(), splits.tolist(), strict=True)):
        start, stop = int(world.starts[user]), int(world.starts[user + 1])
        end = start + int(np.searchsorted(world.events.times[start:stop], time, side="left"))
        # Labels never fall along a user.
        ends[place] = min(end, start + int(np.searchsorted(world.label[start:stop], split, side="right")))
    return ends


def _rated(asks: Asks) -> Made:
    world = asks.world
    rated = np.isfinite(world.values) & (world.events.items >= 0)
    if not rated.any():
        raise asks.refuse(f"{asks.template.task} is made from impressions or rated events, and the events have no value")  # fmt: skip
    least = _least(asks, rated)
    chosen = sampled(np.flatnonzero(rated), world.label, asks.task.most)
    return _scored(asks, _moments(world, chosen), world.events.items[chosen], (world.values[chosen] >= least).astype(np.int32))  # fmt: skip


def _least(asks: Asks, rated: np.ndarray) -> float:
    """From which value on an event counts as liked: as the card says, else the one that parts training events best in two."""
    world = asks.world
    values = np.sort(world.values[rated & (world.label == TRAIN)])
    least = asks.task.least
    if least is None:
        if not len(values) or values[0] == values[-1]:
            raise asks.refuse("all rated events have one value, so none is better than another")
        steps = np.unique(values)[1:]
        shares = 1 - np.searchsorted(values, steps, side="left") / len(values)
        return float(steps[np.argmin(np.abs(shares - 0.5))])
    if len(values) and not values[0] < least <= values[-1]:
        raise InputError(f"{asks.where}.least: {least:g}: the values of training events lie between {values[0]:g} and {values[-1]:g}; choose one that parts them")  # fmt: skip
    return least


def _scored(asks: Asks, moments: Moments, items: np.ndarray, labels: np.ndarray) -> Made:
    world, language = asks.world, asks.language
    about = told_users(world, moments, language) | told_items(world, items, moments.splits, language)
    stats = statistics(world, moments, items, language)
    options = tuple(asks.task.options) or asks.template.options or ("no", "yes")
    return _frame(world, moments, items, labels, **about, statistics=stats), options


# -- pairs and texts ------------------------------------------------------------------------------------------------


def _retrieval(asks: Asks) -> Made:
    """A history, and the item that came next."""
    chosen = _targets(asks, 1)
    moments, items = _moments(asks.world, chosen), asks.world.events.items[chosen]
    about = told_users(asks.world, moments, asks.language)
    return _frame(asks.world, moments, items, None, **about, **told_items(asks.world, items, moments.splits, asks.language)), ()  # fmt: skip


def _plausibility(asks: Asks) -> Made:
    """Two events of a user one after the other; held out, each again with an item that the user never had, drawn by how
    often training has it, so that the frequent are no giveaway."""
    world, events = asks.world, asks.world.events
    chosen = _targets(asks, 1)
    chosen = chosen[events.items[chosen - 1] >= 0]
    held = chosen[world.label[chosen] > TRAIN]
    rng, mass = np.random.default_rng(0), world.train_counts.astype(np.float64)
    had = {user: set(events.items[world.starts[user] : world.starts[user + 1]].tolist()) for user in np.unique(events.users[held]).tolist()}  # fmt: skip
    wrong = np.full(len(held), -1, np.int64)
    if mass.any():
        for _ in range(20):  # who had nearly everything has no wrong item
            missing = np.flatnonzero(wrong < 0)
            drawn = rng.choice(len(mass), len(missing), p=mass / mass.sum())
            for place, item in zip(missing.tolist(), drawn.tolist(), strict=True):
                if item not in had[int(events.users[held[place]])]:
                    wrong[place] = item
    found = wrong >= 0
    at = np.concatenate([chosen, held[found]])
    items = np.concatenate([events.items[chosen], wrong[found]]).astype(np.int64)
    labels = np.concatenate([np.ones(len(chosen)), np.zeros(int(found.sum()))]).astype(np.int32)
    order = np.lexsort((1 - labels, at))
    at, items, labels = at[order], items[order], labels[order]
    moments = _moments(world, at)
    who = pl.Series([world.who[user] for user in moments.users.tolist()], dtype=pl.String)
    first = pl.Series([world.titles[i] for i in events.items[at - 1].tolist()], dtype=pl.String)
    title = pl.Series([world.titles[i] for i in items.tolist()], dtype=pl.String)
    return _frame(world, moments, items, labels, user=who, first=first, item=title), ()


def _explain(asks: Asks) -> Made:
    """An item that a user took, and what it shares with the latest of those before with which it shares the most."""
    world, events = asks.world, asks.world.events
    chosen = _targets(asks, 1)
    rated = np.isfinite(world.values)
    if rated.any():
        least = _least(asks, rated & (events.items >= 0))
        chosen = chosen[~rated[chosen] | (world.values[chosen] >= least)]
    reasons, kept = [], []
    topics = [set(some) for some in world.said_categories]
    for e in chosen.tolist():
        start = max(int(world.starts[events.users[e]]), e - BEFORE)
        if why := reason(world, int(events.items[e]), events.items[start:e].tolist(), topics, asks.language):
            reasons.append(why)
            kept.append(e)
    at = np.array(kept, np.int64)
    if not len(at):
        raise asks.refuse("explain is made from categories that items of a user share, and there are none")
    moments, items = _moments(world, at), events.items[at]
    about = told_users(world, moments, asks.language) | told_items(world, items, moments.splits, asks.language)
    return _frame(world, moments, items, None, **about, reason=pl.Series(reasons, dtype=pl.String)), ()


def _describe(asks: Asks) -> Made:
    """What came next, without its name: its categories, facts and the beginning of its text."""
    world = asks.world
    chosen = _targets(asks, 1)
    items = world.events.items[chosen]
    held = (world.item_splits > TRAIN)[items] & (world.label[chosen] == TRAIN)
    wanted = [described(world, i, asks.language) for i in range(world.items.height)]
    has = np.array([bool(text) for text in wanted], bool)[items] & ~held
    chosen, items = chosen[has], items[has]
    if not len(chosen):
        raise asks.refuse("describe is made from categories, attributes and texts of items, and there are none")
    moments = _moments(world, chosen)
    said = pl.Series([wanted[i] for i in items.tolist()], dtype=pl.String)
    return _frame(world, moments, items, None, **told_users(world, moments, asks.language), wanted=said), ()


def _query(asks: Asks) -> Made:
    """What was searched for, from what was done before. Where nobody's searches are known: what finds the next item."""
    world = asks.world
    asked = np.flatnonzero((world.events.items < 0) & world.events.texts.is_not_null().to_numpy())
    if not len(asked):
        chosen = _targets(asks, 1)
        moments, items = _moments(world, chosen), world.events.items[chosen]
        said = pl.Series([searched(world, i) for i in items.tolist()], dtype=pl.String)
        return _frame(world, moments, items, None, **told_users(world, moments, asks.language), query=said), ()
    chosen = sampled(asked, world.label, asks.task.most)
    moments = _moments(world, chosen)
    return _frame(world, moments, None, None, **told_users(world, moments, asks.language), query=world.events.texts.gather(chosen)), ()  # fmt: skip


def _sentiment(asks: Asks) -> Made:
    """Texts about an item with a value: reviews."""
    world = asks.world
    told = (world.events.items >= 0) & world.events.texts.is_not_null().to_numpy() & np.isfinite(world.values)
    if not told.any():
        raise asks.refuse("sentiment is made from events with an item, a text and a value, and there are none")
    least = _least(asks, told)
    chosen = sampled(np.flatnonzero(told), world.label, asks.task.most)
    moments, items = _moments(world, chosen), world.events.items[chosen]
    titles = pl.Series([world.titles[i] for i in items.tolist()], dtype=pl.String)
    labels = (world.values[chosen] >= least).astype(np.int32)
    options = tuple(asks.task.options) or asks.template.options
    if len(options) != 2:
        raise InputError(f"{asks.where}.options: {len(options)} options: made from values there are two, the negative first")  # fmt: skip
    return _frame(world, moments, items, labels, item=titles, text=world.events.texts.gather(chosen)), options


def _interest(asks: Asks) -> Made:
    """What a user is interested in, from all that training has of the user; the users are split."""
    world = asks.world
    end = np.array([int(np.searchsorted(world.label[a:b], TRAIN, side="right")) + a for a, b in zip(world.starts[:-1].tolist(), world.starts[1:].tolist(), strict=True)], np.int64)  # fmt: skip
    users = np.flatnonzero(end > world.starts[:-1])
    last = world.events.times[end[users] - 1] if len(users) else np.zeros(0, np.int64)
    whole = Moments(users, end[users], last, world.user_splits[users])
    summaries = [""] * len(users)
    for place, counts in counted_topics(world, whole):
        summaries[place] = listed(top_topics(counts), asks.language)
    kept = sampled(np.flatnonzero([bool(one) for one in summaries]), whole.splits, asks.task.most)
    if not len(kept):
        raise asks.refuse("interest is made from categories of items, and there are none")
    moments = Moments(*(getattr(whole, name)[kept] for name in Moments.__dataclass_fields__))
    about = told_users(world, moments, asks.language)
    summary = pl.Series([summaries[i] for i in kept.tolist()], dtype=pl.String)
    return _frame(world, moments, None, None, **about, summary=summary), ()


RECIPES: dict[str, Recipe] = {
    "click": _click,
    "conversion": _conversion,
    "plausibility": _plausibility,
    "retrieval": _retrieval,
    "explain": _explain,
    "describe": _describe,
    "query": _query,
    "sentiment": _sentiment,
    "interest": _interest,
    **TEXT_RECIPES,
}
