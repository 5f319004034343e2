"""Manifests: schema and version, the facts of an artefact, and a digest of every file in it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from m6rec_jax.artifacts.atomic import write_json
from m6rec_jax.errors import InputError

MANIFEST = "manifest.json"
SEAL = "seal"  # the digest of all else that a manifest says


def file_digest(path: Path | str) -> str:
    """xxh3-128 of a file's bytes, in hex."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path, schema: str, version: int, body: dict[str, Any], files: Iterable[Path]) -> None:
    """Digest `files` (inside `folder`) and write `manifest.json` last, atomically: from then on the folder is good."""
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "xxh3": file_digest(path)}
        for path in sorted(files)
    }
    said = {"schema": schema, "version": version, **body, "files": listed}
    write_json(folder / MANIFEST, said | {SEAL: _seal(said)})


def read_manifest(folder: Path, schema: str, version: int, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a folder, or another of its files that is one.

    Raises InputError when there is none, when it is of another kind, or of a newer version.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise InputError(f"{folder}: no {name} in it, so this is not a finished {schema}; name its folder or make it")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error}); make the {schema} again") from None
    if manifest.get("schema") != schema:
        raise InputError(f"{path}: a {manifest.get('schema')!r} where a {schema!r} is needed; name a {schema} folder")
    if manifest.get("version") != version:
        raise InputError(
            f"{path}: {schema} version {manifest.get('version')}, this program reads {version}; make it again"
        )
    if SEAL in manifest and manifest[SEAL] != _seal({name: x for name, x in manifest.items() if name != SEAL}):
        raise InputError(f"{path}: not as it was written (its seal differs); take it from a copy or make the {schema} again")  # fmt: skip
    return manifest


def _seal(said: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(said, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def verify_files(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """One line for every listed file that is missing, of another size, or of another digest."""
    problems = []
    for name, facts in files.items():
        path = Path(folder) / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != facts["bytes"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, {facts['bytes']} were written")
        elif file_digest(path) != facts["xxh3"]:
            problems.append(f"{path}: its bytes are not those that were written (xxh3 differs)")
    return problems
