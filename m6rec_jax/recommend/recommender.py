"""The Python face: `Recommender.load(run).recommend(history, k=10)`, and the same for many histories at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from m6rec_jax.artifacts.run import read_run
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.recommend.baselines import ItemKNN, Popularity
from m6rec_jax.recommend.coldstart import GATE, SOURCES, Way, way
from m6rec_jax.recommend.gate import Gate
from m6rec_jax.recommend.histories import Histories
from m6rec_jax.recommend.memory import Memory, Support
from m6rec_jax.recommend.opening import (
    check_fits,
    domain_of,
    gate_of,
    open_engine,
    open_item_knn,
    own_memory,
    tell_first,
)
from m6rec_jax.recommend.segments import Segments, open_segments

NONE, MODEL, MEMORY, POPULARITY = range(len(SOURCES))


@dataclass(frozen=True)
class Recommendation:
    """One place of a list. `score` is the probability given to the item; `because` the titles behind a memory's item."""

    item_id: str
    title: str
    score: float
    source: str
    rank: int
    route: str
    because: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lists:
    """Ranked lists of U users as arrays.

    `rows` int32 `[U,k]` catalogue rows, -1 where the catalogue is used up; `scores` float32 `[U,k]` log-probabilities,
    falling along each list; `sources` uint8 `[U,k]`, indices into `coldstart.SOURCES`; `routes [U]` names; `exact`
    bool `[U]`: the list is proven to be the k best of the whole catalogue.
    """

    rows: np.ndarray
    scores: np.ndarray
    sources: np.ndarray
    routes: np.ndarray
    exact: np.ndarray

    @classmethod
    def empty(cls, users: int, k: int) -> Lists:
        return cls(
            np.full((users, k), -1, np.int32), np.full((users, k), -np.inf, np.float32), np.zeros((users, k), np.uint8),
            np.full(users, "popularity", object), np.zeros(users, bool),
        )  # fmt: skip


