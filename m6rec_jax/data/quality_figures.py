"""The numbers behind the quality report: what is missing, what stands out, who looks automatic, what is popular.

Everything is one pass of array arithmetic over events sorted by user; a million events take about a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

from m6rec_jax.data.card import Card
from m6rec_jax.data.clean import REJECTING, REPAIRING, RULES, Cleaned, near_duplicates
from m6rec_jax.data.inequality import gini
from m6rec_jax.data.sources import Tables
from m6rec_jax.data.splits import SPLITS, TRAIN, split_events
from m6rec_jax.errors import InputError

BOT_EVENTS = 100  # a user with fewer events is never suspected
BOT_TIMES = 10  # times the events that 95 % of the users stay under
BOT_SECOND = 0.9  # share of pauses of at most a second
BOT_SINGLE = 0.8  # share of events on one item
BOT_HOURS = 22  # different hours of one day
FENCE = 3.0  # quartile ranges beyond the quartiles
BUCKETS = 60
ACTIVITY_SPAN = (0.05, 99.95)  # per cent of the times
SHOWN = 8  # rows of a list of examples


def figures(tables: Tables, cleaned: Cleaned, card: Card) -> dict[str, Any]:
    """Every number of the report, plain values only; `limits` holds those that thresholds of a card refer to."""
    events, items = cleaned.tables.events, cleaned.tables.items
    assert items is not None
    users = events["user_id"].rle_id().to_numpy().astype(np.int64)
    index = items.select("item_id", pl.int_range(pl.len(), dtype=pl.Int64).alias("at"))
    at = events.select("item_id").join(index, on="item_id", how="left", maintain_order="left")["at"]
    rows = at.fill_null(-1).to_numpy()
    times = events["time"].to_numpy()
    timed = card.events.time_unit != "order"
    real = rows >= 0
    by_user, by_item = np.bincount(users), np.bincount(rows[real], minlength=items.height)
    read = tables.events.height + tables.rejected.filter(pl.col("table") == "events").height
    rejected = cleaned.rejected.filter(pl.col("table") == "events")
    by_rule = dict(rejected["rule"].value_counts().iter_rows())
    found: dict[str, Any] = {
        "name": card.name,
        "read": read,
        "events": events.height,
        "users": len(by_user),
        "items": items.height,
        "density": events.height / max(len(by_user) * items.height, 1),
        "timed": timed,
        "from": day(times.min()) if timed else None,
        "to": day(times.max()) if timed else None,
        "ties": float(((np.diff(times) == 0) & (np.diff(users) == 0)).sum() / max(len(times) - len(by_user), 1)),
        "repeats": _repeats(users[real], rows[real], items.height),
        "per_user": spread(by_user),
        "per_item": spread(by_item[by_item > 0]),
        "short_users": int((by_user < 3).sum()),
        "rules": rules(cleaned, by_rule),
        "missing": missing(tables, card),
        "outliers": outliers(events, items, card),
        "bots": bots(
            lambda u: events["user_id"][int(by_user[:u].sum())],
            by_user,
            *busy_users(users, rows, times, by_user, timed),
            timed=timed,
        ),
        "tail": tail(by_item),
        "near": near(items),
        "drift": _drift(users, rows, times, events, card),
    }
    if timed:
        found["activity"] = _activity(times, users)
    found["limits"] = limit_figures(found, cleaned.counts, rejected.height, by_rule)
    return found


def limit_figures(found: dict[str, Any], counts: dict[str, int], rejected: int, by_rule: dict[str, int]) -> dict[str, Any]:  # fmt: skip
    """The figures that thresholds of a card refer to; `rejected` and `by_rule` count event rows."""
    read = found["read"]
    return {
        "rejected": rejected / max(read, 1),
        "duplicate_events": by_rule.get("duplicate_event", 0) / max(read, 1),
        "unknown_items": by_rule.get("unknown_item", 0) / max(read, 1),
        "missing_titles": counts["empty_title"] / found["items"],
        "near_duplicates": counts["near_duplicate_item"] / found["items"],
        "bot_events": found["bots"]["share"],
        "new_item_events": found["drift"]["new_items"],
        "gini": found["tail"]["gini"],
        "top_share": found["tail"]["top_share"],
        "events": found["events"],
        "users": found["users"],
        "items": found["items"],
    }


def _repeats(users: np.ndarray, rows: np.ndarray, n_items: int) -> float:
    """Share of events on an item that the user had before."""
    return 1 - pl.Series(users * n_items + rows).n_unique() / max(len(rows), 1)


def spread(counts: np.ndarray) -> dict[str, float]:
    low, half, high, top = np.percentile(counts, [25, 50, 75, 99])
    return {"mean": float(counts.mean()), "min": int(counts.min()), "q1": float(low), "median": float(half),
            "q3": float(high), "p99": float(top), "max": int(counts.max())}  # fmt: skip


def day(seconds: float) -> str:
    """A date; times beyond the calendar stay numbers."""
    try:
        return str(np.datetime64(int(seconds), "s").astype("datetime64[D]"))
    except (ValueError, OverflowError):
        return str(int(seconds))


def rules(cleaned: Cleaned, by_rule: dict[str, int]) -> list[dict[str, Any]]:
    """The rules that met something, with examples of the rows they rejected."""
    made = []
    for rule, said in RULES.items():
        if n := cleaned.counts.get(rule, 0):
            some = cleaned.rejected.filter(pl.col("rule") == rule).head(3) if rule in REJECTING else None
            examples = [] if some is None else some.select("table", "row", "content").to_dicts()
            does = "rejected" if rule in REJECTING else "repaired" if rule in REPAIRING else "noted"
            made.append(
                {
                    "rule": rule,
                    "said": said,
                    "count": n,
                    "does": does,
                    "rejects": rule in REJECTING,
                    "examples": examples,
                }
            )
    return made


def missing(tables: Tables, card: Card) -> list[dict[str, Any]]:
    """Share of empty cells in each column that the card names, as it was read."""
    made = []
    unnamed = {"events": ("kind", "value", "text"), "items": ("title", "published", "type", "image", "audio", "video")}
    for name in ("events", "items", "users", "impressions"):
        frame = getattr(tables, name)
        if frame is None or (section := getattr(card, name)) is None:
            continue
        for column in frame.columns:
            optional = column in unnamed.get(name, ()) or column in ("text", "categories", "attributes")
            if column in ("row", "fraction") or (optional and not getattr(section, column, "")):
                continue
            cells = frame[column]
            empty = cells.list.len().fill_null(0) == 0 if cells.dtype == pl.List else cells.is_null()
            made.append({"table": name, "column": column, "rows": frame.height, "missing": int(empty.sum())})
    lost = tables.rejected["table"].value_counts() if tables.rejected.height else None
    for table, n in lost.iter_rows() if lost is not None else ():
        for one in made:
            if one["table"] == table:
                one["rows"] += n  # rows whose time could not be read had a cell there
    return made


def outliers(events: pl.DataFrame, items: pl.DataFrame, card: Card) -> list[dict[str, Any]]:
    """Number columns, text lengths and times: quartiles, and how many lie far outside them."""
    columns: list[tuple[str, np.ndarray]] = []
    if card.events.value:
        columns.append((f"events: {card.events.value}", events["value"].drop_nulls().to_numpy()))
    for name in (c for c in items.columns if c.startswith("num_")):
        columns.append((f"items: {name.removeprefix('num_')}", items[name].drop_nulls().to_numpy()))
    for name in ("title", "text"):
        if (lengths := items[name].str.len_chars().to_numpy()).any():
            columns.append((f"items: characters of {name}", lengths[lengths > 0]))
    made = []
    for name, numbers in columns:
        if not len(numbers):
            continue
        low, half, high = np.percentile(numbers, [25, 50, 75])
        fence = FENCE * (high - low)
        outside = int(((numbers < low - fence) | (numbers > high + fence)).sum()) if fence else 0
        made.append({"name": name, "min": float(numbers.min()), "q1": float(low), "median": float(half),
                     "q3": float(high), "max": float(numbers.max()), "outside": outside, "n": len(numbers)})  # fmt: skip
    return made


def busy_users(users: np.ndarray, rows: np.ndarray, times: np.ndarray, by_user: np.ndarray,
               timed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Of each user with many events [u]: events on one item, share of short pauses, hours of one day; 0 of others."""
    many = by_user >= BOT_EVENTS
    most, fast, awake = np.zeros(len(by_user), np.int64), np.zeros(len(by_user)), np.zeros(len(by_user), np.int64)
    if many.any():
        mine = many[users]
        u, r, t = users[mine], rows[mine], times[mine]
        most = _most(u, r, len(by_user))
        if timed:
            same = np.diff(u) == 0
            fast = np.bincount(u[1:][same & (np.diff(t) <= 1)], minlength=len(by_user)) / np.maximum(by_user - 1, 1)
            hours = pl.DataFrame({"u": u, "hour": t // 3600}).unique()
            awake = _most(hours["u"].to_numpy(), hours["hour"].to_numpy() // 24, len(by_user))
    return most, fast, awake


def bots(name_of: Callable[[int], str], by_user: np.ndarray, most: np.ndarray, fast: np.ndarray, awake: np.ndarray,
         timed: bool) -> dict[str, Any]:  # fmt: skip
    """Users that look automatic: far more events than anyone, no pauses, one item only, or no sleep."""
    reasons: dict[int, list[str]] = {}
    many = by_user >= BOT_EVENTS
    usual = float(np.percentile(by_user, 95, method="lower"))
    for user in np.flatnonzero(many & (by_user > BOT_TIMES * usual)):
        reasons.setdefault(int(user), []).append(
            f"{by_user[user]:,} events, 95 % of the users have at most {usual:,.0f}"
        )
    for user in np.flatnonzero(many & (most > BOT_SINGLE * by_user)):
        reasons.setdefault(int(user), []).append(f"{100 * most[user] / by_user[user]:.0f} % of events on one item")
    if timed:
        for user in np.flatnonzero(many & (fast > BOT_SECOND)):
            reasons.setdefault(int(user), []).append(f"{100 * fast[user]:.0f} % of pauses last a second or less")
        for user in np.flatnonzero(many & (awake >= BOT_HOURS)):
            reasons.setdefault(int(user), []).append(f"active in {awake[user]} hours of one day")
    ordered = sorted(reasons, key=lambda user: -by_user[user])
    listed = [{"user": name_of(u), "events": int(by_user[u]), "why": "; ".join(reasons[u])} for u in ordered[:SHOWN]]
    share = float(by_user[ordered].sum() / by_user.sum()) if ordered else 0.0
    return {"count": len(ordered), "share": share, "listed": listed}


def _most(users: np.ndarray, values: np.ndarray, n_users: int) -> np.ndarray:
    """How often each user has its most frequent value."""
    most = pl.DataFrame({"u": users, "v": values}).group_by("u", "v").len().group_by("u").agg(pl.col("len").max())
    made = np.zeros(n_users, np.int64)
    made[most["u"].to_numpy()] = most["len"].to_numpy()
    return made


def tail(by_item: np.ndarray) -> dict[str, Any]:
    """How events are shared among items."""
    ordered = np.sort(by_item)[::-1]
    running = np.cumsum(ordered) / max(ordered.sum(), 1)
    top = max(1, round(0.01 * len(ordered)))
    points = np.unique(np.linspace(0, len(ordered), 101).round().astype(int))
    lorenz = np.concatenate([[0.0], np.cumsum(ordered[::-1]) / max(ordered.sum(), 1)])[points]
    return {
        "gini": gini(by_item),
        "top_share": float(running[top - 1]),
        "half": int(np.searchsorted(running, 0.5) + 1),
        "never": int((by_item == 0).sum()),
        "rare": int(((by_item > 0) & (by_item < 5)).sum()),
        "lorenz": [(points / len(ordered)).round(4).tolist(), lorenz.round(4).tolist()],
    }


def near(items: pl.DataFrame) -> list[dict[str, Any]]:
    groups = near_duplicates(items).head(SHOWN)
    return [{"ids": ids[:4], "titles": list(dict.fromkeys(titles))[:2], "count": n} for ids, titles, n in groups.iter_rows()]  # fmt: skip


def _activity(times: np.ndarray, users: np.ndarray) -> dict[str, Any]:
    """Events, and users seen for the first time, in equal spans of time; the outermost 0.1 % may be cut off."""
    low, high = np.percentile(times, ACTIVITY_SPAN)
    edges = np.linspace(low, max(high, low + 1), BUCKETS + 1)
    first = times[np.flatnonzero(np.diff(users, prepend=-1))]
    return {
        "edges": [day(edge) for edge in edges],
        "events": np.histogram(times, edges)[0].tolist(),
        "new_users": np.histogram(first, edges)[0].tolist(),
        "outside": int(((times < low) | (times > edges[-1])).sum()),
    }


def _drift(users: np.ndarray, rows: np.ndarray, times: np.ndarray, events: pl.DataFrame, card: Card) -> dict[str, Any]:
    """How held-out events differ from training ones: new items and users, popularity, the most popular items, values."""
    weights = {kind for kind, weight in card.kinds.items() if weight == 0} if card.events.kind else set()
    target = (rows >= 0) & ~events["kind"].is_in(list(weights)).fill_null(False).to_numpy()
    try:
        label = split_events(users, times, target, card.split)
    except InputError:  # the split cannot be made; `prepare` says so itself
        label = np.zeros(len(users), np.uint8)
    real = rows >= 0
    n_items = int(rows.max()) + 1
    train = np.bincount(rows[real & (label == TRAIN)], minlength=n_items)
    known_users = np.bincount(users[label == TRAIN], minlength=int(users.max()) + 1) > 0
    rank = np.empty(n_items, np.int64)
    rank[np.argsort(-train, kind="stable")] = np.arange(n_items)
    seen = max(int((train > 0).sum()), 1)
    band = np.select([train == 0, rank < max(1, 0.01 * seen), rank < 0.1 * seen], [3, 0, 1], 2)
    popular = set(np.argsort(-train, kind="stable")[:100].tolist())
    values = events["value"].to_numpy()
    parts, new = [], 0.0
    for number, name in enumerate(SPLITS):
        mine = real & (label == number)
        if not mine.any():
            continue
        counts = np.bincount(rows[mine], minlength=n_items)
        top = np.argsort(-counts, kind="stable")[: min(100, int((counts > 0).sum()))]
        mean = float(np.nanmean(values[mine])) if card.events.value and not np.isnan(values[mine]).all() else None
        parts.append(
            {
                "name": name,
                "events": int(mine.sum()),
                "users": int((np.bincount(users[mine]) > 0).sum()),
                "items": int((counts > 0).sum()),
                "new_items": float((train[rows[mine]] == 0).mean()),
                "new_users": float((~known_users[users[mine]]).mean()),
                "popularity": float(np.median(train[rows[mine]])),
                "top": len(popular.intersection(top.tolist())) / len(top),
                "value": mean,
                "bands": (np.bincount(band[rows[mine]], minlength=4) / mine.sum()).round(4).tolist(),
                "from": day(times[mine].min()) if card.events.time_unit != "order" else None,
                "to": day(times[mine].max()) if card.events.time_unit != "order" else None,
            }
        )
    held = real & (label != TRAIN)
    if held.any():
        new = float((train[rows[held]] == 0).mean())
    return {"rule": card.split.rule, "parts": parts, "new_items": new}
