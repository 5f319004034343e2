"""What is asked for: a task of a run, how its texts are drawn, the turns of a conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m6rec_jax.data.card_checks import known
from m6rec_jax.data.template import LANGUAGES, WITH_OPTIONS, Template, load_template, parse_template
from m6rec_jax.errors import InputError

TASKS = ("describe", "summarise", "explain", "query", "chat", "classify", "complete")
SPEAKER = re.compile(r"(?:^|(?<=\s))(USER|SYSTEM)\s*[:：]\s*")


@dataclass(frozen=True)
class Setting:
    """How texts are asked for.

    `prompt`: what an answer begins with, the text to complete or classify, or a conversation; `tokens`: the most of an
    answer; `k`: items listed for a description, a search or an answer. `temperature` 0 takes the likeliest; `top_p` and
    `seed` as in `decoding.sampling`. Raises InputError for what is out of range.
    """

    prompt: str = ""
    tokens: int = 64
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0
    k: int = 10
    show_steps: bool = False

    def __post_init__(self) -> None:
        ranges = {
            "tokens": (self.tokens >= 1, "at least 1"), "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, up to 1"), "seed": (0 <= self.seed < 1 << 32, "0 to 2**32 - 1"),
            "k": (self.k >= 1, "at least 1"),
        }  # fmt: skip
        for name, (right, wanted) in ranges.items():
            if not right:
                raise InputError(f"{name}={getattr(self, name)}: must be {wanted}")


@dataclass(frozen=True)
class Spoken:
    """A task that texts are asked of: its name in the dataset, its template, and whether the run has learnt it."""

    name: str
    template: Template
    learnt: bool
    options: tuple[str, ...] = ()

    @property
    def about_items(self) -> bool:
        """Whether each text is about a given item."""
        return "item" in self.template.fields or self.template.task == "complete"

    @property
    def picks_item(self) -> bool:
        """Whether a text must be about an item, so that one is picked for a user where none is given."""
        return "item" in self.template.needed or self.template.task == "complete"

    @property
    def about_users(self) -> bool:
        """Whether a user is told of; of the others an item is enough."""
        return "history" in self.template.fields or not self.about_items


def learnt_tasks(entries: Sequence[Mapping[str, Any]], mixture: Mapping[str, float]) -> list[Mapping[str, Any]]:
    """Those of a dataset's tasks (entries of its manifest) that a run with this mixture was trained on."""
    return [entry for entry in entries if mixture.get(entry["name"], 0) > 0]


def spoken(task: str, language: str, learnt: Sequence[Mapping[str, Any]]) -> Spoken:
    """The task asked for: a learnt one by its name, else the first learnt one of the kind, else a built-in template.

    Raises InputError for a task or language that nothing is known of, and for a choice among options that was not learnt.
    """
    if language and language not in LANGUAGES:
        raise InputError(f"language: {language}: {known(language, LANGUAGES, 'choose one of')}")
    there = [entry for entry in learnt if not language or entry["language"] == language]
    named = [entry for entry in there if entry["name"] == task and (entry["objective"] == "text" or entry["options"])]
    kind = [entry for entry in there if _is(entry, task)]
    if found := (named or kind):
        entry = found[0]
        template = parse_template(entry["text"], f"task {entry['name']}")
        return Spoken(entry["name"], template, True, tuple(entry["options"]))
    names = [*TASKS, *(entry["name"] for entry in learnt if entry["objective"] == "text" or entry["options"])]
    if task not in TASKS:
        raise InputError(f"task: {task}: {known(task, list(dict.fromkeys(names)), 'choose one of')}")
    if task == "classify":
        raise InputError("task classify: the run was trained on no task with options; add one to the card and to mixture.tasks, then train")  # fmt: skip
    return Spoken(task, load_template(task, language or "en"), False)


def _is(entry: Mapping[str, Any], task: str) -> bool:
    if task == "classify":
        return entry["objective"] in WITH_OPTIONS
    return entry["objective"] == "text" and entry["text"]["task"] == task


def turns_of(conversation: str) -> list[dict[str, str]]:
    """The turns of a conversation, `USER: ... SYSTEM: ...`, as fields of events. Raises InputError without a user's."""
    parts = SPEAKER.split(conversation.strip())
    turns = [{"speaker": who, "title": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
    turns = [turn for turn in turns if turn["title"]]
    if parts[0].strip() or not any(turn["speaker"] == "USER" for turn in turns):
        raise InputError(f'prompt: {conversation[:60]!r}: a conversation begins with USER: or SYSTEM: and has a turn of the user; write it as "USER: what I look for"')  # fmt: skip
    return turns