class Recommender:
    """A run, ready to recommend: model, memory and its gate, popularity, and the catalogue they speak of.

    Parts that a run cannot offer (no checkpoint yet, a model that does not fit) are missing, and requests take
    another way (`coldstart.TABLE`).
    """

    def __init__(self, items: pl.DataFrame, *, memory: Memory | None, engine: Engine | None = None, gate: Gate | None = None,
                 knn: ItemKNN | None = None, segments: Segments | None = None, repeat: bool = False, step: int = -1, name: str = "", batch: int = 512) -> None:  # fmt: skip
        self.items, self.memory, self.engine, self.gate, self.knn = items, memory, engine, gate, knn
        self.repeat, self.step, self.name, self.batch = repeat, step, name, batch
        self.segments = segments
        self.popularity = Popularity.of(items) if segments is None else segments.popularity
        self._told = False  # that there is no gate
        self.item_ids: list[str] = items["item_id"].to_list()
        self.titles: list[str] = items["title"].fill_null("").to_list()
        self._rows = {item: row for row, item in enumerate(self.item_ids)}

    @classmethod
    def load(cls, run: Path | str, step: int | str = "best", dataset: Dataset | Path | str | None = None, *,
             engine: str = "auto", batch: int = 512) -> Recommender:  # fmt: skip
        """Open a run with the parameters of `step` (best, latest or a number).

        `dataset` replaces the catalogue, codes and transitions that the run carries with itself; the name of one that the
        run was trained on picks it among several (without it: the first), from the run's own copies. `engine` memory or
        popularity loads no parameters. Raises InputError when the folder is no run or the dataset does not fit it.
        """
        record = read_run(run)
        data, domain = None, 0
        if dataset is None:
            tell_first(record)
        elif not isinstance(dataset, Dataset) and str(dataset) in record.names and not Path(dataset).exists():
            domain = record.names.index(str(dataset))
        else:
            data = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
            domain = domain_of(record, data)
            check_fits(record, data, domain)
        folder = record.folder(domain)
        items = pl.read_parquet(folder / "items.parquet") if data is None else data.items
        facts = record.datasets[domain].summary if data is None else data.manifest
        memory = own_memory(folder) if data is None else Memory(data.transitions, neighbours=data.neighbours)
        made, at = (None, -1) if engine in ("memory", "popularity") else open_engine(record, step, data, facts, domain)
        if made is None and engine == "model":
            way("history", (), "model")  # says what is missing and the way out
        return cls(
            items,
            memory=memory,
            engine=made,
            gate=None if made is None else gate_of(record, at, domain),
            knn=open_item_knn(data, items) if made is None and data is not None and engine == "auto" else None,
            segments=None if data is None else open_segments(data),
            repeat=bool(facts["repeat"]),
            step=at,
            name=record.path.resolve().name,
            batch=batch,
        )

    @property
    def catalogue(self) -> int:
        return len(self.item_ids)

    @property
    def model_version(self) -> str:
        return f"{self.name}@{self.step}" if self.engine is not None else f"{self.name}@none"

    @property
    def parts(self) -> set[str]:
        """Which parts of `coldstart.PARTS` this recommender has."""
        there = {"model": self.engine, "memory": self.memory, "item-knn": self.knn, "segment": self.segments, "popularity": self.popularity}  # fmt: skip
        return {name for name, part in there.items() if part is not None}

    def rows_of(self, item_ids: Sequence[str]) -> tuple[np.ndarray, int]:
        """Catalogue rows int32 of the known ids, in order, and how many ids are not in the catalogue."""
        rows = [self._rows.get(str(item)) for item in item_ids]
        known = [row for row in rows if row is not None]
        return np.array(known, np.int32), len(rows) - len(known)

    def recommend(self, history: Sequence[str], k: int = 10, *, times: Sequence[int] | None = None,
                  engine: str = "auto") -> list[Recommendation]:  # fmt: skip
        """The k best items after `history` (item ids, oldest first), or as many as the catalogue still has.

        Ids outside the catalogue are left out, with a warning that says how many; without a known one, or with an
        empty history, the list is by popularity. `times`: seconds, one an item.
        """
        rows, unknown = self.rows_of(history)
        if unknown:
            warnings.warn(f"{unknown} of {len(history)} history items are not in the catalogue; left out", stacklevel=2)
        when = None
        if times is not None:
            if len(times) != len(history):
                raise InputError(f"times has {len(times)} entries, history {len(history)}; give one an item")
            when = [np.array([t for item, t in zip(history, times, strict=True) if str(item) in self._rows], np.int64)]
        lists = self.recommend_rows([rows], when, k, engine=engine)
        return [
            Recommendation(
                self.item_ids[row], self.titles[row], float(np.exp(lists.scores[0, place], dtype=np.float64)),
                SOURCES[lists.sources[0, place]], place + 1, str(lists.routes[0]),
                tuple(self.because(rows, row)) if lists.sources[0, place] == MEMORY else (),
            )
            for place, row in enumerate(lists.rows[0].tolist())
            if row >= 0
        ]  # fmt: skip

    def recommend_histories(self, asked: Histories, k: int = 10, **options: Any) -> Lists:
        """`recommend_rows` for histories of a dataset."""
        return self.recommend_rows(asked.items, asked.times, k, kinds=asked.kinds, queries=asked.queries, **options)

    def recommend_rows(self, histories: Sequence[np.ndarray], times: Sequence[np.ndarray] | None = None, k: int = 10, *,
                       kinds: Sequence[np.ndarray] | None = None, queries: Sequence[Mapping[int, np.ndarray]] | None = None,
                       engine: str = "auto", memory: bool = True, allowed: np.ndarray | None = None, beams: int | None = None,
                       sessions: np.ndarray | None = None, attributes: Sequence[Sequence[str]] | None = None,
                       advance: Callable[[int], None] = lambda users: None) -> Lists:  # fmt: skip
        """Lists for many histories of catalogue rows (oldest first; -1 = an event without an item).

        `engine`: see `coldstart.way`. `memory=False` leaves the memory out of the model's lists. `allowed` bool `[C]`
        filters the catalogue further than to what is listed. `sessions` bool `[U]`: the history is that of a user nobody
        knows; `attributes`: what is known of each user, as in users.parquet. Users go through sorted by length, `batch` at
        a time; `advance` hears of each batch.
        """
        if k < 1:
            raise InputError(f"k={k}: must be at least 1")
        if (listed := self.popularity.listed) is not None:
            allowed = listed if allowed is None else allowed & listed
        items = [_inside(h, self.catalogue) for h in histories]
        request = _Request(
            items=items, known=[h[h >= 0] for h in items], k=k, allowed=allowed, beams=beams,
            times=times, kinds=kinds, queries=queries, memory=memory, attributes=attributes,
        )  # fmt: skip
        available = self.parts
        if memory and self.gate is not None:
            available.add(GATE)
        elif memory and "model" in available and engine in ("auto", "model") and not self._told:
            self._told = True
            note(f"{self.name}: no gate of the memory for step {self.step}, so the model recommends alone; m6rec evaluate fits one")  # fmt: skip
        made = Lists.empty(len(items), k)
        groups: dict[Way, list[int]] = {}
        for user in range(len(items)):
            groups.setdefault(way(self._asks(request, user, sessions), available, engine), []).append(user)
        for line, users in groups.items():
            order = sorted(users, key=lambda u: len(items[u]))
            for start in range(0, len(order), self.batch):
                part = np.array(order[start : start + self.batch])
                self._fill(made, part, line, request)
                advance(len(part))
        return made

    def because(self, history: np.ndarray, row: int, most: int = 2) -> list[str]:
        """Titles (or ids) of the history items that carry the memory's mass of an item, strongest first."""
        found = self.memory.evidence(history, row)[:most] if self.memory is not None else []
        return [self.titles[i] or self.item_ids[i] for i, _ in found]

    def table(self, user_ids: Sequence[str], histories: Sequence[np.ndarray], lists: Lists) -> pl.DataFrame:
        """Lists as the output table of DESIGN section 3, one line an item."""
        user, place = np.nonzero(lists.rows >= 0)
        rows, sources = lists.rows[user, place], lists.sources[user, place]
        reasons = [
            f"because of {' and '.join(behind)}" if behind else ""
            for behind in (
                self.because(histories[u], row) if source == MEMORY else []
                for u, row, source in zip(user.tolist(), rows.tolist(), sources.tolist(), strict=True)
            )
        ]
        return pl.DataFrame(
            {
                "user_id": pl.Series(list(user_ids), dtype=pl.String).gather(user),
                "item_id": self.items["item_id"].gather(rows),
                "rank": (place + 1).astype(np.int32),
                "score": np.exp(lists.scores[user, place], dtype=np.float64),
                "source": pl.Series(SOURCES).gather(sources),
                "route": pl.Series([str(r) for r in lists.routes], dtype=pl.String).gather(user),
                "reason": pl.Series(reasons, dtype=pl.String),
                "model_version": pl.Series([self.model_version], dtype=pl.String).gather(np.zeros_like(user)),
            }
        )

    def _asks(self, request: _Request, user: int, sessions: np.ndarray | None) -> str:
        """What a request comes with: a key of `coldstart.ASKS`."""
        if len(request.known[user]):
            return "session" if sessions is not None and sessions[user] else "history"
        values = request.attributes[user] if request.attributes is not None else ()
        return "attributes" if self.segments is not None and self.segments.known(values) else "nothing"

    # -- the parts ---------------------------------------------------------------------------------------------

    def _fill(self, made: Lists, users: np.ndarray, line: Way, request: _Request) -> None:
        """Write the lists of some users, part after part, until they are full."""
        part = request.take(users)
        seen = None if self.repeat else part.known
        lists = Lists.empty(len(users), request.k)
        for name in line.parts:
            if name == "model" and self.engine is not None:
                lists = self._by_model(self.engine, part, seen)
            elif name == "memory" and self.memory is not None:
                lists = _of_support(self.memory.support(part.known, exclude=seen, allowed=part.allowed), request.k)
            elif (lists.rows < 0).any():
                rows, share = lists.rows, None
                if name == "item-knn" and self.knn is not None:
                    rows = _append(rows, self.knn.rank(part.known, request.k, self.repeat), part.allowed)
                elif name == "segment" and self.segments is not None:
                    about = part.attributes or [()] * len(users)
                    rows, share = self.segments.fill(rows, part.known, about, self.repeat, part.allowed)
                else:
                    rows = self.popularity.fill(rows, part.known, self.repeat, part.allowed)
                share = self.popularity.share[np.maximum(rows, 0)] if share is None else share
                lists = _continued(lists, rows, MEMORY if name == "item-knn" else POPULARITY, share)
        made.rows[users], made.scores[users], made.sources[users] = lists.rows, lists.scores, lists.sources
        made.routes[users], made.exact[users] = line.route, lists.exact

    def _by_model(self, engine: Engine, part: _Request, seen: list[np.ndarray] | None) -> Lists:
        support, gate = self.gated_support(part.known, seen, part.allowed) if part.memory else (None, None)
        found = engine.recommend(
            part.items, times=part.times, kinds=part.kinds, queries=part.queries, k=part.k, beams=part.beams, exclude=seen,
            allowed=part.allowed, memory=None if support is None else (support.rows, support.mass), gate=gate,
            temperature=1.0 if gate is None or self.gate is None else self.gate.heat(gate),
        )  # fmt: skip
        carried = np.full(found.rows.shape, MODEL, np.uint8)
        if gate is not None:
            with np.errstate(divide="ignore"):
                by_memory = np.log(gate)[:, None] + found.memory_logp
                by_model = np.log1p(-gate)[:, None] + found.model_logp
            carried[by_memory > by_model] = MEMORY
        sources = np.where(found.rows >= 0, carried, NONE).astype(np.uint8)
        return Lists(found.rows, found.scores, sources, np.full(len(found.rows), "", object), found.exact)

    def gated_support(self, known: Sequence[np.ndarray], exclude: Sequence[np.ndarray] | None,
                      allowed: np.ndarray | None = None) -> tuple[Support | None, np.ndarray | None]:  # fmt: skip
        """The memory's support for histories and the share g `[U]` it is given; (None, None) without a gate."""
        if self.memory is None or self.gate is None:
            return None, None
        support = self.memory.support(known, exclude=exclude, allowed=allowed)
        return support, self.gate(np.array([len(h) for h in known]), support.total)


