"""Lists for any number of users as one Parquet file, in parts that survive a kill.

Part n holds the lists of users n * chunk .. (n + 1) * chunk and is renamed into place when whole. A rerun makes only
the parts that are missing, then all are joined in order, so the file has the same bytes however often it was stopped.
Once joined, the parts go, and a small record beside the file says what it answers and what its bytes are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from m6rec_jax.artifacts.atomic import atomic_path, remove, write_json
from m6rec_jax.artifacts.manifest import file_digest
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note, stage

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
    extra: Mapping[str, pl.DataType] | None = None,
) -> int:
    """Write `recommend(users)` for all users to `out`, `chunk` users at a time; returns the number of lines.

    `recommend` gives the columns of `COLUMNS` and those of `extra`, users in their order. `job` says in JSON what the answers depend on
    (model version, k, which users); a file that `out.job.json` calls finished for the same job, and whose bytes are
    still those, stays as it is, and the parts of an interrupted job under `out.parts/` are used again. Raises
    InputError when these belong to another job, ValueError when a column is missing.
    """
    out, columns = Path(out), {**COLUMNS, **(extra or {})}
    if out.is_dir():
        raise InputError(f"{out}: is a folder; name the Parquet file to write")
    folder, record = out.with_name(f"{out.name}.parts"), out.with_name(f"{out.name}.{JOB}")
    wanted = json.loads(json.dumps({"chunk": chunk, **job}))
    finished = _read(record)
    if finished is not None and finished.get("job") == _read(folder / JOB):
        remove(folder)  # what a kill between joining and tidying left
    if finished is not None and finished.get("job") == wanted and out.is_file() and file_digest(out) == finished.get("xxh3"):  # fmt: skip
        note(f"{out}: finished before, for the same job")
        return finished["lines"]
    _claim(folder, wanted)
    parts: list[Path] = []
    done = min(chunk * len(list(folder.glob("part-*.parquet"))), chunk * 10**9 if total is None else total)
    with stage("generate", total, "users", done=done) as bar:
        for number, some in enumerate(_chunks(users, chunk)):
            parts.append(folder / f"part-{number:06}.parquet")
            if not parts[-1].is_file():
                table = _checked(recommend(some), columns)
                with atomic_path(parts[-1]) as path:
                    table.write_parquet(path)
                bar.advance(len(some))
    lines = int(pl.scan_parquet(parts).select(pl.len()).collect().item()) if parts else 0
    _join(parts, out, columns)
    write_json(record, {"job": wanted, "lines": lines, "bytes": out.stat().st_size, "xxh3": file_digest(out)})
    for part in parts:
        remove(part)
    remove(folder)  # its job file last, so that a kill in between leaves no parts without their job
    return lines


def _read(file: Path) -> dict[str, Any] | None:
    """A JSON object; None when the file is missing or holds something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _claim(folder: Path, wanted: dict[str, Any]) -> None:
    """Make the folder of this job's parts; InputError when it holds those of another."""
    file = folder / JOB
    if file.is_file():
        found = _read(file) or {}
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


def _checked(table: pl.DataFrame, columns: Mapping[str, Any]) -> pl.DataFrame:
    if missing := [name for name in columns if name not in table.columns]:
        raise ValueError(f"recommend gave no column {', '.join(missing)}; it must give {', '.join(columns)}")
    return table.select(pl.col(name).cast(kind) for name, kind in columns.items())


def _join(parts: Sequence[Path], out: Path, columns: Mapping[str, Any]) -> None:
    """All parts, in order, in one file, streamed; row groups of one size, so that bytes do not depend on timing."""
    whole = pl.scan_parquet(parts) if parts else pl.LazyFrame(schema=columns)
    with atomic_path(out) as path:
        whole.sink_parquet(path, row_group_size=ROW_GROUP, maintain_order=True)
