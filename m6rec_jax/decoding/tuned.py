"""Many tuned tasks over one backbone: a batch may hold instances of all of them, each row with its own task's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m6rec_jax.artifacts.tuned import Artefact, backbone_digests
from m6rec_jax.decoding.cache import Prefix
from m6rec_jax.decoding.sampling import Sampling
from m6rec_jax.decoding.shapes import Prompt, batches, bucket, pad
from m6rec_jax.decoding.slots import Slots, advance
from m6rec_jax.errors import InputError
from m6rec_jax.model import depth, tuning
from m6rec_jax.model.applied import Applied
from m6rec_jax.model.depth import Backbone
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import Transformer, asked
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
    """Scores instances of tuned tasks with options, and writes the texts of others, over one copy of a backbone.

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

        Raises InputError for a task that is not served or has no options, ValueError when there are not as many tasks as
        prompts.
        """
        made: list[np.ndarray] = [np.zeros(0, np.float32)] * len(prompts)
        for group, at, own in self._batches(tasks, prompts, options=True):
            found = np.asarray(_score(group.blueprint, group.params, self.items, group.stack, *own))
            for i, logp in zip(at, found, strict=False):
                made[i] = logp[: len(self._tasks[tasks[i]].options)]
        return made

    def write(self, tasks: Sequence[str], prompts: Sequence[Prompt], most: int) -> list[np.ndarray]:
        """The likeliest text, token by token, of every instance of a text task: at most `most` ids, without `</s>`.

        Raises InputError for a task that is not served or has options, ValueError as `score`.
        """
        made: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
        for group, at, own in self._batches(tasks, prompts, options=False):
            alive = np.arange(len(own[0])) < len(at)
            found = _write(group.blueprint, most, group.params, self.items, group.stack, *own, alive)
            for i, tokens, count in zip(at, *map(np.asarray, found), strict=False):
                made[i] = tokens[:count]
        return made

    def _batches(
        self, tasks: Sequence[str], prompts: Sequence[Prompt], options: bool
    ) -> Iterator[tuple[_Group, list[int], tuple[np.ndarray, ...]]]:
        """(group, places among the prompts, padded arrays) of batches of similar length, after all names are checked."""
        if len(tasks) != len(prompts):
            raise ValueError(f"{len(tasks)} tasks and {len(prompts)} prompts: one task a prompt")
        for name in dict.fromkeys(tasks):
            self._check(name)
            if bool(self._tasks[name].options) != options:
                what = "has options, which `score` tells" if not options else "has no options; `write` its texts"
                raise InputError(f"task {name}: {what}")
        for group in self._groups:
            own = [i for i, name in enumerate(tasks) if name in group.places]
            for chosen, T, B in batches([len(prompts[i][0]) for i in own]):
                at = [own[i] for i in chosen]
                select = np.zeros(B, np.int32)
                select[: len(at)] = [group.places[tasks[i]] for i in at]
                yield group, at, (*pad([prompts[i] for i in at], B, T), select)

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
    """Log-probabilities of the options `[B, C]` of right-padded prompts, each under the task it selects."""
    view = asked(tokens, lengths)
    hidden, _ = blueprint.bind(params).routed(tokens, item_rows, view, items, tuned=stack.chosen(select))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return jax.nn.log_softmax(tuning.option_logits(last, stack.weight[select], stack.bias[select]))


class _Beside:
    """A model as decoding asks it, with each row's tuned numbers beside it."""

    def __init__(self, model: Transformer, tuned: Applied) -> None:
        self.vocab, self.logits = model.vocab, model.logits
        self.prefill = partial(model.prefill, tuned=tuned)
        self.extend = partial(model.extend, tuned=tuned)


@partial(jax.jit, static_argnums=(0, 1))
def _write(blueprint, most, params, items, stack, tokens, item_rows, lengths, select, alive):
    """(tokens `[B, most]`, how many of them `[B]`) of the likeliest text behind each right-padded causal prefix."""
    B, each = tokens.shape[0], stack.chosen(select)
    model = _Beside(blueprint.bind(params), each)
    hidden, kv = model.prefill(tokens, item_rows, lengths, items)
    kv = tuple(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, most), (0, 0))) for x in kv)
    nothing = jnp.zeros((B, kv[0].shape[3]), jnp.int32)
    prefix = Prefix(nothing, nothing - 1, lengths + each.used, kv, hidden)
    zero, one = jnp.zeros(B), jnp.ones(B)
    sampling = Sampling(
        zero, zero.astype(jnp.int32), one, zero.astype(jnp.uint32), jnp.full(B, most), one, jnp.zeros(B, bool)
    )
    held = jnp.zeros((B, blueprint.vocab.text.padded), bool)
    slots = Slots(prefix, sampling, held, zero.astype(jnp.int32))
    return advance(model, items, slots, alive, most)[1:3]
