"""The small model as a file: what pruning and int8 cost in AUC, by the runner that needs NumPy alone, and bytes on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.clicks.quick import compared
from m6rec_jax.artifacts.checkpoints import load_params
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.data.instances.read import Instances
from m6rec_jax.edge import runner
from m6rec_jax.edge.file import pack
from m6rec_jax.model.load import Blueprint
from m6rec_jax.progress import note
from m6rec_jax.recommend.edge import tensors
from m6rec_jax.recommend.export import export

BASE = "dense float32"
KEPT = ("model", "vocab", "slices", "options", "domains")


def files(dense: Path, sparse: Path, folder: Path) -> dict[str, Path]:
    """Both runs as int8, as `m6rec export --format edge` writes them, and the same numbers as float32."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for name, run in (("dense", dense), ("80 % sparse", sparse)):
        made[f"{name} float32"], made[f"{name} int8"] = (
            folder / f"{name[:2]}-{kind}.m6e" for kind in ("float32", "int8")
        )
        small = made[f"{name} int8"]
        small.unlink(missing_ok=True)
        export(run, small, "edge", step="latest")
        loaded, record = runner.load(small), read_run(run)
        blueprint = Blueprint(record.config.model, record.vocab, record.content_width, record.more_widths)
        params = jax.device_get(load_params(run, "latest", blueprint.shapes())[1])
        plain = {key: one._replace(summed=None) for key, one in tensors(blueprint, params, []).items()}
        made[f"{name} float32"].write_bytes(pack({key: loaded.header[key] for key in KEPT}, plain, loaded.tokenizer))
    return made


def rows(made: Mapping[str, Path], split: str, instances: Instances, room: int) -> list[dict[str, Any]]:
    """A row a file: bytes, how many numbers are not zero, the AUC of a split, beside that of dense float32."""
    found, scores = {}, {}
    for name, path in made.items():
        model, spent = runner.load(path), 0.0
        scores[name] = np.zeros(len(instances))
        for at, one in enumerate(instances.laid_out(room)):
            start = time.perf_counter()
            scores[name][at] = model.score(one.source, instances.option_task, one.source_rows)[1]
            spent += time.perf_counter() - start
        found[name] = {
            "system": f"edge, {name}", "split": split, "bytes": path.stat().st_size,
            "tokenizer_bytes": len(model.tokenizer), "numbers": sum(x.size for x in model.weights.values()),
            "nonzero": sum(int(np.count_nonzero(x)) for x in model.weights.values()),
            "mean_ms": 1e3 * spent / len(instances),
        }  # fmt: skip
        note(f"edge, {name}: {found[name]['bytes']:,} bytes, {found[name]['mean_ms']:.1f} ms a request")
    told = compared(instances.labels, scores, BASE)
    return [{**found[name], **told[name]} for name in made]
