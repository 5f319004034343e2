"""The Python face: `Recommender.load(run).recommend(history, k=10)`, and the same for many histories at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from m6rec_jax.artifacts.run import read_run
from m6rec_jax.data.arrays import read_arrays
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.errors import InputError
from m6rec_jax.model.quantised import check_weights
from m6rec_jax.progress import note
from m6rec_jax.recommend.baselines import ItemKNN
from m6rec_jax.recommend.coldstart import GATE, SOURCES, Way, way
from m6rec_jax.recommend.explain import explained
from m6rec_jax.recommend.filters import filter_mask
from m6rec_jax.recommend.gate import Gate
from m6rec_jax.recommend.histories import Histories, of_items
from m6rec_jax.recommend.lists import MEMORY, Lists
from m6rec_jax.recommend.memory import Memory
from m6rec_jax.recommend.opening import (
    check_fits,
    domain_of,
    gate_of,
    open_engine,
    open_item_knn,
    own_memory,
    tell_first,
)
from m6rec_jax.recommend.ranker import Ranker
from m6rec_jax.recommend.request import Request, within_catalogue
from m6rec_jax.recommend.reranking import rules_of
from m6rec_jax.recommend.say import Setting, Speaker
from m6rec_jax.recommend.segments import Segments, open_segments


@dataclass(frozen=True)
class Recommendation:
    """One place of a list. `score` is the probability given to the item; `because` the titles behind a memory's item.

    `explanation` and `steps`, where they were asked for, are the columns of `explain.explained`; events count in the
    history as it was given.
    """

    item_id: str
    title: str
    score: float
    source: str
    rank: int
    route: str
    because: tuple[str, ...] = ()
    explanation: Mapping[str, Any] | None = None
    steps: Sequence[Mapping[str, Any]] | None = None


class Recommender(Ranker):
    """A run, ready to recommend: model, memory and its gate, popularity, and the catalogue they speak of.

    Parts that a run cannot offer (no checkpoint yet, a model that does not fit) are missing, and requests take
    another way (`coldstart.TABLE`).
    """

    def __init__(self, items: pl.DataFrame, *, memory: Memory | None, engine: Engine | None = None, gate: Gate | None = None,
                 knn: ItemKNN | None = None, segments: Segments | None = None, repeat: bool = False, step: int = -1, name: str = "",
                 batch: int = 512, content: Callable[[], np.ndarray] | None = None,
                 voice: Callable[[Recommender], Speaker] | None = None) -> None:  # fmt: skip
        super().__init__(items, memory=memory, engine=engine, gate=gate, knn=knn, segments=segments, repeat=repeat)
        self.step, self.name, self.batch = step, name, batch
        self._content = content  # of the items [C, Dc], read when it is first needed
        self._voice = voice  # the speaker, made when it is first asked
        self._told = False  # that there is no gate
        self.item_ids: list[str] = items["item_id"].to_list()
        self.titles: list[str] = items["title"].fill_null("").to_list()
        self._rows = {item: row for row, item in enumerate(self.item_ids)}

    @classmethod
    def load(cls, run: Path | str, step: int | str = "best", dataset: Dataset | Path | str | None = None, *,
             engine: str = "auto", batch: int = 512, weights: str = "full") -> Recommender:  # fmt: skip
        """Open a run with the parameters of `step` (best, latest or a number).

        `dataset` replaces the catalogue, codes and transitions that the run carries with itself; the name of one that the
        run was trained on picks it among several (without it: the first), from the run's own copies. `engine` memory or
        popularity loads no parameters. `weights`: what parameters are kept as, full or int8 (`model.quantised`), which
        `model_version` then says. Raises InputError when the folder is no run or the dataset does not fit it.
        """
        check_weights(weights)
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
        made, at = (None, -1) if engine in ("memory", "popularity") else open_engine(record, step, data, facts, domain, weights)  # fmt: skip
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
            batch=batch if made is None else batch * made.devices.count,
            voice=None if made is None else lambda own: Speaker.of(own, made, record, domain, data),
            content=(lambda: read_arrays(folder / "codes.npz", "content")["content"]) if data is None else lambda: data.content,
        )  # fmt: skip

    @property
    def model_version(self) -> str:
        if self.engine is None:
            return f"{self.name}@none"
        return f"{self.name}@{self.step}" + ("" if self.engine.weights == "full" else f"+{self.engine.weights}")

    def rows_of(self, item_ids: Sequence[str]) -> tuple[np.ndarray, int]:
        """Catalogue rows int32 of the known ids, in order, and how many ids are not in the catalogue."""
        rows = [self._rows.get(str(item)) for item in item_ids]
        known = [row for row in rows if row is not None]
        return np.array(known, np.int32), len(rows) - len(known)

    def allowed(self, filter: str | None = None, candidates: Sequence[str] | None = None) -> np.ndarray | None:
        """What a filter (`filters.filter_mask`) and a list of item ids let through: bool `[C]`, None = everything.

        Raises InputError when the filter is malformed, or no id is in the catalogue; warns of those that are not.
        """
        made = None if filter is None else filter_mask(self.items, filter)
        if candidates is not None:
            rows, unknown = self.rows_of(candidates)
            if unknown:
                if not len(rows):
                    raise InputError(f"candidates: none of the {unknown} item ids is in the catalogue")
                warnings.warn(
                    f"{unknown} of {len(candidates)} candidates are not in the catalogue; left out", stacklevel=3
                )
            given = np.isin(np.arange(self.catalogue), rows)
            made = given if made is None else made & given
        return made

    def recommend(self, history: Sequence[str], k: int = 10, *, user: Hashable | None = None,
                  times: Sequence[int] | None = None, engine: str = "auto",
                  filter: str | None = None, candidates: Sequence[str] | None = None, per: str | None = None,
                  cap: int | None = None, diversity: float = 0.0, new_items: float = 0.0, explain: bool = False,
                  show_steps: bool = False) -> list[Recommendation]:  # fmt: skip
        """The k best items after `history` (item ids, oldest first), or as many as may be shown.

        Ids outside the catalogue are left out, with a warning that says how many; without a known one, or with an
        empty history, the list is by popularity. `user`: who is asking; what the model read of a user is kept, so that
        the next request costs the new events alone. `times`: seconds, one an item. `filter` and `candidates` (item ids) say
        what may be shown, as `allowed` reads them; the other rules are those of `recommend_rows`. `explain` and
        `show_steps` bring what `explain.explained` tells of each item.
        """
        rows, unknown = self.rows_of(history)
        if unknown:
            warnings.warn(f"{unknown} of {len(history)} history items are not in the catalogue; left out", stacklevel=2)
        when = None
        if times is not None:
            if len(times) != len(history):
                raise InputError(f"times has {len(times)} entries, history {len(history)}; give one an item")
            when = [np.array([t for item, t in zip(history, times, strict=True) if str(item) in self._rows], np.int64)]
        allowed = self.allowed(filter, candidates)
        self.tell_short(allowed, k)
        lists = self.recommend_rows(
            [rows], when, k, users=None if user is None else [user], engine=engine, allowed=allowed, per=per, cap=cap,
            diversity=diversity, new_items=new_items,
        )  # fmt: skip
        asked = self.request([rows], when, k, allowed=allowed)
        told = explained(self, asked, lists, explain, show_steps).to_dicts() if explain or show_steps else []
        given = [place for place, item in enumerate(history) if str(item) in self._rows]
        for event in (event for one in told for event in one.get("attribution", ())):
            event["event"] = given[event["event"]]
        steps = [one.pop("steps", None) for one in told]
        return [
            Recommendation(
                self.item_ids[row], self.titles[row], float(np.exp(lists.scores[0, place], dtype=np.float64)),
                SOURCES[lists.sources[0, place]], place + 1, str(lists.routes[0]),
                tuple(self.because(rows, row)) if lists.sources[0, place] == MEMORY else (),
                told[place] if explain else None, steps[place] if show_steps else None,
            )
            for place, row in enumerate(lists.rows[0].tolist())
            if row >= 0
        ]  # fmt: skip

    @cached_property
    def speaker(self) -> Speaker:
        """What writes texts. Raises InputError for a run without a checkpoint."""
        if self._voice is None:
            raise InputError(f"{self.name}: no model was opened, and texts are written by one; train the run, and leave engine=memory or popularity out")  # fmt: skip
        return self._voice(self)

    def say(self, task: str, histories: Sequence[Sequence[str]] = (), *, items: Sequence[str] | None = None, language: str = "",
            attributes: Sequence[Sequence[str]] | None = None, **setting: Any) -> pl.DataFrame:  # fmt: skip
        """A text of `task` (describe, summarise, explain, query, chat, classify, complete, or one of the run's own) after each
        history of item ids, oldest first, and about each of `items` where it is about items: a line each, in that order.

        Columns as `say.speaker.COLUMNS` and what the task adds; `user_id` counts the histories. `attributes`: what is known of
        each user; `setting`: see `say.Setting`. Raises InputError as `m6rec generate --task` does.
        """
        wanted = Setting(**setting)
        asked_for = self.speaker.task(task, language, wanted, users=bool(len(histories)), items=items is not None)
        rows = [self.rows_of(history)[0] for history in histories]
        about, unknown = (None, 0) if items is None else self.rows_of(items)
        if unknown:
            raise InputError(f"items: {unknown} of {len(items or ())} ids are not in the catalogue; name ids of items.parquet")  # fmt: skip
        return self.speaker.speak(
            asked_for, of_items(rows), [str(n) for n in range(len(rows))], wanted, attributes=attributes,
            items=None if about is None else about.tolist(),
        )  # fmt: skip

    def tell_short(self, allowed: np.ndarray | None, k: int) -> None:
        """Say where no list can be k long, or have anything in it."""
        allowed = np.ones(self.catalogue, bool) if allowed is None else allowed
        count = int((allowed if self.popularity.listed is None else allowed & self.popularity.listed).sum())
        if not count:
            note("no item may be shown, so every list is empty; widen the filter or the candidates")
        elif count < k:
            note(f"k={k}: only {count:,} items may be shown, and lists end there")

    def recommend_histories(self, asked: Histories, k: int = 10, **options: Any) -> Lists:
        """`recommend_rows` for histories of a dataset."""
        return self.recommend_rows(asked.items, asked.times, k, kinds=asked.kinds, queries=asked.queries, **options)

    def recommend_rows(self, histories: Sequence[np.ndarray], times: Sequence[np.ndarray] | None = None, k: int = 10, *,
                       users: Sequence[Hashable | None] | None = None,
                       kinds: Sequence[np.ndarray] | None = None, queries: Sequence[Mapping[int, np.ndarray]] | None = None,
                       engine: str = "auto", memory: bool = True, allowed: np.ndarray | None = None, beams: int | None = None,
                       candidates: Sequence[np.ndarray] | None = None, per: str | None = None, cap: int | None = None,
                       diversity: float = 0.0, new_items: float = 0.0,
                       sessions: np.ndarray | None = None, attributes: Sequence[Sequence[str]] | None = None,
                       advance: Callable[[int], None] = lambda users: None) -> Lists:  # fmt: skip
        """Lists for many histories of catalogue rows (oldest first; -1 = an event without an item).

        `users`: who is asking, None = nobody known, as `Engine.recommend` takes them: worth it for those who come again.
        `engine`: see `coldstart.way`. `memory=False` leaves the memory out of the model's lists. `allowed` bool `[C]`
        filters the catalogue further than to what is listed; `candidates`: distinct rows of each user, who gets no
        others. At most `cap` items of one value of the column `per`; `diversity` and `new_items`, shares in [0, 1], as
        `reranking` has them, an item's score being its own wherever it is put. `sessions` bool `[U]`: the history is that
        of a user nobody knows; `attributes`: what is known of each user, as in users.parquet. Users go through sorted by
        length, `batch` at a time; `advance` hears of each batch. Raises InputError for settings out of range.
        """
        if k < 1:
            raise InputError(f"k={k}: must be at least 1")
        request = self.request(
            histories, times, k, kinds=kinds, queries=queries, memory=memory, allowed=allowed, beams=beams,
            candidates=candidates, attributes=attributes, users=users,
        )  # fmt: skip
        items, allowed = request.items, request.allowed
        rules = rules_of(self.items, allowed, self._content, per=per, cap=cap, diversity=diversity, new_items=new_items)
        if allowed is not None and not allowed.any():
            advance(len(histories))
            return Lists.empty(len(histories), k)
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
            # Without a model, what a user may get is a filter: with candidates of their own they go one by one.
            batch = self.batch if candidates is None or line.parts[0] == "model" else 1
            for start in range(0, len(order), batch):
                part = np.array(order[start : start + batch])
                made.put(part, self.lists(line, request.take(part), rules))
                advance(len(part))
        return made

    def request(self, histories: Sequence[np.ndarray], times: Sequence[np.ndarray] | None = None, k: int = 10, *,
                kinds: Sequence[np.ndarray] | None = None, queries: Sequence[Mapping[int, np.ndarray]] | None = None,
                memory: bool = True, allowed: np.ndarray | None = None, beams: int | None = None,
                candidates: Sequence[np.ndarray] | None = None,
                attributes: Sequence[Sequence[str]] | None = None,
                users: Sequence[Hashable | None] | None = None) -> Request:  # fmt: skip
        """What `recommend_rows` is asked for, with what is no longer listed out of `allowed`."""
        if users is not None and len(users) != len(histories):
            raise InputError(f"{len(histories)} histories, {len(users)} users: name one a history, None for a stranger")
        if (listed := self.popularity.listed) is not None:
            allowed = listed if allowed is None else allowed & listed
        items = [within_catalogue(h, self.catalogue) for h in histories]
        return Request(
            items=items, known=[h[h >= 0] for h in items], k=k, allowed=allowed, beams=beams, candidates=candidates,
            times=times, kinds=kinds, queries=queries, memory=memory, attributes=attributes, users=users,
        )  # fmt: skip

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

    def _asks(self, request: Request, user: int, sessions: np.ndarray | None) -> str:
        """What a request comes with: a key of `coldstart.ASKS`."""
        if len(request.known[user]):
            return "session" if sessions is not None and sessions[user] else "history"
        values = request.attributes[user] if request.attributes is not None else ()
        return "attributes" if self.segments is not None and self.segments.known(values) else "nothing"
