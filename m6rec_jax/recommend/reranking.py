"""What a list must keep to besides its order: so many items of one kind, variety, a share of new items.

A list is chosen place by place from a longer one, each time the best item that the rules still let through:

- *cap*: no value of a column (category, brand) stands in a list more than N times.
- *diversity* D: maximal marginal relevance (Carbonell & Goldstein 1998), the highest
  (1 - D) exp(score - best score) - D max cosine to the items chosen before, over content vectors.
- *new items* S: of the first p places, at least floor(S p) go to items without a training event, as long as there are
  such items (a minimum in each prefix, as DetGreedy has it: Geyik, Ambler & Kenthapadi 2019). So the j-th new item
  stands at place ceil(j / S) at the latest, and one that stands higher by its own score counts.

Where the longer list runs out before a list is full it is asked for again, twice as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from m6rec_jax.errors import InputError
from m6rec_jax.recommend.filters import LIST, NUMBER, item_columns, named
from m6rec_jax.recommend.lists import Lists

POOL = 10  # times k: what diversity chooses from ...
LEAST_POOL = 100  # ... and from no fewer
NUMBERS = 1 << 24  # of content vectors gathered at once
ROUNDING = 1e-9  # 100 x 0.29 is below 29 in floating point


def check_rules(per: str | None, cap: int | None, diversity: float, new_items: float, form: str = "{}") -> None:
    """Raise InputError for settings out of range or half given; `form` is how a name is written (`--{}`)."""
    if (per is None) != (cap is None):
        given, missing = (
            (f"{form.format('per')} {per}", "cap") if cap is None else (f"{form.format('cap')} {cap}", "per")
        )
        raise InputError(f"{given}: says nothing without {form.format(missing)}; give both")
    if cap is not None and cap < 1:
        raise InputError(f"{form.format('cap')}={cap}: must be above 0")
    dash = "-" if form.startswith("--") else "_"
    for name, value in (("diversity", diversity), (f"new{dash}items", new_items)):
        if not 0 <= value <= 1:
            raise InputError(f"{form.format(name)}={value}: must lie between 0 and 1; 0 leaves it out")


def values_of(items: pl.DataFrame, per: str) -> np.ndarray:
    """The values of each item in a column as codes, int32 `[C,m]`: m is the most an item has, -1 = none.

    Columns go by the names that filters know. Raises InputError for another name.
    """
    columns = item_columns(items)
    if per not in columns:
        raise InputError(f"per={per}: no such item column; there are {named(columns)}")
    name, kind = columns[per]
    cells = pl.col(name).cast(pl.Float64).fill_nan(None) if kind == NUMBER else pl.col(name)
    rows = items.select(cells.alias("value")).with_row_index("row")
    rows = rows.explode("value", empty_as_null=True) if kind == LIST else rows
    rows = rows.drop_nulls().unique(maintain_order=True)
    code = rows["value"].rank("dense").to_numpy().astype(np.int32) - 1
    row = rows["row"].to_numpy()
    place = np.arange(len(row)) - np.searchsorted(row, row)
    made = np.full((items.height, int(place.max(initial=0)) + 1), -1, np.int32)
    made[row, place] = code
    return made


@dataclass(frozen=True)
class Rules:
    """The rules of all lists of a call, over C items of which `allowed` bool `[C]` may be shown at all.

    `values [C,m]` and `cap`; `diversity` over `content [C,Dc]`; `share` of the items that are `new` bool `[C]`. None, or
    0, leaves a rule out. An item's score is the one it was ranked by, wherever it is put: scores then no longer fall
    along a list.
    """

    allowed: np.ndarray
    values: np.ndarray | None = None
    cap: int = 0
    content: np.ndarray | None = None
    diversity: float = 0.0
    new: np.ndarray | None = None
    share: float = 0.0

    def due(self, places: int) -> int:
        """How many new items the first `places` of a list must have."""
        return int(self.share * places + ROUNDING) if self.new is not None else 0

    def width(self, k: int) -> int:
        """How long a list to choose k items from, at first."""
        wide = max(POOL * k, LEAST_POOL) if self.diversity else 2 * k if self.values is not None else k
        return min(wide, len(self.allowed))

    @cached_property
    def _supply(self) -> dict[bool, tuple[np.ndarray, int, int]]:
        """Of all items, and of the new ones: how many have each value, how many have none, how many there are."""
        found = {}
        for new in (False, True):
            there = self.allowed if not new or self.new is None else self.allowed & self.new
            codes = self._codes[there]
            size = int(self._codes.max(initial=-1)) + 1
            found[new] = np.bincount(codes[codes >= 0], minlength=size), int((codes < 0).all(1).sum()), len(codes)
        return found

    @property
    def _codes(self) -> np.ndarray:
        return np.full((len(self.allowed), 1), -1, np.int32) if self.values is None else self.values

    def most(self, had: np.ndarray, new: bool = False) -> int:
        """A bound on how many items a list can hold under the cap for who does not get the rows `had`."""
        counts, without, total = self._supply[new]
        left = had[self.allowed[had]] if not new or self.new is None else had[self.allowed[had] & self.new[had]]
        gone = self._codes[np.unique(left)]
        counts = counts - np.bincount(gone[gone >= 0], minlength=len(counts))
        without, total = without - int((gone < 0).all(1).sum()), total - len(gone)
        if self.values is None or not len(counts):
            return total
        # One bound is tight where items have one value, the other where all share one, as a root of categories.
        return min(without + int(np.minimum(counts, self.cap).sum()), self.cap + total - int(counts.max()))


def rules_of(items: pl.DataFrame, allowed: np.ndarray | None, content: Callable[[], np.ndarray] | None, *,
             per: str | None, cap: int | None, diversity: float, new_items: float) -> Rules | None:  # fmt: skip
    """The rules of a call over items.parquet and the items' content vectors; None where nothing is asked for.

    Raises InputError for settings out of range, an unknown column, and what these items do not have.
    """
    check_rules(per, cap, diversity, new_items)
    if per is None and not diversity and not new_items:
        return None
    if diversity and content is None:
        raise InputError(
            f"diversity={diversity}: there are no content vectors of the items; open a run, or leave it out"
        )
    if new_items and "seen" not in items.columns:
        raise InputError(f"new_items={new_items}: the items have no column seen; prepare the dataset again")
    return Rules(
        allowed=np.ones(items.height, bool) if allowed is None else allowed,
        values=None if per is None else values_of(items, per), cap=cap or 0,
        content=content() if diversity and content is not None else None, diversity=diversity,
        new=~items["seen"].to_numpy() if new_items else None, share=new_items,
    )  # fmt: skip


def kept(rules: Rules, ask: Callable[[np.ndarray, int, np.ndarray | None], Lists], had: Sequence[np.ndarray], k: int) -> Lists:  # fmt: skip
    """Lists of k for users 0..U-1 that keep to the rules.

    `ask(users, width, within)` gives some users' lists of that width, among the items `within` bool `[C]` (None: all)
    in the order of their scores; `had[u]`: rows that user u does not get.
    """
    made, left, width = Lists.empty(len(had), k), np.arange(len(had)), rules.width(k)
    while len(left):
        pool = ask(left, width, None)
        fresh = ask(left, width, rules.new) if rules.due(k) else None
        places = chosen(rules, pool, fresh, k)
        lists = (pool if fresh is None else pool.beside(fresh)).places(places)
        made.put(left, lists)
        if width == len(rules.allowed):
            break
        short = ((lists.rows >= 0).sum(1) < k) & (pool.rows[:, -1] >= 0)
        stale, count = np.zeros(len(left), bool), np.zeros(len(left), int)
        if fresh is not None:
            count = ((lists.rows >= 0) & rules.new[lists.rows]).sum(1)
            stale = (count < rules.due(k)) & (fresh.rows[:, -1] >= 0)
        deeper = [
            i
            for i in np.flatnonzero(short | stale)
            if (short[i] and (lists.rows[i] >= 0).sum() < min(k, rules.most(had[left[i]])))
            or (stale[i] and count[i] < min(rules.due(k), rules.most(had[left[i]], new=True)))
        ]
        left, width = left[deeper], min(2 * width, len(rules.allowed))
    return made


def chosen(rules: Rules, pool: Lists, fresh: Lists | None, k: int) -> np.ndarray:
    """Which places of `pool [U,n]` make a list, int64 `[U,k]` (-1 = none left that the rules let through).

    `fresh [U,n']` holds each user's best new items; its places count on after those of the pool.
    """
    both = pool if fresh is None else pool.beside(fresh)
    width = 1 if rules.content is None else rules.content.shape[1]
    step = max(1, NUMBERS // max(1, both.rows.shape[1] * width))
    parts = [
        _chosen(rules, both.rows[at], both.scores[at], pool.rows.shape[1], k)
        for at in (slice(start, start + step) for start in range(0, len(both.rows), step))
    ]
    return np.concatenate(parts) if parts else np.zeros((0, k), np.int64)


def _chosen(rules: Rules, rows: np.ndarray, scores: np.ndarray, pool: int, k: int) -> np.ndarray:
    users, n = rows.shape
    every, known, D = np.arange(users), np.maximum(rows, 0), rules.diversity
    free, in_pool = rows >= 0, np.arange(n) < pool
    # A rule that is off has arrays of no width, which forbid nothing and weigh nothing.
    values = np.zeros((*rows.shape, 0), np.int32) if rules.values is None else rules.values[known]
    content = np.zeros((*rows.shape, 0)) if rules.content is None else rules.content[known]
    content = content / np.maximum(np.linalg.norm(content, axis=-1, keepdims=True), 1e-12)
    is_new = np.zeros(rows.shape, bool) if rules.new is None else rules.new[known]
    counts, alike, new = np.zeros(values.shape, np.int32), np.full(rows.shape, -1.0), np.zeros(users, int)
    if D:
        best = np.max(np.where(free & in_pool, scores, -np.inf), axis=1, initial=-np.inf)
        worth = np.exp(np.where(free, scores, -np.inf) - np.where(np.isfinite(best), best, 0)[:, None])
    else:
        worth = np.broadcast_to(-np.arange(n, dtype=np.float64), rows.shape)  # the order as it is
    places = np.full((users, k), -1)
    for place in range(k):
        open_ = free & (counts < rules.cap).all(-1)
        due = open_ & is_new & (new < rules.due(place + 1))[:, None]
        open_ = np.where(due.any(1)[:, None], due, open_ & in_pool)
        at = np.argmax(np.where(open_, (1 - D) * worth - D * alike, -np.inf), axis=1)
        some = open_[every, at]
        places[some, place] = at[some]
        new += some & is_new[every, at]
        free = free & some[:, None] & (rows != rows[every, at][:, None])  # where nothing was left the list ends
        alike = np.maximum(alike, np.einsum("und,ud->un", content, content[every, at]))
        for value in np.where(some[:, None], values[every, at], -1).T:
            counts += (values == value[:, None, None]) & (values >= 0)
    return places
