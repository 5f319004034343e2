"""Lists for any number of users as Parquet, in parts that survive a kill, by one process or many.

Part n holds the lists of users n * chunk .. (n + 1) * chunk; it is renamed into place when whole and entered in a
manifest with its digest (`parts`). A rerun makes only the parts that are missing or not as they were written, so what
comes out has the same bytes however often it was stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from m6rec_jax.decoding.parts import Parts, Settle
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note, stage

User = TypeVar("User")

COLUMNS = {
    "user_id": pl.String, "item_id": pl.String, "rank": pl.Int32, "score": pl.Float64,
    "source": pl.String, "route": pl.String, "reason": pl.String, "model_version": pl.String,
}  # fmt: skip
CHUNK = 4096  # users of a part: what a kill can cost, and what is held at a time
ROW_GROUP = 1 << 17


def is_folder(out: Path | str) -> bool:
    """Whether lists go to a folder of parts: a name that ends in a slash, or a folder that is there."""
    return str(out).endswith(("/", os.sep)) or Path(out).is_dir()


def generate(
    recommend: Callable[[list[User]], pl.DataFrame],
    users: Iterable[User],
    out: Path | str,
    *,
    job: Mapping[str, Any],
    settle: Settle = lambda kept: {},
    total: int | None = None,
    chunk: int = CHUNK,
    shard: int = 0,
    shards: int = 1,
    columns: Mapping[str, pl.DataType | type[pl.DataType]] = COLUMNS,
    unit: str = "users",
) -> int:
    """Write `recommend(users)` for all users, `chunk` at a time; returns the lines of all, or of a shard alone.

    `recommend` gives the `columns`, users in their order; `unit` is what they are called while they go by. `out` is one file, its parts under
    `out.parts/` until it is whole; or, where `is_folder`, a folder that keeps them. Either holds a `manifest.json`: job, parts
    with rows, bytes and xxh3, `finished`, and `file` where there is one. `job` says in JSON what the answers depend on
    (model version, k, which users): inputs alone, the same on every machine. What is computed from them and may come
    out otherwise elsewhere is for `settle`: see `Parts.open`; it is called before the first part. Of `shards` processes
    each makes every `shards`-th part, from `shard` on; who makes the last one finishes. Raises InputError when the
    parts that are there belong to another job, another process makes the same ones, or there is no room; ValueError
    when a column is missing.
    """
    if not 0 <= shard < shards:
        raise InputError(f"shard={shard} of shards={shards}: shards are counted from 0 to {shards - 1}")
    if chunk < 1:
        raise InputError(f"chunk={chunk}: must be above 0")
    place = Path(out)
    folder, file = (place, None) if is_folder(out) else (place.with_name(f"{place.name}.parts"), place)
    parts = Parts(folder, json.loads(json.dumps({"chunk": chunk, **job})), file, shard, shards)
    if (lines := parts.finished()) is not None:
        note(f"{out}: finished before, for the same job")
        return lines
    parts.check()
    with parts.working():
        if (lines := parts.open(settle)) is not None:  # by others, since it was asked above
            note(f"{out}: finished before, for the same job")
            return lines
        own = (
            None if total is None else sum(min(chunk, total - at) for at in range(shard * chunk, total, shards * chunk))
        )
        done = chunk * len(parts.made)
        if total is not None and parts.name((total - 1) // chunk) in parts.made:
            done -= -total % chunk  # the last part is a short one
        count = 0
        with stage("generate", own, unit, done=done) as bar:
            for count, some in enumerate(_chunks(users, chunk), 1):
                if parts.mine(count - 1) and parts.name(count - 1) not in parts.made:
                    parts.write(count - 1, _checked(recommend(some), columns))
                    bar.advance(len(some))
        lines = parts.finish(count, lambda made, file: _join(made, file, columns))
    if lines is None:
        return sum(facts["rows"] for facts in parts.made.values())
    note(f"wrote {out}: {lines:,} lines")
    return lines


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
    whole = pl.scan_parquet(parts, glob=False) if parts else pl.LazyFrame(schema=columns)
    whole.sink_parquet(out, row_group_size=ROW_GROUP, maintain_order=True)
