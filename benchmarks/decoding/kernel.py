"""The constraint alone: filter, exclusions and memory in every step of a beam search, from 10^4 to 10^7 items.

    python -m benchmarks.decoding.kernel [--sizes 10000 100000 1000000 10000000] [--batch 8] [--beams 20] [--repeats 50]
                                         [--topology tpu:v5p:2x2x1]

`ms` is everything that a list costs beside the model: finding the ranks of exclusions and memory, and one step a code
level over log-probabilities that are given. `share_of_step` is its share of the whole search after a prefix of 200
tokens with the model of `benchmarks.decoding`. Levels and codebook are the same at all sizes. `trie_items_per_s` is the
build; `filter_ms` is what a new filter costs on the host, once. With libtpu there, the same program is compiled for a
TPU that is not: `tpu_bytes` it reads and writes by the compiler's count, `tpu_step_bytes` each level's step alone,
`tpu_peak_mb` of memory beside its arguments, `tpu_arguments_mb` these. Writes benchmarks/results/constraint.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.decoding.setting import BLUEPRINT, CODEBOOK, LEVELS
from benchmarks.record import write_results
from m6rec_jax.decoding.beam import Beams, lanes_of, root, search, show, step
from m6rec_jax.decoding.cache import prefill
from m6rec_jax.decoding.trie import Trie, allowed_under, build_trie
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.topologies import compiled, topology

EXCLUDED, SUPPORT, PREFIX = 64, 256, 200
SHARE_BAR, GROWTH_BAR = 0.10, 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10**4, 10**5, 10**6, 10**7], help="items")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--beams", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=50, help="0 = no times, only what is compiled")
    parser.add_argument("--topology", default="tpu:v5p:2x2x1", help="of the TPU to compile for; '' = none")
    options = parser.parse_args()

    cases = [Case(size, options) for size in options.sizes]
    rows = [case.facts for case in cases]
    if options.repeats:
        measure(cases, rows, options.repeats)
    print(f"wrote {write_results('constraint', rows)}")
    report(rows)


def measure(cases: list[Case], rows: list[dict[str, Any]], repeats: int) -> None:
    """Add the times of each case to its row."""
    # In turns, so that whatever else the machine does meets every size alike.
    runs = [run for case in cases for run in (case.alone, case.whole)]
    for run in runs:
        jax.block_until_ready(run())
    taken = np.zeros((repeats, len(runs)))
    for repeat in range(repeats):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            jax.block_until_ready(run())
            taken[repeat, i] = time.perf_counter() - start
    medians = 1000 * np.median(taken, axis=0).reshape(len(cases), 2)
    for row, (alone, whole) in zip(rows, medians.tolist(), strict=True):
        row |= {"ms": alone, "search_ms": whole, "share_of_step": alone / whole}


class Case:
    """One catalogue: its trie, users that ask, and two programs over them. `facts` are what needs no repeats."""

    def __init__(self, size: int, options: argparse.Namespace) -> None:
        rng = np.random.default_rng(size)
        codes = spellings(rng, size)
        start = time.perf_counter()
        host = build_trie(codes)
        built = time.perf_counter() - start
        start = time.perf_counter()
        under = allowed_under(host, rng.random(size) < 0.5)
        filtered = time.perf_counter() - start

        B, M = options.batch, lanes_of(host, options.beams, options.beams)
        trie = jax.device_put(host)
        rows = lambda n: jnp.asarray(rng.integers(0, size, (B, n)), jnp.int32)  # noqa: E731
        mass = jnp.asarray(rng.random((B, SUPPORT)), jnp.float32)
        asked = (jnp.asarray(under), rows(EXCLUDED), rows(SUPPORT), mass, jnp.full(B, 0.3))
        scores = [rng.normal(size=(B, 1 if t == 0 else M, CODEBOOK)) for t in range(LEVELS)]
        logp = [jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in scores]
        program = jax.jit(constraint, static_argnums=0)
        self.alone = lambda: program(M, trie, asked, logp)
        self.whole = whole_search(B, M, trie, asked)
        self.facts = {"catalogue": size, "batch": B, "beams": M, "trie_items_per_s": size / built,
                      "filter_ms": 1000 * filtered, "widest": list(host.width)}  # fmt: skip
        if options.topology:
            self.facts |= compiled_for_tpu(options.topology, M, (trie, asked, logp))


def constraint(M: int, trie: Trie, asked: tuple, logp: list[jax.Array]) -> tuple[Beams, list[jax.Array]]:
    """A beam search whose model is a table: all that the engine reads of its beams, and the parents at each level."""
    shown = show(trie, *asked)
    beams, parents = root(shown), []
    for level in range(LEVELS):
        beams, parent = step(trie, shown, beams, logp[level], level, M)
        parents.append(parent)
    return beams, parents


def whole_search(B: int, M: int, trie: Trie, asked: tuple) -> Callable[[], Any]:
    """The search of the engine after a prefix, model included."""
    model = BLUEPRINT.bind(BLUEPRINT.init(0))
    define, params = nnx.split(model)
    items = jax.device_put(item_table(np.zeros((1, 1)), np.ones(1, bool)))
    tokens = np.random.default_rng(0).integers(0, BLUEPRINT.vocab.pieces, (B, PREFIX))
    prefix = jax.jit(lambda p: prefill(nnx.merge(define, p), items, tokens, jnp.full((B, PREFIX), -1), jnp.full(B, PREFIX)))(params)  # fmt: skip
    run = jax.jit(lambda p, trie, prefix, asked: search(nnx.merge(define, p), items, trie, prefix, show(trie, *asked), beams=M, k=M))  # fmt: skip
    return lambda: run(params, trie, prefix, asked)


def spellings(rng: np.random.Generator, items: int) -> np.ndarray:
    """So many different codes int32 `[items, LEVELS]`, drawn evenly from the whole codebook."""
    drawn = np.unique(rng.integers(0, CODEBOOK**LEVELS, int(items * 1.01) + 100))
    drawn = rng.permutation(drawn)[:items]
    return np.stack(np.unravel_index(drawn, (CODEBOOK,) * LEVELS), axis=1).astype(np.int32)


def compiled_for_tpu(name: str, M: int, inputs: tuple) -> dict[str, Any]:
    """What the compiler says of the constraint on one chip of a topology; nothing when it cannot be had."""
    try:
        at = topology(name)
    except InputError as error:
        print(f"not compiled: {error}")
        return {}
    program = compiled(at, jax.jit(constraint, static_argnums=0), M, *inputs)
    trie, asked, logp = inputs
    shown = jax.eval_shape(show, trie, *asked)
    beams, steps = jax.eval_shape(root, shown), []
    for level in range(LEVELS):
        one = jax.jit(partial(step, level=level, width=M))
        steps.append(accessed(compiled(at, one, trie, shown, beams, logp[level])))
        beams, _ = jax.eval_shape(one, trie, shown, beams, logp[level])
    memory = program.memory_analysis()
    return {
        "topology": name, "tpu_bytes": accessed(program), "tpu_step_bytes": steps,
        "tpu_peak_mb": memory.temp_size_in_bytes / (1 << 20), "tpu_arguments_mb": memory.argument_size_in_bytes / (1 << 20),
    }  # fmt: skip


def accessed(program: jax.stages.Compiled) -> int:
    """Bytes that a compiled program reads and writes, by its cost analysis."""
    return int(program.cost_analysis()["bytes accessed"])


def report(rows: list[dict[str, Any]]) -> None:
    """A line a size, then the bars."""
    names = (
        "items",
        "widest",
        "ms",
        "search ms",
        "share",
        "trie items/s",
        "filter ms",
        "TPU bytes",
        "of each step",
        "TPU peak MB",
    )
    table = Table(*names, box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)
    for row in rows:
        table.add_row(
            f"{row['catalogue']:,}", " ".join(map(str, row["widest"])),
            *((f"{row['ms']:.2f}", f"{row['search_ms']:.1f}", f"{row['share_of_step']:.1%}") if "ms" in row else ("", "", "")),
            f"{row['trie_items_per_s']:,.0f}", f"{row['filter_ms']:.1f}",
            *((f"{row['tpu_bytes']:,}", " ".join(f"{n:,}" for n in row["tpu_step_bytes"]), f"{row['tpu_peak_mb']:.1f}")
              if "tpu_bytes" in row else ()),
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 140).print(table)
    rows = [row for row in rows if "ms" in row]
    by_size = {row["catalogue"]: row for row in rows}
    if 10**6 in by_size:
        print(f"at 10^6 items {by_size[10**6]['share_of_step']:.1%} of a step (bar {SHARE_BAR:.0%})")
    if len(rows) > 1:
        print(f"{rows[-1]['ms'] / rows[0]['ms']:.2f} times from {rows[0]['catalogue']:,} to {rows[-1]['catalogue']:,} items (bar {GROWTH_BAR})")  # fmt: skip


if __name__ == "__main__":
    main()