@dataclass(frozen=True)
class _Request:
    items: list[np.ndarray]
    known: list[np.ndarray]
    k: int
    allowed: np.ndarray | None
    beams: int | None
    times: Sequence[np.ndarray] | None
    kinds: Sequence[np.ndarray] | None
    queries: Sequence[Mapping[int, np.ndarray]] | None
    memory: bool
    attributes: Sequence[Sequence[str]] | None

    def take(self, users: np.ndarray) -> _Request:
        pick = lambda part: None if part is None else [part[u] for u in users]  # noqa: E731
        return replace(self, **{name: pick(getattr(self, name)) for name in ("items", "known", "times", "kinds", "queries", "attributes")})  # fmt: skip


def _inside(history: np.ndarray, catalogue: int) -> np.ndarray:
    """A history whose rows outside the catalogue count as events without an item."""
    rows = np.asarray(history, np.int32)
    return np.where((rows >= 0) & (rows < catalogue), rows, -1)


def _of_support(support: Support, k: int) -> Lists:
    lists = Lists.empty(len(support.rows), k)
    width = min(k, support.rows.shape[1])
    lists.rows[:, :width] = support.rows[:, :width]
    with np.errstate(divide="ignore"):
        lists.scores[:, :width] = np.log(support.mass[:, :width])
    lists.sources[:] = np.where(lists.rows >= 0, MEMORY, NONE)
    return lists


def _append(rows: np.ndarray, more: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
    """`rows` with empty places taken by the items of `more` that are not there yet, in order."""
    result = rows.copy()
    for u in np.flatnonzero((rows < 0).any(1)):
        have = set(rows[u].tolist())
        fresh = [i for i in more[u].tolist() if i >= 0 and i not in have and (allowed is None or allowed[i])]
        places = np.flatnonzero(rows[u] < 0)[: len(fresh)]
        result[u, places] = fresh[: len(places)]
    return result


def _continued(lists: Lists, rows: np.ndarray, source: int, share: np.ndarray) -> Lists:
    """The lists with new items in their empty places, at the end of each.

    A new item's score is its share of training events, in logs (`share [U,k]`), below the last score there was; it
    never rises.
    """
    fresh = (lists.rows < 0) & (rows >= 0)
    last = np.where(np.isfinite(lists.scores), lists.scores, 0).min(1, initial=0)
    fall = np.minimum.accumulate(np.where(fresh, share, 0), axis=1)
    scores = np.where(fresh, last[:, None] + fall, lists.scores).astype(np.float32)
    return replace(lists, rows=rows, scores=scores, sources=np.where(fresh, source, lists.sources).astype(np.uint8))
