"""Texts for users and about items: asked for by a template, drawn from the model, held against the facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import xxhash

from m6rec_jax.artifacts.run import Run
from m6rec_jax.data.arrays import read_arrays
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.features import TfidfEncoder, item_texts
from m6rec_jax.data.instances.layout import Laid, encode_instances, lay_out
from m6rec_jax.data.instances.read import FOLDER
from m6rec_jax.data.instances.world import World
from m6rec_jax.data.records import DOCUMENT
from m6rec_jax.data.rendering import Rendered, render
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.decoding.instances import InstanceScorer
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.recommend.grounding import Copies, Facts, Grounding, Lexicon, ground
from m6rec_jax.recommend.histories import Histories
from m6rec_jax.recommend.say.asking import Setting, Spoken, learnt_tasks, spoken, turns_of
from m6rec_jax.recommend.say.chat import converse
from m6rec_jax.recommend.say.finding import Finder
from m6rec_jax.recommend.say.told import Cases, answers_of, catalogue_world, fields_of, world_of

if TYPE_CHECKING:
    from m6rec_jax.recommend.recommender import Recommender

FOUND = ("describe", "query", "chat")  # tasks whose texts are brought to real items
NEXT = ("describe", "query")  # tasks on what comes next, of which the history says nothing
COLUMNS: dict[str, Any] = {
    "user_id": pl.String, "item_id": pl.String, "text": pl.String, "grounded": pl.Boolean, "grounding": pl.Float64,
    "copied": pl.Float64, "template": pl.String, "task": pl.String, "model_version": pl.String,
}  # fmt: skip
ITEMS: dict[str, Any] = {"items": pl.List(pl.String), "similarity": pl.List(pl.Float64)}
CHANCES: dict[str, Any] = {"probability": pl.Float64, "probabilities": pl.List(pl.Float64)}
STEPS: dict[str, Any] = {"steps": pl.List(pl.Struct({"step": pl.String, "text": pl.String}))}

OptionChances = Callable[[str, Sequence[Laid]], np.ndarray]  # task, instances -> chance of each option `[n, options]`


@dataclass(frozen=True)
class Draft:
    """What the model wrote for a case, and the items it named."""

    text: str
    items: tuple[int, ...] = ()


@dataclass(frozen=True)
class Speaker:
    """A recommender that speaks. `world`: its catalogue; `learnt`: entries of the tasks that the run was trained on;
    `dataset`: whose training texts must not be copied (None: those of items alone); `chances` answers tasks with options."""

    recommender: Recommender
    world: World
    finder: Finder
    learnt: Sequence[Mapping[str, Any]]
    chances: OptionChances
    dataset: Dataset | None = None
    _copies: dict[str, Copies] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, recommender: Recommender, engine: Engine, record: Run, domain: int, dataset: Dataset | None) -> Speaker:
        """The speaker of a run's domain, with the engine that was opened for it."""
        assert engine.texts is not None, "a run has a tokenizer"
        facts = record.datasets[domain].summary
        folder, mixture = record.folder(domain) if dataset is None else dataset.path, record.config.mixture.tasks
        encoder = TfidfEncoder.from_arrays(read_arrays(folder / "codes.npz"))
        spells = mixture.get("text-to-codes", 0) > 0
        finder = Finder(recommender.items, encoder, engine, engine.texts.desk.tokenizer, spells)
        world = catalogue_world(recommender.items, bool(facts["timed"]), list(facts["kinds"]))
        scorer = cache(
            lambda: InstanceScorer.load(record.path, recommender.step, domain)
        )  # parameters of its own, once asked
        chances = lambda task, laid: scorer().option_chances(task, laid)  # noqa: E731
        return cls(recommender, world, finder, learnt_tasks(facts.get("tasks", ()), mixture), chances, dataset)

    @property
    def engine(self) -> Engine:
        return self.finder.engine

    @cached_property
    def lexicon(self) -> Lexicon:
        """What a text may name."""
        return Lexicon.of(self.world.items)

    @cached_property
    def item_facts(self) -> list[list[str]]:
        """The lines that are true of each item, its title first."""
        return [text.split("\n") for text in item_texts(self.world.items)]

    def task(self, task: str, language: str, setting: Setting, users: bool, items: bool) -> Spoken:
        """The task asked for. Raises InputError when it is unknown or what it needs is missing."""
        made = spoken(task, language, self.learnt)
        kind = made.template.task
        if kind == "chat":
            if not setting.prompt:
                raise InputError('prompt: missing; chat needs a conversation, such as "USER: a film for tonight"')
            turns_of(setting.prompt)
        if items and not made.about_items:
            raise InputError(f"items: {task} is about users, not items; leave them out")
        if not users and (made.about_users or not items):
            raise InputError(f"users: none; {task} needs {'users' if made.about_users else 'users or items'}")
        if not made.learnt:
            note(f"task {task}{f' ({language})' if language else ''}: the run was not trained on it, so every text is the template's, grounded=false")  # fmt: skip
        return made

    def columns(self, task: Spoken, setting: Setting) -> dict[str, Any]:
        """The columns of a table of texts."""
        if task.options:
            return COLUMNS | CHANCES
        return COLUMNS | (ITEMS if task.template.task in FOUND else {}) | (STEPS if setting.show_steps else {})

    def speak(self, task: Spoken, asked: Histories, ids: Sequence[str], setting: Setting, *, items: Sequence[int] | None = None,
              attributes: Sequence[Sequence[str]] | None = None, sessions: np.ndarray | None = None) -> pl.DataFrame:  # fmt: skip
        """A text for each history (and each of `items`, catalogue rows, where the task is about items and they are
        named; else about the item that suits the user best): a line each, in that order.

        `ids`, `attributes`: of the users; without any, about items alone.
        """
        about = [list(some) for some in attributes] if attributes is not None else [[] for _ in ids]
        world = world_of(self.world, asked, ids, about, self.finder.tokenizer.decode)
        cases = self._cases(task, asked, items, about if attributes is not None else None, sessions)
        fields = fields_of(world, cases, task, setting)
        told = [replace(render(task.template, one), answer=()) for one in fields]
        if setting.prompt and task.template.task not in ("complete", "chat") and not task.options:
            told = [replace(one, opening=(*one.opening, " ", setting.prompt)) for one in told]
        template = answers_of(world, cases, task, setting, fields)
        if task.options:
            return self._choose(task, cases, ids, told)
        drafts = self._write(task, cases, ids, told, setting) if task.learnt else [Draft("")] * len(cases)
        return self._told(task, cases, world, ids, told, drafts, template, setting)

    def _cases(self, task: Spoken, asked: Histories, items: Sequence[int] | None, attributes: Sequence[Sequence[str]] | None,
               sessions: np.ndarray | None) -> Cases:  # fmt: skip
        if items is not None and not len(asked):
            return Cases(np.full(len(items), -1, np.int64), np.asarray(items, np.int64))
        users = np.arange(len(asked))
        if items is not None:
            return Cases(np.repeat(users, len(items)), np.tile(np.asarray(items, np.int64), len(asked)))
        if task.options and not task.picks_item:  # what is chosen among is the text or the user, as they are given
            return Cases(users, np.full(len(asked), -1, np.int64))
        best = self.recommender.recommend_histories(asked, 1, sessions=sessions, attributes=attributes)
        return Cases(users, best.rows[:, 0].astype(np.int64))

    def _laid(self, task: Spoken, told: Sequence[Rendered], room: int) -> list[Laid]:
        engine, tokenizer = self.engine, self.finder.tokenizer
        records = encode_instances(told, tokenizer, engine.vocab, engine.codes)
        return [lay_out(record, task.template.objective, room) for record in records]

    def _write(self, task: Spoken, cases: Cases, ids: Sequence[str], told: Sequence[Rendered], setting: Setting) -> list[Draft]:  # fmt: skip
        length = self.engine.prompts.length
        most = min(setting.tokens, length // 2)
        prompts = [(one.source, one.source_rows) for one in self._laid(task, told, length - most + 1)]
        names = [f"{setting.seed} {task.name} {ids[u] if u >= 0 else ''} {self._item(row) if task.about_items else ''}" for u, row in zip(cases.users.tolist(), cases.rows.tolist(), strict=True)]  # fmt: skip
        seeds = [xxhash.xxh32_intdigest(name.encode("utf-8", "surrogatepass")) for name in names]
        if task.template.task == "chat":
            listed = self.recommender.popularity.listed
            answers = converse(self.engine, self.world.titles, prompts, replace(setting, tokens=most), seeds, listed)
            return [Draft(one.text, tuple(one.items)) for one in answers]
        texts = self.engine.write(
            [tokens for tokens, _ in prompts], item_rows=[rows for _, rows in prompts], most=most,
            temperature=setting.temperature, top_p=setting.top_p, seeds=seeds,
        )  # fmt: skip
        begins = setting.prompt + " " if setting.prompt and task.template.task != "complete" else ""
        return [Draft((begins + one.text).strip()) for one in texts]

    def _item(self, row: int) -> str | None:
        return self.recommender.item_ids[row] if row >= 0 else None

    def _told(self, task: Spoken, cases: Cases, world: World, ids: Sequence[str], told: Sequence[Rendered],
              drafts: Sequence[Draft], template: Sequence[str], setting: Setting) -> pl.DataFrame:  # fmt: skip
        """Drafts held against the facts: those that fail are the template's. Texts that are brought to items bring them."""
        kind = task.template.task
        bring = kind in FOUND or not task.about_items or (kind == "complete" and bool(setting.prompt))
        had = [world.events.items[world.starts[u] : world.starts[u + 1]] if u >= 0 else np.zeros(0, np.int32) for u in cases.users.tolist()]  # fmt: skip
        shown = [np.unique(one[one >= 0]) if not self.recommender.repeat else np.zeros(0, np.int64) for one in had]
        listed = self.recommender.popularity.listed
        found = self.finder.find([one.text for one in drafts], setting.k, shown, listed) if bring and task.learnt else None  # fmt: skip
        grounds, copies = [], self.copies(task)
        for i, draft in enumerate(drafts):
            near = list(draft.items) or ([int(found[0][i, 0])] if found is not None else [int(cases.rows[i])])
            facts = self._facts(task, world, int(cases.users[i]), near, had[i], setting)
            mine = {ids[cases.users[i]] if cases.users[i] >= 0 else None, *map(self._item, near)} - {None}
            grounds.append(ground(draft.text, self.lexicon, facts, copies, mine))  # type: ignore[arg-type]
        holds = [one.holds and bool(draft.text) for one, draft in zip(grounds, drafts, strict=True)]
        texts = [draft.text if ok else instead for draft, ok, instead in zip(drafts, holds, template, strict=True)]
        made: dict[str, Any] = {
            "user_id": [ids[u] if u >= 0 else None for u in cases.users.tolist()],
            "item_id": [self._item(row) if task.about_items and not (kind == "complete" and setting.prompt) else None for row in cases.rows.tolist()],
            "text": texts,
            "grounded": holds,
            "grounding": [one.share for one in grounds],
            "copied": [one.copied for one in grounds],
            "template": list(template),
            "task": [task.name] * len(cases),
            "model_version": [self.recommender.model_version] * len(cases),
        }  # fmt: skip
        if kind in FOUND:
            made |= self._found(texts, cases, drafts, holds, shown, setting)
        if setting.show_steps:
            made["steps"] = [_steps(*one) for one in zip(told, drafts, grounds, holds, texts, strict=True)]
        return pl.DataFrame(made, schema=self.columns(task, setting))

    def _facts(self, task: Spoken, world: World, user: int, near: Sequence[int], had: np.ndarray, setting: Setting) -> Facts:  # fmt: skip
        """What is true: of the items that are spoken of, and what the prompt says; where the history is told (but for what
        comes next) also its titles and searches, not all that is known of its items, which is true of nearly everything."""
        texts = [line for row in near if row >= 0 for line in self.item_facts[row]]
        if task.about_users and user >= 0 and task.template.task not in NEXT:
            texts += [world.titles[row] for row in np.unique(had[had >= 0]).tolist()]
            texts += [world.who[user], *world.events.texts[int(world.starts[user]) : int(world.starts[user + 1])].drop_nulls().to_list()]  # fmt: skip
        return Facts([*texts, setting.prompt])

    def _found(self, texts: Sequence[str], cases: Cases, drafts: Sequence[Draft], holds: Sequence[bool],
               shown: Sequence[np.ndarray], setting: Setting) -> dict[str, Any]:  # fmt: skip
        """Items recommended from the text as it is said, nearest first; before them those that it is about: what an answer
        names, and the item of a template."""
        rows, alike = self.finder.find(texts, setting.k, shown, self.recommender.popularity.listed)
        items, near = [], []
        for text, own, cosine, draft, ok, row in zip(texts, rows.tolist(), alike.tolist(), drafts, holds, cases.rows.tolist(), strict=True):  # fmt: skip
            first = list(draft.items) if ok else [row] if row >= 0 else []
            pairs = list(zip(first, self.finder.alike(text, first), strict=True))
            pairs += [(r, c) for r, c in zip(own, cosine, strict=True) if r >= 0 and r not in first]
            items.append([self._item(row) for row, _ in pairs[: setting.k]])
            near.append([c for _, c in pairs[: setting.k]])
        return {"items": items, "similarity": near}

    def _choose(self, task: Spoken, cases: Cases, ids: Sequence[str], told: Sequence[Rendered]) -> pl.DataFrame:
        """The likeliest option of each case and its chance."""
        chances = self.chances(task.name, self._laid(task, told, self.engine.prompts.length))
        best = chances.argmax(axis=1)
        n = len(cases)
        made = {
            "user_id": [ids[u] if u >= 0 else None for u in cases.users.tolist()],
            "item_id": [self._item(row) if task.about_items else None for row in cases.rows.tolist()],
            "text": [task.options[i] for i in best.tolist()], "grounded": [True] * n, "grounding": [1.0] * n,
            "copied": [0.0] * n, "template": [None] * n, "task": [task.name] * n,
            "model_version": [self.recommender.model_version] * n,
            "probability": chances[np.arange(n), best].astype(np.float64), "probabilities": chances.astype(np.float64).tolist(),
        }  # fmt: skip
        return pl.DataFrame(made, schema=COLUMNS | CHANCES)

    def copies(self, task: Spoken) -> Copies:
        """The texts of training: of items, of documents, and the right answers of the task. Made once."""
        if task.name in self._copies:
            return self._copies[task.name]
        texts = [" ".join(lines) for lines in self.item_facts]
        about: list[set[str]] = [{item} for item in self.recommender.item_ids]
        if self.dataset is not None:
            kinds = self.dataset.index["train_kind"]
            documents = self.dataset.records("train").take(np.flatnonzero(kinds == DOCUMENT))
            texts += [self.finder.tokenizer.decode(one.tokens) for one in documents]
            about += [set() for _ in documents]
            path = self.dataset.path / FOLDER / f"{task.name}.parquet"
            if path.is_file():
                answers = pl.read_parquet(path, columns=["split", "answer", "user_id", "item_id"]).filter(pl.col("split") == "train")  # fmt: skip
                texts += answers["answer"].to_list()
                about += [{one for one in pair if one is not None} for pair in answers.select("user_id", "item_id").iter_rows()]  # fmt: skip
        self._copies[task.name] = Copies(texts, about)
        return self._copies[task.name]


def _steps(told: Rendered, draft: Draft, grounding: Grounding, holds: bool, text: str) -> list[dict[str, str]]:
    """How a text came about: what the model read, what it wrote, what of it was found and what not, what is said."""
    steps = [("read", told.text()), ("written", draft.text), ("found", ", ".join(grounding.found)), ("not found", ", ".join(grounding.missing))]  # fmt: skip
    return [{"step": step, "text": said} for step, said in (*steps, ("said" if holds else "template", text)) if said]
