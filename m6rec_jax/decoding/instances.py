"""Answers to instances of tasks by a trained model: chances of options, likelihood of texts, vectors, nearest items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from flax import nnx

from m6rec_jax.artifacts.checkpoints import load_params
from m6rec_jax.artifacts.run import Run, read_run
from m6rec_jax.data.arrays import read_arrays
from m6rec_jax.data.instances.layout import Laid
from m6rec_jax.data.instances.read import Instances
from m6rec_jax.decoding.devices import Devices
from m6rec_jax.decoding.shapes import Prompt, batches, pad
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import ItemTable, item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import Transformer, framed
from m6rec_jax.objectives.contrast import counted, pooled, unit
from m6rec_jax.objectives.loss import cross_entropy
from m6rec_jax.objectives.scoring import scoring_order
from m6rec_jax.vocab import OPTIONS


class InstanceScorer:
    """A model ready to answer instances of `tasks`, a dataset's own as its manifest tells them.

    `blueprint` and `params` are those of one domain with the options of its tasks (`Blueprint.domain`), `items` the facts
    of its catalogue; `length`: most tokens that the model reads at once. Batches are padded to few shapes, one program
    each. Assign `params` (nested dict, as checkpoints hold them) to answer by another checkpoint.
    """

    def __init__(self, blueprint: Blueprint, params: Any, items: ItemTable, tasks: Sequence[Mapping[str, Any]], *,
                 length: int = 256, devices: Sequence[jax.Device] | None = None) -> None:  # fmt: skip
        self.blueprint, self.length = blueprint, length
        self.tasks = {task["name"]: dict(task) for task in tasks}
        sizes = [len(task["options"]) for task in tasks]
        ends = np.cumsum(sizes)
        self._rows = {
            task["name"]: slice(int(e - n), int(e)) for task, n, e in zip(tasks, sizes, ends, strict=True) if n
        }
        self._devices = Devices(devices)
        self.items: ItemTable = self._devices.everywhere(items)
        self.params = params

    @classmethod
    def load(cls, run: Path | str, step: int | str = "best", domain: int = 0,
             devices: Sequence[jax.Device] | None = None) -> InstanceScorer:  # fmt: skip
        """The scorer of a run, for one of its domains. Raises InputError when the run has no checkpoint."""
        record = read_run(run)
        whole = Blueprint(
            replace(record.config.model, attention="auto"), record.vocab, record.content_width, record.more_widths
        )
        _, params = load_params(record.path, step, whole.shapes())
        options = record.option_tasks(domain)
        return cls(
            whole.domain(domain, options), whole.domain_params(params, domain, options), _facts_of(record, domain),
            record.tasks(domain), length=record.config.data.length, devices=devices,
        )  # fmt: skip

    @property
    def params(self) -> nnx.State:
        """The model's parameters, on the device."""
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        self._define, state = nnx.split(self.blueprint.bind(params))
        self._params = self._devices.everywhere(state)

    def knows(self, about: Mapping[str, Any]) -> bool:
        """Whether the model has learnt a task of a manifest, or one of the same name, objective and options."""
        mine = self.tasks.get(about["name"])
        return mine is not None and all(mine[key] == about[key] for key in ("objective", "options"))

    def chances(self, instances: Instances) -> np.ndarray:
        """The chance of each option of each instance of a task with options: float32 `[n, C]`."""
        self.check(instances.about)
        return self.option_chances(instances.about["name"], instances.laid_out(self.length))

    def option_chances(self, task: str, laid: Sequence[Laid]) -> np.ndarray:
        """`chances` of instances that are laid out. Raises InputError when the task has no options."""
        rows = self.option_rows(task)
        prompts = [(one.source, one.source_rows) for one in laid]
        opens = [_opens(tokens) for tokens, _ in prompts]
        logits = self._each(_option_logits, (), prompts, opens, sum(self.blueprint.vocab.options))[:, rows]
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def option_rows(self, task: str) -> slice:
        """Which rows of the options' table are a task's. Raises InputError when it has none."""
        if task not in self._rows:
            raise InputError(f"task {task}: no options, of which {', '.join(self._rows) or 'no task'} of this run has some")  # fmt: skip
        return self._rows[task]

    def likelihood(self, laid: Sequence[Laid]) -> tuple[np.ndarray, np.ndarray]:
        """How likely the target of each is after its source, read left to right: the mean log-likelihood of its tokens
        float32 `[n]` (M6-Rec compares statements by it), and how many tokens that are int32 `[n]`."""
        prompts = [
            (np.concatenate([one.source, one.target]), np.concatenate([one.source_rows, one.target_rows]))
            for one in laid
        ]
        many = np.array([len(one.target) for one in laid], np.int32)
        total = self._each(_log_likelihood, (), prompts, [len(one.source) for one in laid], 0)
        return total / np.maximum(many, 1), many

    def queries(self, laid: Sequence[Laid]) -> np.ndarray:
        """The vector of each query, of length one: float32 `[n, V]`."""
        prompts = [(one.source, one.source_rows) for one in laid]
        return self._vectors("query", prompts, [len(tokens) for tokens, _ in prompts])

    def item_vectors(self, laid: Sequence[Laid]) -> np.ndarray:
        """The vector of each item, the target of a retrieval, of length one: float32 `[n, V]`."""
        return self._vectors("item", [(one.target, one.target_rows) for one in laid], [0] * len(laid))

    def _vectors(self, side: str, prompts: Sequence[Prompt], opens: Sequence[int]) -> np.ndarray:
        if not (width := self.blueprint.config.vectors):
            raise InputError("model.vectors=0: this run has no retrieval vectors; train one with model.vectors=128 and a retrieval")  # fmt: skip
        return self._each(_unit_vectors, (side,), prompts, opens, width)

    def _each(self, program: Callable[..., Any], static: tuple, prompts: Sequence[Prompt], opens: Sequence[int], width: int) -> np.ndarray:  # fmt: skip
        """What a program makes of each prompt, `[n, width]`, or `[n]` where `width` is 0."""
        made = np.zeros((len(prompts), width) if width else len(prompts), np.float32)
        lengths = [len(tokens) for tokens, _ in prompts]
        if max(lengths, default=0) > self.length:
            raise ValueError(f"a prompt of {max(lengths)} tokens, and the model reads {self.length}")
        for chosen, T, B in batches(lengths, devices=self._devices.count):
            at = np.ones(B, np.int32)
            at[: len(chosen)] = np.asarray(opens)[chosen]
            own = (*pad([prompts[i] for i in chosen], B, T), at)
            found = self._devices.run(program, (self._define, *static), (self._params, self.items), own)
            made[chosen] = np.asarray(found)[: len(chosen)]
        return made

    def check(self, about: Mapping[str, Any]) -> None:
        """Raise InputError unless the model `knows` a task."""
        if not self.knows(about):
            names = ", ".join(self.tasks) or "no task"
            raise InputError(f"task {about['name']}: the run has learnt {names} and not this one with these options; train on the dataset that has it")  # fmt: skip


