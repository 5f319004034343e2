"""The gate of a run: taken from its folder, or fitted on the validation users of a dataset and stored there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from m6rec_jax.artifacts.checkpoints import best_step
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.progress import note, stage
from m6rec_jax.recommend import metrics
from m6rec_jax.recommend.baselines import BATCH, listed_of
from m6rec_jax.recommend.gate import GATE_FILE, Gate, move_gate, tempered_gate
from m6rec_jax.recommend.histories import Histories, held_out
from m6rec_jax.recommend.memory import Memory
from m6rec_jax.recommend.opening import dataset_of, domain_of
from m6rec_jax.recommend.recommender import Recommender

MOST_USERS = 10_000  # whose targets decide the slopes: four numbers need no more
RANKED_USERS = 4096  # whose lists decide the height
CANDIDATES = 50
TEMPERATURES = (1.0, 0.7, 0.85, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
HALFWAY, FAINT = 1.5, 1e-9  # candidates are those of a gate moved so far up, and those of the model nearly alone


def fit_gate(run: Path | str, dataset: Dataset | Path | str | None = None, step: int | str = "best") -> Gate | None:
    """The gate of a run's memory for these parameters and this dataset, see `with_gate`.

    None when the run has no model to weigh the memory against.
    """
    data = dataset_of(run, dataset)
    return with_gate(Recommender.load(run, step, data), run, data).gate


def with_gate(recommender: Recommender, run: Path | str, dataset: Dataset, *, keep: bool = True) -> Recommender:
    """The recommender with a gate for its parameters and this dataset: the run's own, else one fitted now.

    What is fitted is stored as `gate.json` in the run (for a further domain, in its folder there) when it is for what
    the run serves with by itself: its best parameters in full beside the dataset that it was trained on (`keep=False`:
    never).
    """
    if recommender.engine is None or recommender.memory is None:
        return recommender
    gate = recommender.gate
    if gate is None or (gate.step, gate.dataset) != (recommender.step, dataset.digest):
        gate = recommender.gate = _fitted(recommender.engine, recommender.memory, dataset, recommender.step)
        record = read_run(run)
        domain = domain_of(record, dataset)
        full = recommender.engine.weights == "full"
        own = keep and full and dataset.digest == record.datasets[domain].digest and gate.step == best_step(run)
        if own:
            gate.save(record.folder(domain) / GATE_FILE)
        gained = f"{gate.gain:+.3f} nats a target over the model alone" + ("" if own else "; not kept with the run")
        note(f"gate of the memory fitted on {gate.users:,} validation users of {dataset.name}: {gained}")
    return recommender


def _fitted(engine: Engine, memory: Memory, dataset: Dataset, step: int, *, seed: int = 0) -> Gate:
    """The gate that suits a model and a memory, on at most `MOST_USERS` validation users drawn by `seed`.

    The model's probabilities are those of decoding, the memory's are over what the user may be shown.
    """
    asked, rng = _possible(dataset), np.random.default_rng(seed)
    if len(asked) > MOST_USERS:
        asked = asked.take(np.sort(rng.choice(len(asked), MOST_USERS, replace=False)))
    known, listed = asked.known, listed_of(dataset.items)
    p_memory, total = np.zeros(len(asked)), np.zeros(len(asked))
    logp = np.zeros((len(asked), len(TEMPERATURES)))
    order = np.argsort([len(h) for h in asked.items], kind="stable")  # a program reads histories of like length
    lengths = np.array([len(h) for h in known], np.float64)
    with stage("gate of the memory", len(asked), "users") as bar:
        for start in range(0, len(asked), BATCH):
            at = order[start : start + BATCH]
            one, had = asked.take(at), [known[i] for i in at]
            logp[at] = engine.score(
                one.items, one.targets, times=one.times, kinds=one.kinds, queries=one.queries, temperatures=TEMPERATURES
            )
            support = memory.support(had, exclude=None if dataset.repeat else had, allowed=listed)
            p_memory[at], total[at] = support.probability(one.targets), support.total
            bar.advance(len(at))
    gate = tempered_gate(logp, TEMPERATURES, p_memory, lengths, total, step=step, dataset=dataset.digest)
    if not gate.users:
        return gate
    halfway, chosen = replace(gate, bias=gate.bias + HALFWAY), rng.permutation(len(asked))[:RANKED_USERS]
    found = []
    with stage("height of the gate", len(chosen), "users") as bar:
        for start in range(0, len(chosen), BATCH):
            one = asked.take(chosen[start : start + BATCH])
            found.append(_candidates(engine, memory, halfway, one, dataset.repeat, listed))
            bar.advance(len(one))
    model, by_memory, hit = (np.concatenate(part) for part in zip(*found, strict=True))
    return move_gate(gate, model, by_memory, hit, lengths[chosen], total[chosen])


def _possible(dataset: Dataset) -> Histories:
    """Validation users whose target can be in a list at all."""
    asked, listed = held_out(dataset, "valid"), listed_of(dataset.items)
    possible = np.array([(h >= 0).any() for h in asked.items], bool)
    if listed is not None:
        possible &= listed[asked.targets]
    if not dataset.repeat and len(asked):
        possible &= ~metrics.member(asked.targets[:, None], asked.known)[:, 0]
    return asked.take(np.flatnonzero(possible))


def _candidates(engine: Engine, memory: Memory, gate: Gate, asked: Histories, repeat: bool,
                listed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Of the best `CANDIDATES` of each user under `gate` and of as many with a faint memory: log-probability by model, by
    memory, and which is the target, each `[U, 2 x CANDIDATES]`; an item of both lists counts once."""
    known = asked.known
    exclude = None if repeat else known
    support = memory.support(known, exclude=exclude, allowed=listed)
    g = gate(np.array([len(h) for h in known]), support.total)
    under, faint = (
        engine.recommend(
            asked.items, times=asked.times, kinds=asked.kinds, queries=asked.queries, k=CANDIDATES, exclude=exclude,
            allowed=listed, memory=(support.rows, support.mass), gate=share, temperature=gate.heat(g),
        )
        for share in (g, np.minimum(g, FAINT))
    )  # fmt: skip
    again = (faint.rows[:, :, None] == under.rows[:, None, :]).any(2)
    rows = np.concatenate([under.rows, np.where(again, -1, faint.rows)], axis=1)
    there = rows >= 0
    parts = ((under.model_logp, faint.model_logp), (under.memory_logp, faint.memory_logp))
    model, memory_logp = (np.where(there, np.concatenate(pair, axis=1), -np.inf) for pair in parts)
    return model, memory_logp, there & (rows == asked.targets[:, None])
