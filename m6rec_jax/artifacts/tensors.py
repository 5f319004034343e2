"""Arrays in .safetensors files, one or several with an index beside them, as Hugging Face lays them out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from m6rec_jax.progress import stage

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 4 << 30  # bytes in a file at most, unless one array alone is larger


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray], shard: int = SHARD) -> list[str]:
    """Write arrays into `folder` and return the names of the files: one, or as many as hold `shard` bytes each and an
    index that says which array lies where."""
    parts: list[dict[str, np.ndarray]] = [{}]
    filled = 0
    for name, x in tensors.items():
        if parts[-1] and filled + x.nbytes > shard:
            parts.append({})
            filled = 0
        parts[-1][name] = np.ascontiguousarray(x)
        filled += x.nbytes
    total = sum(x.nbytes for x in tensors.values())
    names = [FILE] if len(parts) == 1 else [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]  # fmt: skip
    with stage("write weights", total / 1e6, "MB") as bar:
        for name, part in zip(names, parts, strict=True):
            save_file(part, folder / name, metadata={"format": "pt"})  # transformers asks for this word
            bar.advance(sum(x.nbytes for x in part.values()) / 1e6)
    if len(parts) == 1:
        return names
    where = {array: name for name, part in zip(names, parts, strict=True) for array in part}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, INDEX]
