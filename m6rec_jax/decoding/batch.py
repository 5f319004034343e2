"""Lists for any number of users as one Parquet file, in parts that survive a kill.

Part n holds the lists of users n * chunk .. (n + 1) * chunk and is renamed into place when whole. A rerun makes only
the parts that are missing, then all are joined in order, so the file has the same bytes however often it was stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from m6rec_jax.artifacts.atomic import atomic_path, write_json
from m6rec_jax.artifacts.manifest import MANIFEST, write_manifest
from m6rec_jax.errors import InputError
from m6rec_jax.progress import stage

User = TypeVar("User")

COLUMNS = {
    "user_id": pl.String, "item_id": pl.String, "rank": pl.Int32, "score": pl.Float64,
    "source": pl.String, "route": pl.String, "reason": pl.String, "model_version": pl.String,
}  # fmt: skip
JOB = "job.json"
ROW_GROUP = 1 << 17


def generate(
    recommend: Callable[[list[User]], pl.DataFrame],
    users: Iterable[User],
    out: Path | str,
    *,
    job: Mapping[str, Any],
    total: int | None = None,
    chunk: int = 4096,
) -> int:
    """Write `recommend(users)` for all users to `out`, `chunk` users at a time; returns the number of lines.

    `recommend` gives the columns of `COLUMNS`, users in their order. `job` says in JSON what the answers depend on
    (model version, k, which users); the parts under `out.parts/` are used again only for the same job. Raises
    InputError when they belong to another one, ValueError when a column is missing.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out}: is a folder; name the Parquet file to write")
    folder = out.with_name(out.name + ".parts")
    _claim(folder, {"chunk": chunk, **job})
    parts: list[Path] = []
    done = min(chunk * len(list(folder.glob("part-*.parquet"))), chunk * 10**9 if total is None else total)
    with stage("generate", total, "users", done=done) as bar:
        for number, some in enumerate(_chunks(users, chunk)):
            parts.append(folder / f"part-{number:06}.parquet")
            if not parts[-1].is_file():
                table = _checked(recommend(some))
                with atomic_path(parts[-1]) as path:
                    table.write_parquet(path)
                bar.advance(len(some))
    lines = int(pl.scan_parquet(parts).select(pl.len()).collect().item()) if parts else 0
    if not (folder / MANIFEST).is_file() or not out.is_file():
        _join(parts, out)
        write_manifest(folder, "parts", 1, {"lines": lines}, [folder / JOB, *parts])
    return lines


def _claim(folder: Path, job: dict[str, Any]) -> None:
    """Make the folder of this job's parts; InputError when it holds those of another."""
    file = folder / JOB
    wanted = json.loads(json.dumps(job))
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        for key in sorted({*wanted, *found}):
            if wanted.get(key) != found.get(key):
                raise InputError(
                    f"{folder}: parts of another job ({key} was {found.get(key)}, is {wanted.get(key)}); "
                    "delete the folder, or write to another file"
                )
    else:
        write_json(file, wanted)


def _chunks(users: Iterable[User], size: int) -> Iterator[list[User]]:
    rest = iter(users)
    while some := list(islice(rest, size)):
        yield some


def _checked(table: pl.DataFrame) -> pl.DataFrame:
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise ValueError(f"recommend gave no column {', '.join(missing)}; it must give {', '.join(COLUMNS)}")
    return table.select(pl.col(name).cast(kind) for name, kind in COLUMNS.items())


def _join(parts: Sequence[Path], out: Path) -> None:
    """All parts, in order, in one file, streamed; row groups of one size, so that bytes do not depend on timing."""
    whole = pl.scan_parquet(parts) if parts else pl.LazyFrame(schema=COLUMNS)
    with atomic_path(out) as path:
        whole.sink_parquet(path, row_group_size=ROW_GROUP, maintain_order=True)
