"""M6-Edge on one core: bytes on disk, seconds to load and milliseconds a request, dense and pruned, beside JAX.

    python -m benchmarks.edge [--tokens 64 128] [--repeats 9]

The preset `edge-pruned` with 16,000 pieces and 4,000 items, random weights (the worst case on disk: their values have no
pattern), no tokenizer in the file. A request is a causal sequence and the logits over all items after it. All runners
take turns in one process on one core, with one thread each. Writes benchmarks/results/edge.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PIECES, ITEMS = 16_000, 4_000
ONE = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
CHILD = "M6REC_EDGE_BENCHMARK"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    if CHILD not in os.environ:  # numpy and jax count cores and threads once, when they are imported
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        env = os.environ | ONE | {CHILD: "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        sys.exit(
            subprocess.run([sys.executable, "-m", "benchmarks.edge", *sys.argv[1:]], env=env, check=False).returncode
        )
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from benchmarks.record import write_results

    with tempfile.TemporaryDirectory() as folder:
        rows = measured(Path(folder), options.tokens, options.repeats)
    print(f"wrote {write_results('edge', rows)}")


def measured(folder: Path, lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    """A row a kind of file or runner."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from m6rec_jax.artifacts.tensors import by_path, nested
    from m6rec_jax.config import ModelConfig
    from m6rec_jax.edge import runner
    from m6rec_jax.edge.file import pack
    from m6rec_jax.model.items import item_table
    from m6rec_jax.model.load import Blueprint
    from m6rec_jax.recommend.edge import tensors, write_edge
    from m6rec_jax.settings import load_config
    from m6rec_jax.training.prune import advanced, fresh, masked
    from m6rec_jax.vocab import Vocab

    config = load_config(["edge-pruned"])
    model = ModelConfig(**vars(config.model) | {"dtype": "float32", "remat": "none"})
    blueprint, rng = Blueprint(model, Vocab(PIECES, (ITEMS,)), 1), np.random.default_rng(0)
    std = {name: float(np.std(x)) for name, x in by_path(blueprint.init(0))}
    dense = nested({name: rng.normal(0, std[name], x.shape).astype(np.float32) for name, x in by_path(blueprint.shapes())})  # fmt: skip

    params = jax.tree.map(jnp.asarray, dense)
    masks = fresh(config.prune, params)
    assert masks is not None
    pruned = jax.device_get(masked(advanced(config.prune, masks, params, jnp.int32(config.prune.end)).kept, params))
    write_edge(folder / "int8", blueprint, dense, [], b"", {})
    write_edge(folder / "pruned", blueprint, pruned, [], b"", {})
    header = runner.load(folder / "int8").header
    plain = {name: t._replace(summed=None) for name, t in tensors(blueprint, dense, []).items()}
    kept = ("model", "vocab", "slices", "options", "domains")
    (folder / "float32").write_bytes(pack({name: header[name] for name in kept}, plain, b""))

    rows, asks = [], {}
    for name, said in (("float32", "dense float32"), ("int8", "dense int8"), ("pruned", "80 % sparse int8")):
        start = time.perf_counter()
        file = runner.load(folder / name)
        loaded = time.perf_counter() - start
        asks[f"NumPy, {said}"] = lambda tokens, file=file: file.next_item(tokens)
        told = {"parameters": file.header["numbers"], "nonzero": file.header["nonzero"]}
        rows.append({"runner": f"NumPy, {said}", "bytes": (folder / name).stat().st_size, "load_seconds": round(loaded, 3), **told})  # fmt: skip

    items = jax.tree.map(jnp.asarray, item_table(np.zeros((ITEMS, 1)), np.ones(ITEMS, bool)))

    @jax.jit
    def jitted(params: Any, tokens: Any, lengths: Any) -> Any:
        bound = blueprint.bind(params)
        hidden, _ = bound.prefill(tokens, jnp.full(tokens.shape, -1), lengths, items)
        return bound.logits(hidden, 1, items)

    asks["JAX, dense float32"] = lambda tokens: np.asarray(jitted(params, tokens[None], np.array([len(tokens)])))[
        0, :ITEMS
    ]
    rows.append({"runner": "JAX, dense float32", "parameters": blueprint.parameters()})
    for T in lengths:
        tokens = np.concatenate([[2], rng.integers(300, PIECES, T - 1)]).astype(np.int32)
        answers = {name: ask(tokens) for name, ask in asks.items()}  # compiled, and warm
        off = np.abs(answers["NumPy, dense float32"] - answers["JAX, dense float32"]).max()
        took: dict[str, list[float]] = {name: [] for name in asks}
        for _ in range(repeats):
            for name, ask in asks.items():
                start = time.perf_counter()
                ask(tokens)
                took[name].append(time.perf_counter() - start)
        for row in rows:
            times = 1000 * np.array(took[row["runner"]])
            row[f"ms_{T}_tokens"] = {"median": round(float(np.median(times)), 1), "least": round(float(times.min()), 1)}
            print(f"{row['runner']:28} {T:4} tokens: {np.median(times):8.1f} ms (least {times.min():.1f})")
        rows[0].setdefault("off_jax", {})[str(T)] = float(off)
    for row in rows:
        print({name: x for name, x in row.items() if not name.startswith("ms_")})
    return rows


if __name__ == "__main__":
    main()
