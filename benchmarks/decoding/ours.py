"""Our own systems, each in a process of its own: python -m benchmarks.decoding.ours JOB ANSWER

`cold` is the public engine, from histories to lists. `warm` is the same for users whose prefixes it has kept. `int8` is
`cold` with `weights="int8"`. `prefill` is no system: it says how close to the matrix peak of this machine prefixes
are read.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.decoding.setting import BLUEPRINT, load_params
from benchmarks.decoding.work import System, Work, answer
from m6rec_jax.decoding.cache import prefill
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.model.items import ItemTable, item_table
from m6rec_jax.model.transformer import Transformer

ROOM = 256  # tokens of the bucket that the engine reads these prefixes in


def cold(work: Work, job: dict[str, Any], weights: str = "full") -> System:
    """`Engine.recommend`."""
    model, items = _model(work, job)
    engine, beams = Engine(model, work.codes, items.content, items.seen, length=ROOM, weights=weights), job["beams"]

    def ask(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lists = engine.recommend(list(work.histories[users]), k=beams, beams=beams)
        return lists.rows, lists.scores

    return System(ask)


def warm(work: Work, job: dict[str, Any]) -> System:
    """`Engine.recommend` for known users: timed are the reading of one event and the search; the rest is kept."""
    model, items = _model(work, job)
    engine, beams = Engine(model, work.codes, items.content, items.seen, length=ROOM), job["beams"]

    def ask(users: np.ndarray, events: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        histories = [history[:events] for history in work.histories[users]]
        lists = engine.recommend(histories, users=users.tolist(), k=beams, beams=beams)
        return lists.rows, lists.scores

    return System(ask, lambda users: ask(users, -1))


def int8(work: Work, job: dict[str, Any]) -> System:
    """`cold` with weights kept as int8."""
    return cold(work, job, weights="int8")


def closeness(work: Work, job: dict[str, Any]) -> dict[str, float]:
    """GFLOP/s of a square matrix product and of reading prefixes, both at their best: `peak_gflops, prefill_gflops`."""
    a = jax.random.normal(jax.random.key(0), (2048, 2048), job["dtype"])
    model, items = _model(work, job)
    define, params = nnx.split(model)
    tokens, rows, lengths = _padded(work, np.arange(job["batch"]))
    tokens, rows = tokens[:, : lengths[0]], rows[:, : lengths[0]]  # without padding: what is read counts
    read = jax.jit(lambda *inputs: prefill(nnx.merge(define, inputs[0]), *inputs[1:]))
    config, (B, T) = BLUEPRINT.config, tokens.shape
    weights = sum(x.size for name, x in load_params(work.folder)["block"].items() if not name.endswith("norm"))
    flops = 2 * weights * B * T + 4 * config.layers * config.width * B * T * T  # all of the T x T scores are computed
    return {
        "peak_gflops": 2 * a.shape[0] ** 3 / _best(jax.jit(lambda x: x @ x), a) / 1e9,
        "prefill_gflops": flops / _best(read, params, items, tokens, rows, lengths) / 1e9,
    }


def _best(run: Callable[..., Any], *inputs: Any, calls: int = 10) -> float:
    jax.block_until_ready(run(*inputs))
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        taken.append(time.perf_counter() - start)
    return min(taken)


def _model(work: Work, job: dict[str, Any]) -> tuple[Transformer, ItemTable]:
    params = jax.tree.map(jnp.asarray, load_params(work.folder))
    blueprint = replace(BLUEPRINT, config=replace(BLUEPRINT.config, dtype=job["dtype"]))
    return blueprint.bind(params), _items(work)


def _items(work: Work) -> ItemTable:
    C = len(work.codes)
    return jax.device_put(item_table(np.zeros((C, 1)), np.ones(C, bool)))


def _padded(work: Work, users: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and item rows `[B, ROOM]`, lengths `[B]` of each history."""
    L, chosen = work.codes.shape[1], work.histories[users]
    length = 1 + L * chosen.shape[1]
    tokens, rows = np.zeros((len(users), ROOM), np.int32), np.full((len(users), ROOM), -1, np.int32)
    tokens[:, :length], rows[:, L:length:L] = work.prefixes[users, :length], chosen
    return tokens, rows, np.full(len(users), length, np.int32)


def main(argv: list[str]) -> None:
    job = json.loads(Path(argv[1]).read_text(encoding="utf-8"))
    if job["system"] == "prefill":
        made = closeness(Work.load(Path(job["work"])), job)
        Path(argv[2]).write_text(json.dumps(made), encoding="utf-8")
    else:
        answer({"cold": cold, "warm": warm, "int8": int8}, argv)


if __name__ == "__main__":
    main(sys.argv)