def _opens(tokens: np.ndarray) -> int:
    """Tokens before the candidate, which see each other."""
    return int((scoring_order(tokens) == 0).sum())


def _facts_of(record: Run, domain: int) -> ItemTable:
    folder = record.folder(domain)
    seen = pl.read_parquet(folder / "items.parquet", columns=["seen"])["seen"].to_numpy()
    return item_table(read_arrays(folder / "codes.npz")["content"], seen)


# -- programs ------------------------------------------------------------------------------------------------------


def _states(model: Transformer, items: ItemTable, tokens, item_rows, lengths, opens) -> jax.Array:
    """States `[B, T, D]` of right-padded prompts, whose first `opens [B]` tokens see each other and later ones all before."""
    return model.hidden(tokens, item_rows, framed(tokens.shape, opens, lengths), items)


def _last(states: jax.Array, lengths: jax.Array) -> jax.Array:
    return jnp.take_along_axis(states, (lengths - 1)[:, None, None], axis=1)[:, 0]


@partial(jax.jit, static_argnums=0)
def _option_logits(define, params, items, tokens, item_rows, lengths, opens):
    model = nnx.merge(define, params)
    states = _last(_states(model, items, tokens, item_rows, lengths, opens), lengths)
    at = [s.name for s in model.vocab.slices].index(OPTIONS)
    return model.logits(states, at, items)[:, : model.vocab.slices[at].size]


@partial(jax.jit, static_argnums=0)
def _log_likelihood(define, params, items, tokens, item_rows, lengths, starts):
    """Sum `[B]` of the log-likelihoods of tokens `starts .. lengths`, each after all before it."""
    model = nnx.merge(define, params)
    states = _states(model, items, tokens, item_rows, lengths, jnp.zeros_like(starts))
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    at = jnp.arange(tokens.shape[1])
    asked = (at >= starts[:, None] - 1) & (at < lengths[:, None] - 1)
    row = jnp.broadcast_to(jnp.arange(len(tokens))[:, None], tokens.shape)
    return -cross_entropy(model, states, following, asked.astype(jnp.float32), row, len(tokens), items).loss


@partial(jax.jit, static_argnums=(0, 1))
def _unit_vectors(define, side, params, items, tokens, item_rows, lengths, opens):
    model = nnx.merge(define, params)
    states = model.meant(_states(model, items, tokens, item_rows, lengths, opens), tokens, item_rows, items)
    chosen = counted(tokens, jnp.arange(tokens.shape[1]) < lengths[:, None])
    return unit(pooled(states, chosen), model.projections()[side])
