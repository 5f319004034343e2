"""The parts of a batch job in a folder, and the manifests that say which of them are whole.

A process enters each part it has made, with its digest, in a manifest of its own, `manifest-I-of-N.json`. When all parts
are there, `manifest.json` lists them all and the others go. So no two processes write one file, what is finished stays so,
and a job may be taken up by another number of processes.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import polars as pl

from m6rec_jax.artifacts.atomic import PARTIAL, atomic_path, remove, write_json
from m6rec_jax.artifacts.manifest import MANIFEST, file_digest, read_manifest, verify_files
from m6rec_jax.artifacts.schemas import LISTS
from m6rec_jax.errors import InputError, mendable
from m6rec_jax.progress import note

Facts = dict[str, Any]  # of a file: rows, bytes, xxh3
Settle = Callable[[Facts | None], Facts]
OLD = "job.json"  # what versions before manifests left in the folder


class Parts:
    """The parts of `job` in `folder`, as the process `shard` of `shards` makes them.

    `out` is the file that they become in the end; None: they stay. `made` are this process's own, by name; `settled`, what
    all processes of the job agree on.
    """

    def __init__(self, folder: Path, job: dict[str, Any], out: Path | None, shard: int, shards: int) -> None:
        self.folder, self.job, self.out, self.shard, self.shards = folder, job, out, shard, shards
        self.made: dict[str, Facts] = {}
        self.settled: Facts = {}

    @staticmethod
    def name(number: int) -> str:
        return f"part-{number:06}.parquet"

    def path(self, number: int) -> Path:
        return self.folder / self.name(number)

    def mine(self, number: int) -> bool:
        """Whether a part is this process's to make: round-robin."""
        return number % self.shards == self.shard

    def finished(self, say: bool = True) -> int | None:
        """Lines of the job when it was finished before and its bytes are still those; None when something is to do.

        Damage is said, or not.
        """
        found = self._read(MANIFEST)
        if found is None or not found["finished"] or found["job"] != self.job:
            return None
        problems = verify_files(*_files(self.folder, found))
        if problems:
            if say and self.out is not None:
                note(f"{problems[0]}; made again")
            return None
        others = [self._read(name) for name in self._others()]
        if all(other is None or other["job"] == self.job for other in others):
            self._tidy(found["parts"])  # what a kill between joining and tidying left
        return found["rows"]

    def check(self) -> None:
        """Raise InputError when the folder holds parts of an older version, or other things."""
        if (self.folder / OLD).is_file():
            raise InputError(f"{self.folder}: parts of an earlier version of m6rec ({OLD}); delete the folder, and they are made anew")  # fmt: skip
        there = sorted(path.name for path in self.folder.glob("[!.]*"))
        if self.out is None and there and not any(name.startswith("manifest") for name in there):
            raise InputError(f"{self.folder}: holds other things ({there[0]}); name a new or an empty folder, or a file to write")  # fmt: skip

    def open(self, settle: Settle) -> int | None:
        """Claim the folder and take up what is there of this process's parts; says what is not as it was written.

        The lines of all when the job has been finished meanwhile, else None.
        `settle(kept)` gives what all processes of the job agree on, in JSON: what the first of them settled (`kept`), or
        what this one finds when it is the first (None); the others wait for it. Raises InputError when the folder holds
        parts of another job.
        """
        with self.alone("finish", wait=True):  # whoever finishes removes what is looked for here
            if (rows := self.finished(say=False)) is not None:
                return rows
            self.made, wrong = self._whole(self.mine)
        if wrong:
            more = f", and {len(wrong) - 1:,} more like it" if len(wrong) > 1 else ""
            note(f"{next(iter(wrong.values()))}{more}; made again")
        with self.alone("settle", wait=True):
            manifests = (self._read(name) for name in [MANIFEST, *self._others()])
            kept = (
                found["settled"] for found in manifests if found and found["job"] == self.job and "settled" in found
            )
            self.settled = json.loads(json.dumps(settle(next(kept, None))))
            self._enter(self.folder / self._own, {"finished": False, **self._said(self.made)})
        for (
            name
        ) in self._others():  # where there are no locks: others who settled another thing are met now, not at the end
            self._agree(name, self._read(name))
        return None

    def write(self, number: int, table: pl.DataFrame) -> None:
        """Write a part, and enter it. Raises InputError when there is no room for it."""
        path = self.path(number)
        with self._room_for(path), atomic_path(path) as partial:
            table.write_parquet(partial)
            facts = _facts(partial, table.height)
        self._enter(self.folder / self._own, {"finished": False, **self._said(self.made | {path.name: facts})})
        self.made[path.name] = facts

    def finish(self, count: int, join: Callable[[Sequence[Path], Path], None]) -> int | None:
        """Join all `count` parts to `out` by `join(parts, file)` and tidy up, or list them as finished where they stay.

        Returns the lines of all; None while parts of other processes are missing. Whoever comes while another is at it
        waits for its end.
        """
        with self.alone("finish", wait=True):
            if (rows := self.finished()) is not None:
                return rows
            whole, wrong = self._whole(lambda number: number < count)
            for name, problem in wrong.items():
                again = f" of shard {_number(name) % self.shards}" if self.shards > 1 else ""
                raise InputError(f"{problem}; run the command{again} again, and it is made anew")
            if missing := sorted({self.name(number) for number in range(count)} - whole.keys()):
                note(f"{self.folder}: {len(missing):,} of {count:,} parts are still missing, the first of them {missing[0]}; whoever makes the last one finishes")  # fmt: skip
                return None
            body = self._said({name: whole[name] for name in sorted(whole, key=_number)})
            if self.out is not None:
                with self._room_for(self.out), atomic_path(self.out) as partial:
                    join([self.folder / name for name in sorted(whole, key=_number)], partial)
                    body["file"] = {"name": self.out.name, **_facts(partial, body["rows"])}
            self._enter(self.folder / MANIFEST, {"finished": True, **body})
            self._tidy(whole)
            return body["rows"]

    @contextmanager
    def working(self) -> Iterator[None]:
        """Be the one process with this number, among processes of this count only.

        Raises InputError while another does the same work, or while processes of another count are at work: they would
        make the same parts.
        """
        with self.alone(f"shard-{self.shard}-of-{self.shards}"):
            held = os.open(self.folder / ".shards.lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                with suppress(OSError):  # as in `alone`
                    with suppress(BlockingIOError):  # others are here: they have said how many
                        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        with suppress(OSError):  # no room for a number: the lock must not stay as it is
                            os.truncate(held, 0)
                            os.pwrite(held, str(self.shards).encode(), 0)
                    fcntl.flock(held, fcntl.LOCK_SH)
                    count = os.pread(held, 20, 0).decode()
                    if count and count != str(self.shards):
                        raise InputError(f"{self.folder}: shared by {count} processes, which are at work, and this is one of {self.shards}; wait for their end or stop them")  # fmt: skip
                yield
            finally:
                os.close(held)

    @contextmanager
    def alone(self, what: str, wait: bool = False) -> Iterator[None]:
        """Hold a lock of this folder, which ends with the process however it ends.

        When another holds it: wait for its end, or raise InputError that names it. Where the file system has no locks,
        there is none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        held = os.open(self.folder / f".{what}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with suppress(OSError):  # no locks here, or no room for a name
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    holder = os.read(held, 200).decode() or "another process"
                    raise InputError(f"{self.folder}: {holder} is at the same work; wait for its end or stop it") from None  # fmt: skip
                os.truncate(held, 0)
                os.write(held, f"process {os.getpid()} on {platform.node()}".encode())
            yield
        finally:
            os.close(held)

    @property
    def _own(self) -> str:
        return f"manifest-{self.shard}-of-{self.shards}.json"

    def _others(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("manifest-*.json"))

    def _read(self, name: str) -> Facts | None:
        """A manifest of the folder; None when it is not there (any more)."""
        try:
            return read_manifest(self.folder, *LISTS, name)
        except (InputError, FileNotFoundError):
            if (self.folder / name).is_file():
                raise
            return None

    def _whole(self, wanted: Callable[[int], bool]) -> tuple[dict[str, Facts], dict[str, str]]:
        """The wanted parts that some manifest has and that are as it says; and, by name, what is wrong with others.

        Raises InputError when a manifest is of another job, or of processes that settled other things (where there are
        no locks). A finished one, whose parts have become a file, has none.
        """
        whole: dict[str, Facts] = {}
        wrong: dict[str, str] = {}
        last = self._read(MANIFEST)
        # Of another job that became a file, a kill before it was tidied may have left manifests; they hold nothing.
        ended = last["job"] if last is not None and last["finished"] and last["job"] != self.job else None
        for name in [MANIFEST, *self._others()]:
            found = self._read(name)
            if found is None or (self.out is not None and (found["finished"] or found["job"] == ended)):
                continue
            for key in sorted({*self.job, *found["job"]}):
                if self.job.get(key) != found["job"].get(key):
                    raise InputError(
                        f"{self.folder}: parts of another job ({key} was {found['job'].get(key)}, is "
                        f"{self.job.get(key)}); delete the folder, or write to another place"
                    )
            self._agree(name, found)
            for part, facts in found["parts"].items():
                if part not in whole and wanted(_number(part)):
                    if problems := verify_files(self.folder, {part: facts}):
                        wrong[part] = problems[0]
                    else:
                        whole[part] = facts
        return whole, {part: problem for part, problem in sorted(wrong.items()) if part not in whole}

    def _agree(self, name: str, found: Facts | None) -> None:
        """Raise InputError when the process whose manifest this is settled something else."""
        if found is not None and self.settled and found.get("settled", self.settled) != self.settled:
            raise InputError(f"{self.folder}: processes that began at the same time do not agree ({name}: {', '.join(self.settled)} differ); delete the folder, and start one before the others")  # fmt: skip

    def _said(self, parts: dict[str, Facts]) -> dict[str, Any]:
        return {"rows": sum(facts["rows"] for facts in parts.values()), "parts": parts}

    def _enter(self, file: Path, body: dict[str, Any]) -> None:
        settled = {"settled": self.settled} if self.settled else {}
        with self._room_for(file):
            write_json(file, {"schema": LISTS.name, "version": LISTS.version, "job": self.job, **settled, **body})

    @contextmanager
    def _room_for(self, file: Path) -> Iterator[None]:
        """Say what is kept and how to go on when the system refuses to write `file`."""
        try:
            yield
        except (OSError, pl.exceptions.PolarsError) as error:
            if (found := mendable(error)) is None:
                raise
            refused, way_out = found
            raise InputError(
                f"{file}: {refused}; {len(self.made):,} finished parts are kept in {self.folder}; "
                f"{way_out}, then run the same command again, which goes on from there"
            ) from error

    def _tidy(self, parts: dict[str, Facts]) -> None:
        """Remove what a finished job needs no more: parts that became a file, other manifests, locks, torn files."""
        for name in [*(parts if self.out is not None else ()), *self._others()]:
            remove(self.folder / name)
        for left in (*self.folder.glob(f".part-*{PARTIAL}"), *self.folder.glob(f".manifest*{PARTIAL}"), *self.folder.glob(".*.lock")):  # fmt: skip
            remove(left)


def listed_files(folder: Path) -> tuple[Path, dict[str, Facts]] | None:
    """Where the files of a finished job lie, and their digests; None when the folder's manifest is of something else.

    Raises InputError when the job is not finished.
    """
    unfinished = InputError(f"{folder}: lists that are not finished; run the same `m6rec generate` again")
    if not (folder / MANIFEST).is_file() and any(folder.glob("manifest-*-of-*.json")):
        raise unfinished
    try:
        found = read_manifest(folder, *LISTS)
    except InputError:
        return None
    if not found["finished"]:  # of a version in which one process alone wrote it from the start
        raise unfinished
    return _files(folder, found)


def _files(folder: Path, found: Facts) -> tuple[Path, dict[str, Facts]]:
    """What a finished manifest answers for: the file beside its folder, or the parts in it."""
    file = found.get("file")
    return (folder, found["parts"]) if file is None else (folder.parent, {file["name"]: file})


def _facts(path: Path, rows: int) -> Facts:
    return {"rows": rows, "bytes": path.stat().st_size, "xxh3": file_digest(path)}


def _number(part: str) -> int:
    return int(part.removeprefix("part-").removesuffix(".parquet"))
