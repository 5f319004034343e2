"""Arrays in .safetensors files, one or several with an index beside them, as Hugging Face lays them out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from m6rec_jax.errors import InputError
from m6rec_jax.progress import stage

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 4 << 30  # bytes in a file at most, unless one array alone is larger
HEADER = 100_000_000  # bytes of a header at most, as the format has it
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


@dataclass(frozen=True)
class Stored:
    """An array in a .safetensors file, of which only the header was read. `start`: bytes into the file."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int

    def read(self) -> np.ndarray:
        """The numbers as they are stored, mapped from the file; `kind` must be one of FLOATS.

        Our own reader, because that of safetensors for NumPy knows no bfloat16.
        """
        return np.memmap(self.file, FLOATS[self.kind], "r", self.start, self.shape)


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray], shard: int = SHARD) -> list[str]:
    """Write arrays into `folder` and return the names of the files: one, or as many as hold `shard` bytes each and an
    index that says which array lies where."""
    from safetensors.numpy import save_file  # serving reads, and is installed without it

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


def open_tensors(folder: Path) -> dict[str, Stored]:
    """The arrays of `model.safetensors`, or of the files that its index names, by name.

    Raises InputError when there is neither, a file is missing, cut off or no .safetensors file, or lacks what the index
    says lies in it.
    """
    if (folder / FILE).is_file():
        return read_header(folder / FILE)
    index = folder / INDEX
    if not index.is_file():
        raise InputError(f"{folder}: no {FILE} and no {INDEX} in it")
    try:
        where = {str(name): folder / Path(str(file)).name for name, file in read_object(index)["weight_map"].items()}
    except (KeyError, AttributeError):
        raise InputError(f"{index}: no weight_map in it; fetch it again") from None
    parts = {file: read_header(file) for file in sorted(set(where.values()))}
    for name, file in where.items():
        if name not in parts[file]:
            raise InputError(f"{file}: no {name} in it, where {index.name} says it lies; fetch the folder again")
    return {name: parts[file][name] for name, file in where.items()}


def by_path(tree: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    """The arrays of a nested dict as `block.query` and so on."""
    made = []
    for name, value in tree.items():
        made += by_path(value, f"{path}{name}.") if isinstance(value, Mapping) else [(path + name, value)]
    return made


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict that `by_path` came from."""
    made: dict[str, Any] = {}
    for path, x in arrays.items():
        *folders, name = path.split(".")
        at = made
        for folder in folders:
            at = at.setdefault(folder, {})
        at[name] = x
    return made


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds; InputError when it is not there, or holds none."""
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; fetch the whole folder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); fetch it again") from None
    if not isinstance(body, dict):
        raise InputError(f"{file}: a JSON object is expected, {type(body).__name__} found; fetch it again")
    return body


def read_header(file: Path) -> dict[str, Stored]:
    """What the header of a file says, once it is known that the file is as long as it must be."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = opened.read(length) if length <= min(HEADER, size) else b""
        made, begin, end = {}, 8 + length, 8 + length
        for name, one in json.loads(header).items():
            if name == "__metadata__":
                continue
            shape, (first, last) = tuple(map(int, one["shape"])), map(int, one["data_offsets"])
            width = np.dtype(FLOATS[one["dtype"]]).itemsize if one["dtype"] in FLOATS else None
            if min(shape, default=0) < 0 or first < 0 or (width and last - first != width * prod(shape)):
                raise ValueError(f"{name} of {list(shape)} lies in {last - first} bytes")
            made[name] = Stored(file, str(one["dtype"]), shape, begin + first)
            end = max(end, begin + last)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; fetch the whole folder") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not readable as safetensors ({type(error).__name__}: {error}); fetch it again") from None  # fmt: skip
    if size < end:
        raise InputError(f"{file}: {size:,} bytes, and its header speaks of {end:,}: cut off; fetch it again")
    return made
