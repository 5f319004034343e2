"""Tasks of a dataset's own: an entry of its manifest becomes a task of the mixture, by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from m6rec_jax.data.examples import Example
from m6rec_jax.data.instances.layout import Laid, lay_out
from m6rec_jax.data.instances.pairs import with_pairs
from m6rec_jax.data.records import INSTANCE, Record
from m6rec_jax.data.tasks import Facts, Piece, Task
from m6rec_jax.errors import InputError

if TYPE_CHECKING:
    from m6rec_jax.data.domains import Domain

# How each objective of a template is laid out and trained (m6rec_jax.objectives).
TRAINED_AS = {
    "scoring": "scoring",
    "classify": "scoring",
    "retrieval": "retrieval",
    "plausibility": "causal",
    "text": "causal",
}
LEAST_ROOM = 16


def instance_task(entry: Mapping[str, Any], number: int, option_task: int) -> Task:
    """The task of a manifest entry: `number` among all tasks of its dataset, `option_task` among those with options (-1
    for one without)."""
    objective, answer = entry["objective"], max(round(entry["answer_tokens"]), 1)

    def sizes(tokens: np.ndarray, draws: np.ndarray, facts: Facts) -> tuple[np.ndarray, np.ndarray]:
        target = np.minimum(answer, np.maximum(tokens - 4, 1))
        return tokens - target, target

    def build(record: Record, piece: Piece, facts: Facts) -> Example:
        option = facts.vocab.option(option_task, record.label) if option_task >= 0 else -1
        return example_of(lay_out(record, objective, piece.stretch), option, objective, record.label)

    return Task(
        entry["name"], (INSTANCE,), TRAINED_AS[objective], lambda room, facts: room, sizes, build, windows=False,
        by_draw=False, instance=number,
    )  # fmt: skip


def example_of(laid: Laid, option: int, objective: str, label: int) -> Example:
    """An instance as an example: `option` is the id of the right option, -1 without options. An implausible pair (label
    0) asks for nothing."""
    target, rows = laid.target, laid.target_rows
    if option >= 0:
        target, rows = np.array([option], np.int32), np.array([-1], np.int32)
    weight = 0.0 if objective == "plausibility" and label == 0 else 1.0
    return Example(
        laid.source, laid.source_rows, target, rows, np.full(len(target), weight, np.float32), np.arange(len(target))
    )


def tasks_of(entries: Sequence[Mapping[str, Any]]) -> dict[str, Task]:
    """The tasks of one dataset, by name."""
    made, with_options = {}, 0
    for number, entry in enumerate(entries):
        made[entry["name"]] = instance_task(entry, number, with_options if entry["options"] else -1)
        with_options += bool(entry["options"])
    return made


def tasks_of_domains(domains: Sequence[Domain]) -> list[dict[str, Task]]:
    """For each domain every task that any of them has; one that another domain alone has finds no record in it.

    Raises InputError when two have a task of one name and another objective.
    """
    own = [with_pairs(tasks_of(domain.dataset.tasks), domain.dataset) for domain in domains]
    made: list[dict[str, Task]] = []
    for mine in own:
        known = dict(mine)
        for domain, theirs in zip(domains, own, strict=True):
            for name, task in theirs.items():
                if name in known and known[name].objective != task.objective:
                    raise InputError(f"task {name}: of another objective in {domain.dataset.path}; give one of them another name")  # fmt: skip
                known.setdefault(name, _absent(task))
        made.append(known)
    return made


def _absent(task: Task) -> Task:
    return Task(
        task.name, task.records, task.objective, task.stretch, task.sizes, task.build, windows=False, by_draw=False,
        instance=NOWHERE,
    )  # fmt: skip


NOWHERE = -2
