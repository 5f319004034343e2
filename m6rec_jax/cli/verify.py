"""`m6rec verify`: are the files of a dataset, a run or lists still those that were written? Loads no model; arrays only when asked to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m6rec_jax.artifacts.manifest import MANIFEST, read_manifest, verify_files
from m6rec_jax.artifacts.run import RUN_FILE, read_run_file
from m6rec_jax.artifacts.schemas import CHECKPOINT, DATASET, TUNED
from m6rec_jax.decoding.parts import listed_files
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note, stage
from m6rec_jax.settings import Parser

CHECKPOINTS = "checkpoints"


def verify(argv: list[str]) -> None:
    """Compare every file with its digest; print each problem, and end with InputError if there is one."""
    parser = Parser(
        prog="m6rec verify",
        usage="m6rec verify FOLDER [--arrays]",
        description="Check the files of a dataset, run, checkpoint or tuned task, or the lists of `m6rec generate`, against the digests\n"
        "written with them.\n\n"
        "example:\n  m6rec verify runs/ml-100k",
    )
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="a dataset, a run, one checkpoint of a run, what `m6rec tune` wrote, or the folder with the manifest of lists (X.parquet.parts)",
    )
    parser.add_argument(
        "--arrays",
        action="store_true",
        help="also load every array of every checkpoint and compare its digest: finds what was wrong before the files were\nwritten, and takes the memory of the largest part of one",
    )
    options = parser.parse(argv)
    folder = Path(options.folder)
    listed = [(part, name, facts) for part, files in parts(folder) for name, facts in files.items()]
    problems: list[str] = []
    with stage("verify", sum(facts["bytes"] for *_, facts in listed) / 1e6, "MB") as bar:
        for part, name, facts in listed:
            problems += verify_files(part, {name: facts})
            bar.advance(facts["bytes"] / 1e6, problems=len(problems))
    counted = among = f"{len(listed)} files"
    if options.arrays and not problems:  # of damaged files nothing is loaded
        steps = [part for part, _ in parts(folder) if part.name.isdigit() and part.parent.name == CHECKPOINTS]
        if not steps:
            raise InputError(
                f"--arrays: {folder} holds no checkpoint; leave it out, or name a run or one of its checkpoints"
            )
        problems = _check_arrays(steps)
        among = f"the arrays of {len(steps)} checkpoints"
        counted += f" and {among}"
    if not problems:
        print(f"{folder}: {counted} are as they were written")
        return
    for line in problems:
        print(line)
    raise InputError(f"{problems[0]} ({len(problems)} wrong of {among}); take them from a copy or make {folder} again")


def _check_arrays(steps: list[Path]) -> list[str]:
    import jax

    jax.config.update("jax_platforms", "cpu")  # whoever trains beside this has the accelerators
    from m6rec_jax.artifacts.checkpoints import check_arrays

    problems: list[str] = []
    with stage("arrays", len(steps), "checkpoints") as bar:
        for step in steps:
            problems += check_arrays(step.parent.parent, int(step.name))
            bar.advance(1, problems=len(problems))
    return problems


def parts(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folders at or under `folder` that carry digests, with them; InputError when there is none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a dataset or a run")
    if (folder / RUN_FILE).is_file():
        yield folder, read_run_file(folder)["files"]
        steps = [path for path in (folder / CHECKPOINTS).glob("*") if path.name.isdigit() and path.is_dir()]
        for step in sorted(steps, key=lambda path: int(path.name)):
            if (step / MANIFEST).is_file():
                yield step, read_manifest(step, *CHECKPOINT)["files"]
            else:
                note(f"{step}: a save that was never finished; nothing reads it")
    elif (lists := listed_files(folder)) is not None:  # they may lie in a folder named by a date
        yield lists
    elif (folder / MANIFEST).is_file():
        other = CHECKPOINT if folder.name.isdigit() else TUNED if _is_tuned(folder) else DATASET
        yield folder, read_manifest(folder, *other)["files"]
    else:
        raise InputError(f"{folder}: neither a dataset ({MANIFEST}) nor a run ({RUN_FILE}); name the folder of one")


def _is_tuned(folder: Path) -> bool:
    """Whether the manifest says that a tuned task lies here; one that cannot be read is anybody's."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("schema") == TUNED.name
    except (ValueError, AttributeError):
        return False
