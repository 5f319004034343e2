"""The run folder's `run.json`: what was trained, on what, by which code. Written first, read by every later verb."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import m6rec_jax
from m6rec_jax.artifacts.atomic import write_json
from m6rec_jax.artifacts.manifest import file_digest
from m6rec_jax.artifacts.schemas import RUN
from m6rec_jax.config import Config
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import Vocab

RUN_FILE = "run.json"
# Files of a run that never change after its first minute; their digests stand in run.json.
STATIC_FILES = ("config.yaml",)  # of the run as a whole
DOMAIN_FILES = ("tokenizer.model", "items.parquet", "codes.npz", "transitions.npz")  # of each domain, see `Run.folder`
LAYOUT = "causal"  # how the trained model reads a history: each token sees those before it
SUMMARY = ("name", "sizes", "split", "levels", "timed", "repeat", "kinds", "vocab", "tasks", "version")


@dataclass(frozen=True)
class TrainedOn:
    """What a run remembers of one of its datasets: where it lay, its digest, and its manifest in short."""

    path: str
    digest: str
    summary: dict[str, Any]

    @classmethod
    def of(cls, path: Path | str, digest: str, manifest: Mapping[str, Any]) -> TrainedOn:
        return cls(str(path), digest, {key: manifest[key] for key in SUMMARY if key in manifest})

    @property
    def name(self) -> str:
        return str(self.summary["name"])


@dataclass(frozen=True)
class Taught:
    """Of a run that was distilled: its teacher's run, the step, and a digest of the parameters there."""

    run: str
    step: int
    digest: str


@dataclass(frozen=True)
class Run:
    """A run folder: its configuration, its id space, the width of content vectors, its data, its code.

    Of several datasets (domains) all are named, with the widths of the further ones' content and the weight of each.
    `tokenizer` is the digest of tokenizer.model; a later dataset must have the same one. `layout` is what is served:
    the one among the trained layouts that recommends.
    """

    path: Path
    config: Config
    vocab: Vocab
    content_width: int
    datasets: tuple[TrainedOn, ...]
    tokenizer: str
    code: str
    layout: str = LAYOUT
    more_widths: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    teacher: Taught | None = None

    @property
    def names(self) -> list[str]:
        """The domains by name."""
        return [one.name for one in self.datasets]

    def tasks(self, domain: int = 0) -> list[dict[str, Any]]:
        """The tasks of a domain's own, as its manifest tells them."""
        return self.datasets[domain].summary.get("tasks", [])

    def option_tasks(self, domain: int = 0) -> slice:
        """Which of the tasks with options, in the order of `vocab.options`, are a domain's."""
        return option_spans([self.tasks(i) for i in range(len(self.datasets))])[domain]

    def folder(self, domain: int = 0) -> Path:
        """Where the run keeps the items, codes, transitions and gate of a domain: the first's lie in the run itself."""
        return domain_folder(self.path, self.names[domain], domain)


def option_spans(tasks: Sequence[Sequence[Mapping[str, Any]]]) -> list[slice]:
    """Of each dataset's tasks, as manifests tell them, where those with options stand among all that have some."""
    ends = np.cumsum([0, *(sum(bool(task["options"]) for task in own) for own in tasks)])
    return [slice(int(a), int(b)) for a, b in pairwise(ends)]


def domain_folder(run: Path, name: str, number: int) -> Path:
    """Where a run keeps what is a domain's own: that of the first, which may be the only one, in the run itself."""
    return run / "domains" / folder_name(name) if number else run


def folder_name(name: str) -> str:
    """The name of a domain as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "domain"


def write_run(run: Run) -> None:
    """Atomically write `run.json`, with digests of those files that never change and lie in the folder already."""
    folders = [run.folder(i) for i in range(len(run.datasets))]
    static = [run.path / name for name in STATIC_FILES] + [f / name for f in folders for name in DOMAIN_FILES]
    several = {"more_widths": list(run.more_widths), "weights": list(run.weights)} if run.more_widths else {}
    body = {
        "schema": RUN.name,
        "version": RUN.version,
        "config": run.config.as_dict(),
        "vocab": run.vocab.as_dict(),
        "content_width": run.content_width,
        "datasets": [asdict(one) for one in run.datasets],
        "tokenizer": run.tokenizer,
        "code": run.code,
        "layout": run.layout,
        **several,
        **({"teacher": asdict(run.teacher)} if run.teacher else {}),
        "files": {
            p.relative_to(run.path).as_posix(): {"bytes": p.stat().st_size, "xxh3": file_digest(p)}
            for p in static
            if p.is_file()
        },
    }
    write_json(run.path / RUN_FILE, body)


def read_run_file(path: Path | str) -> dict[str, Any]:
    """The JSON of `run.json`; InputError when the folder is no run, or one of another version."""
    file = Path(path) / RUN_FILE
    if not Path(path).is_dir():
        raise InputError(f"{path}: no such folder; --run names the folder that `m6rec train` writes")
    if not file.is_file():
        raise InputError(f"{path}: no {RUN_FILE} in it, so this is not a run; name the folder that `m6rec train` wrote")
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not readable as JSON ({error}); take it from a copy, or train again") from None
    if not isinstance(body, dict) or (body.get("schema"), body.get("version")) != RUN:
        found = f"{body.get('schema')!r} version {body.get('version')!r}" if isinstance(body, dict) else "no object"
        raise InputError(f"{file}: holds {found}, this program reads {RUN.name!r} version {RUN.version}; train again")
    return body


def read_run(path: Path | str) -> Run:
    """The run at `path`; InputError (one line) when it is none, or its record is damaged."""
    body = read_run_file(path)
    file = Path(path) / RUN_FILE
    layout = body.get("layout", LAYOUT)  # runs of before the field have no other
    if layout != LAYOUT:
        raise InputError(f"{file}: layout={layout!r}, and this program serves {LAYOUT!r}; serve it with the code that wrote it, {body.get('code')}")  # fmt: skip
    try:
        return Run(
            Path(path),
            Config.from_dict(body["config"]),
            Vocab.from_dict(body["vocab"]),
            int(body["content_width"]),
            tuple(TrainedOn(**one) for one in body["datasets"]),
            str(body["tokenizer"]),
            str(body["code"]),
            layout,
            tuple(int(n) for n in body.get("more_widths", ())),
            tuple(float(n) for n in body.get("weights", ())),
            Taught(**body["teacher"]) if "teacher" in body else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: damaged ({type(error).__name__}: {error}); take it from a copy, or train again") from None  # fmt: skip
    except InputError as error:
        raise InputError(f"{file}: {error}; this run was written by {body.get('code', 'other code')}") from None


def code_version() -> str:
    """Version of this package, with the commit where it runs from a checkout."""
    root = Path(m6rec_jax.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return m6rec_jax.__version__
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return m6rec_jax.__version__
    return f"{m6rec_jax.__version__}+{done.stdout.strip()}" if done.returncode == 0 else m6rec_jax.__version__
