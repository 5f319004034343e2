"""The artefact of a tuned task: its few numbers, what they are for, and the digests of the backbone they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m6rec_jax.artifacts.atomic import atomic_path
from m6rec_jax.artifacts.content import content, digests
from m6rec_jax.artifacts.manifest import SEAL, read_manifest, verify_files, write_manifest
from m6rec_jax.artifacts.schemas import TUNED
from m6rec_jax.artifacts.tensors import by_path, nested, read_header
from m6rec_jax.errors import InputError

TENSORS = "tuned.safetensors"
BESIDE = ("config.yaml", "metrics.jsonl", "card.md")  # other files of an artefact


@dataclass(frozen=True)
class Artefact:
    """A tuned task as it lies on disk.

    `spec`: what was trained (`model.tuning.TuneSpec`); `task`: `name`, `options` by name (none of a text task) and what
    else is said of it; `backbone`: digest of each of its arrays, by path; `arrays`: nested dict of NumPy arrays.
    """

    path: Path
    spec: dict[str, Any]
    task: dict[str, Any]
    backbone: dict[str, str]
    metrics: dict[str, float]
    arrays: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.task["name"])

    @property
    def options(self) -> list[str]:
        return list(self.task["options"])

    def check_backbone(self, found: Mapping[str, str]) -> None:
        """Raise InputError unless these digests (`backbone_digests`) are those of the backbone it was tuned on."""
        if differ := sorted(p for p in {*found, *self.backbone} if found.get(p) != self.backbone.get(p)):
            raise InputError(f"{self.path}: tuned on another backbone: {len(differ)} of its {len(self.backbone)} arrays differ, {differ[0]} first; load it on the run and step it was tuned on, or tune again")  # fmt: skip

    def check_options(self, options: list[str]) -> None:
        """Raise InputError unless the task has these options, in this order."""
        if len(self.options) != len(options):
            raise InputError(f"{self.path}: tuned for {len(self.options)} options, and the task {self.name} has {len(options)}; tune again for this task")  # fmt: skip
        if self.options != options:
            old, new = next((a, b) for a, b in zip(self.options, options, strict=True) if a != b)
            raise InputError(f"{self.path}: its option {old!r} is {new!r} in the task {self.name}; tune again for this task")  # fmt: skip


def backbone_digests(params: Any) -> dict[str, str]:
    """The digest of each array of a backbone, float32 as its checkpoint has it, by path."""
    return digests(content(params))


def write_arrays(path: Path, arrays: Mapping[str, Any], about: Mapping[str, str] | None = None) -> None:
    """Write nested arrays as one .safetensors file, with words `about` them in its header."""
    from safetensors.numpy import save_file  # serving reads, and is installed without it

    save_file({name: np.asarray(x, order="C") for name, x in by_path(arrays)}, path, metadata=dict(about or {}))


def write_tuned(folder: Path, body: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write the arrays beside the `BESIDE` of `folder` and, last, the manifest; `body`: spec, task, backbone, metrics and
    more."""
    with atomic_path(folder / TENSORS) as path:
        write_arrays(path, arrays)
    write_manifest(folder, *TUNED, dict(body), [folder / name for name in (TENSORS, *BESIDE)])


def read_tuned(path: Path | str) -> Artefact:
    """The artefact in a folder. Raises InputError when it is none, or its bytes are not those that were written."""
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name one that `m6rec tune` wrote")
    body = read_manifest(folder, *TUNED)
    if SEAL not in body:
        raise InputError(f"{folder}: its manifest is not as it was written (it has no seal); tune again")
    if problems := verify_files(folder, body["files"]):
        raise InputError(f"{problems[0]}; take it from a copy or tune again")
    arrays = {name: np.array(one.read()) for name, one in read_header(folder / TENSORS).items()}
    return Artefact(folder, body["spec"], body["task"], body["backbone"]["arrays"], body["metrics"], nested(arrays))
