"""Apache Beam, and nothing else of this project: two ways to hand tasks to workers.

Tasks are small values, results small ones too; tables go by files in a folder that every worker and the launcher see
under the same path. A task may run twice (runners repeat what failed): it writes beside and renames, so that is safe.
"""

from __future__ import annotations

import io
import os
import shlex
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import polars as pl

from m6rec_jax.errors import InputError


@dataclass(frozen=True)
class Workers:
    """Where tasks run: `options` as on a Beam command line (empty: the embedded runner), `work` the shared folder."""

    work: Path
    options: str = ""

    def each(self, name: str, function: Callable[[Any], Any], tasks: Sequence[Any]) -> list[Any]:
        """`function` of every task, somewhere; what each returned, in the order of the tasks."""
        import apache_beam as beam

        kept = self.work / name
        kept.mkdir()
        with self._pipeline(name) as pipeline:
            _ = (
                pipeline
                | beam.Create(list(enumerate(tasks)))
                | beam.Reshuffle()
                | beam.Map(partial(_kept, function, kept))
            )
        return [_result(kept / f"{i}.msgpack") for i in range(len(tasks))]

    def exchange(
        self,
        name: str,
        part: Callable[[Any], Iterator[tuple[int, pl.DataFrame]]],
        tasks: Sequence[Any],
        gather: Callable[[int, pl.DataFrame], Any],
    ) -> dict[int, Any]:
        """`part` cuts each task's rows by number; `gather` gets all rows of a number, in any order. Results by number."""
        import apache_beam as beam

        kept = self.work / name
        kept.mkdir()
        with self._pipeline(name) as pipeline:
            _ = (
                pipeline
                | beam.Create(list(tasks))
                | beam.Reshuffle()
                | beam.FlatMap(partial(_cut, part))
                | beam.GroupByKey()
                | beam.Map(partial(_gathered, gather, kept))
            )
        return {int(path.stem): _result(path) for path in sorted(kept.glob("*.msgpack"), key=lambda p: int(p.stem))}

    def _pipeline(self, name: str) -> Any:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        if self.options:
            return beam.Pipeline(options=PipelineOptions([*shlex.split(self.options), f"--job_name=m6rec-{name}"]))
        from apache_beam.runners.portability.fn_api_runner import FnApiRunner

        return beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([]))


def check_beam() -> None:
    """Raise InputError naming the way out when apache-beam is not installed."""
    try:
        import apache_beam  # noqa: F401
    except ImportError:
        raise InputError("--runner beam: apache-beam is not installed here; make install-beam, then .venv-beam/bin/m6rec prepare ...") from None  # fmt: skip


def write_frame(frame: pl.DataFrame, path: Path) -> None:
    """Parquet, beside and renamed, by however many workers at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with_own_name(path, frame.write_parquet)


def with_own_name(path: Path, write: Callable[[Path], Any]) -> None:
    """`write` to a name that no other worker has, then rename to `path`."""
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    write(own)
    os.replace(own, path)


def _kept(function: Callable[[Any], Any], kept: Path, task: tuple[int, Any]) -> None:
    _keep(kept / f"{task[0]}.msgpack", lambda: function(task[1]))


def _gathered(gather: Callable[[int, pl.DataFrame], Any], kept: Path, rows: tuple[int, Iterable[bytes]]) -> None:
    number, parts = rows
    frame = pl.concat([pl.read_ipc_stream(part) for part in parts])
    _keep(kept / f"{number}.msgpack", lambda: gather(number, frame))


def _cut(part: Callable[[Any], Iterator[tuple[int, pl.DataFrame]]], task: Any) -> Iterator[tuple[int, bytes]]:
    for number, frame in part(task):
        yield number, frame.write_ipc_stream(None).getvalue()


def _keep(path: Path, make: Callable[[], Any]) -> None:
    """What was made, or why it cannot be: the launcher raises it. As data: what lies in a shared folder runs nothing."""
    try:
        said = {"made": make()}
    except InputError as error:
        said = {"refused": str(error)}
    with_own_name(path, lambda own: own.write_bytes(msgpack.packb(said, default=_array)))


def _result(path: Path) -> Any:
    said = msgpack.unpackb(path.read_bytes(), ext_hook=_of_array, strict_map_key=False)
    if "refused" in said:
        raise InputError(said["refused"])
    return said["made"]


def _array(x: Any) -> Any:
    if isinstance(x, np.generic):
        return x.item()
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{type(x).__name__}: results are numbers, texts, arrays, lists and dicts of these")
    held = io.BytesIO()
    np.save(held, x, allow_pickle=False)
    return msgpack.ExtType(1, held.getvalue())


def _of_array(_: int, data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)
