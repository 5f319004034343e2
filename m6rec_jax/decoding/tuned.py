"""Many tuned tasks over one backbone: a batch may hold instances of all of them, each row with its own task's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m6rec_jax.artifacts.tuned import Artefact, backbone_digests
from m6rec_jax.decoding.shapes import Prompt, batches, bucket, pad
from m6rec_jax.errors import InputError
from m6rec_jax.model import depth, tuning
from m6rec_jax.model.depth import Backbone
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import View
from m6rec_jax.model.tuning import Tuned, TuneSpec

ROOM = 8  # tasks that a program has room for at least; past them it doubles


@dataclass(frozen=True)
class _Task:
    spec: TuneSpec
    tuned: Tuned
    options: list[str]


@dataclass(frozen=True)
class _Group:
    """Tasks that share all matrices, and so a program: `params` of `blueprint`, and each task's place in the stack."""

    blueprint: Blueprint
    params: Any
    stack: tuning.Stack
    places: dict[str, int]


class TunedServer:
    """Scores instances of tuned tasks with options over one backbone, of which there is one copy.

    All tasks that train a few numbers beside the backbone, whatever their methods, are one group: a batch mixes them as
    it likes and comes out as each task alone (to float rounding). A task with fresh layers, or with everything trained, has
    matrices of its own and is run in batches of its own. Artefacts of any other backbone are refused.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.blueprint = backbone.blueprint
        self.params, self.items = jax.device_put((backbone.params, backbone.items))
        self._digests = backbone_digests(self.params)
        self._tasks: dict[str, _Task] = {}
        self._groups: list[_Group] = []

    @property
    def tasks(self) -> dict[str, list[str]]:
        """The options of each task by its name."""
        return {name: task.options for name, task in self._tasks.items()}

    def add(self, *artefacts: Artefact) -> None:
        """Serve these too; one of a task that is served already takes its place. Programs are compiled anew only where the
        tasks outgrow the room, rank, prompts, options or kinds of numbers that there were.

        Raises InputError, and changes nothing, when one was tuned on another backbone or its arrays do not fit.
        """
        made = dict(self._tasks)
        for artefact in artefacts:
            artefact.check_backbone(self._digests)
            spec = TuneSpec.from_dict(artefact.spec)
            if len(artefact.options) != spec.options:
                raise InputError(f"{artefact.path}: {len(artefact.options)} options by name and {spec.options} tuned; tune again")  # fmt: skip
            if not spec.options:
                raise InputError(f"{artefact.path}: {artefact.name} writes text and has no options to score; serve tasks with options here")  # fmt: skip
            tuned = tuning.from_arrays(spec, self.blueprint.config, artefact.arrays)
            made[artefact.name] = _Task(spec, tuned, artefact.options)
        self._tasks, self._groups = made, self._grouped(made)

    def drop(self, name: str) -> None:
        """Serve this task no more."""
        self._check(name)
        made = {known: task for known, task in self._tasks.items() if known != name}
        self._tasks, self._groups = made, self._grouped(made)

    def score(self, tasks: Sequence[str], prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """The log-probability of each option, float32 `[C]`, of every instance: its task by name, its tokens and item
        rows up to `</target>`.

        Raises InputError for a task that is not served, ValueError when there are not as many tasks as prompts.
        """
        if len(tasks) != len(prompts):
            raise ValueError(f"{len(tasks)} tasks and {len(prompts)} prompts: one task a prompt")
        for name in dict.fromkeys(tasks):
            self._check(name)
        made: list[np.ndarray] = [np.zeros(0, np.float32)] * len(prompts)
        for group in self._groups:
            own = [i for i, name in enumerate(tasks) if name in group.places]
            for chosen, T, B in batches([len(prompts[i][0]) for i in own]):
                at = [own[i] for i in chosen]
                select = np.zeros(B, np.int32)
                select[: len(at)] = [group.places[tasks[i]] for i in at]
                rows = pad([prompts[i] for i in at], B, T)
                found = np.asarray(_score(group.blueprint, group.params, self.items, group.stack, *rows, select))
                for i, logp in zip(at, found, strict=False):
                    made[i] = logp[: len(self._tasks[tasks[i]].options)]
        return made

    def _check(self, name: str) -> None:
        if name not in self._tasks:
            raise InputError(f"task {name}: not served; there are {', '.join(self._tasks) or 'none'}")

    def _grouped(self, tasks: dict[str, _Task]) -> list[_Group]:
        light = {name: task for name, task in tasks.items() if task.spec.light}
        groups = [self._group(self.blueprint, self.params, light, bucket(len(light), ROOM))] if light else []
        for name, task in tasks.items():
            if not task.spec.light:
                own, params = depth.assembled(task.spec, self.blueprint, self.params, task.tuned)
                whole = _Task(tuning.as_whole(task.spec), task.tuned, task.options)
                groups.append(self._group(own, jax.device_put(params), {name: whole}, 1))
        return groups

    def _group(self, blueprint: Blueprint, params: Any, tasks: dict[str, _Task], room: int) -> _Group:
        specs, tuned = [task.spec for task in tasks.values()], [task.tuned for task in tasks.values()]
        stack = jax.device_put(tuning.stack(specs, tuned, blueprint.config, room))
        return _Group(blueprint, params, stack, {name: place for place, name in enumerate(tasks)})


@partial(jax.jit, static_argnums=0)
def _score(blueprint, params, items, stack, tokens, item_rows, lengths, select):
    """Log-probabilities of the options `[B, C]` of right-padded bidirectional rows, each under the task it selects."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    end = jnp.where(positions < lengths[:, None], lengths[:, None], 0)
    view = View(positions, jnp.zeros_like(positions), end)
    hidden, _ = blueprint.bind(params).routed(tokens, item_rows, view, items, tuned=stack.chosen(select))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return jax.nn.log_softmax(tuning.option_logits(last, stack.weight[select], stack.bias[select]))
