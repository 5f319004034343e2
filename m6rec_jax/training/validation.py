"""Losses of every task on held-out records, beside the unigram loss that a task must get under to have learnt."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from m6rec_jax.data.loader import build_row
from m6rec_jax.data.packing import ROW_ARRAYS, pack_lengths
from m6rec_jax.data.plan import Entries, Plan, Pool
from m6rec_jax.data.records import RecordReader
from m6rec_jax.model.items import Catalogues
from m6rec_jax.training.metrics import Labels, by_label
from m6rec_jax.training.sharding import place_batch, row_part
from m6rec_jax.vocab import OPTIONS, Vocab

SAMPLE = 512  # held-out examples a task


def validation_rows(plan: Plan, pools: list[Pool], records: RecordReader, seed: int) -> list[dict[str, np.ndarray]]:
    """Packed rows of up to `SAMPLE` held-out examples a task, the same at every validation. `plan`: the training plan.

    None of replaced-token detection: no generator is kept with the parameters that are validated (docs/augmentation.md).
    """
    parts = []
    for task, pool in enumerate(pools):
        rng = np.random.default_rng([seed, 5, task])
        sample = 0 if pool.objective.name == "replaced" else SAMPLE
        chosen = np.sort(rng.permutation(len(pool.records))[:sample])
        draw = rng.random(len(chosen))
        length = pool.objective.length(
            *pool.task.sizes(pool.tokens[chosen], draw, pool.facts), plan.config.rate(pool.objective.name)
        ).astype(np.int64)
        parts.append((np.full(len(chosen), task), pool.records[chosen], pool.starts[chosen], draw, length))
    task, record, start, draw, length = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    entries = Entries(np.arange(len(task)), task, record, start, draw, length)
    rows = pack_lengths(length, plan.config.length)
    return [build_row(plan, records, entries.take(row), pools) for row in rows]


def unigram_losses(
    plan: Plan, records: RecordReader, held_out: list[dict[str, np.ndarray]], vocab: Vocab, labels: Labels
) -> dict[str, float]:
    """Loss a label of the plan's pools on `held_out` rows of guessing by how often a token was a target of that task in training.

    Counts (plus one) over the first block of the plan, normalised over a target's slice, of an option over those of its
    task; where guessing evenly is better (targets never seen in training), the loss of that. Retrieval and
    replaced-token detection have no tokens to guess, and no such loss.
    """
    spelled = np.array([pool.objective.name not in ("retrieval", "replaced") for pool in plan.pools])
    counts = np.ones((len(plan.pools), vocab.size))
    even = np.zeros(vocab.size)
    entries, rows = plan.block(0)
    for places in rows:
        row = build_row(plan, records, entries.take(places), plan.pools)
        some = spelled[row["task_ids"]]
        np.add.at(counts, (row["task_ids"][some], row["targets"][some]), row["loss_weights"][some])
    for inside in _together(vocab):
        counts[:, inside] /= counts[:, inside].sum(axis=1, keepdims=True)
        even[inside] = 1 / (inside.stop - inside.start)
    loss, even_loss, weight = (np.zeros(len(plan.pools)) for _ in range(3))
    for row in held_out:
        some = spelled[row["task_ids"]]
        task, target, weights = row["task_ids"][some], row["targets"][some], row["loss_weights"][some]
        np.add.at(loss, task, -np.log(counts[task, target]) * weights)
        np.add.at(even_loss, task, -np.log(np.where(weights > 0, even[target], 1)) * weights)
        np.add.at(weight, task, weights)
    best = np.minimum(loss, even_loss)
    return {name: part / whole for name, part, whole in by_label(labels, best, weight) if whole > 0}


def _together(vocab: Vocab) -> list[slice]:
    """The ids that are normalised together: a slice each, of the options those of a task."""
    made = []
    for s in vocab.slices:
        sizes = vocab.options if s.name == OPTIONS else (s.size,)
        ends = s.offset + np.cumsum([0, *sizes])
        made += [slice(int(a), int(b)) for a, b in pairwise(ends)]
    return made


class ValidationLoss:
    """Mean loss a label over fixed held-out rows: `evaluator(params) -> {label: loss}`."""

    def __init__(
        self,
        eval_step: Callable[..., Any],
        rows: list[dict[str, np.ndarray]],
        labels: Labels,
        batch: int,
        mesh: jax.sharding.Mesh,
        items: Catalogues,
    ):
        self.eval_step, self.labels, self.mesh, self.items = eval_step, labels, mesh, items
        empty = {name: np.zeros_like(rows[0][name]) for name in ROW_ARRAYS} if rows else {}
        padded = rows + [empty] * (-len(rows) % batch)
        part, parts = row_part(mesh)
        mine = batch // parts
        first = part * mine
        self.batches = [
            {name: np.stack([row[name] for row in padded[at + first : at + first + mine]]) for name in ROW_ARRAYS}
            for at in range(0, len(padded), batch)
        ]

    def __call__(self, params: Any) -> dict[str, float]:
        loss, weight = np.zeros(len(self.labels)), np.zeros(len(self.labels))
        for batch in self.batches:
            sums = self.eval_step(params, place_batch(self.mesh, batch, 1), self.items)
            loss, weight = loss + np.asarray(sums.loss), weight + np.asarray(sums.weight)
        return {name: part / whole for name, part, whole in by_label(self.labels, loss, weight) if whole > 0}
