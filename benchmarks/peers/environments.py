"""Virtual environments for peers whose packages the project does not want, and scripts run in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.peers.task import Task
from m6rec_jax.artifacts.manifest import file_digest
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note

# What is pinned is what decides the numbers; the rest is what pip finds for the interpreter. lightfm itself has had no
# wheel since 2023: lightfm-next is the same code for Python from 3.12 on. torch brings its CUDA libraries along.
ENVIRONMENTS = {
    "lightfm": ("lightfm-next==1.19.0",),
    "rectools": ("rectools[torch]==0.19.0", "torch==2.13.0", "pytorch-lightning==2.5.2"),
}
SCRIPTS = Path(__file__).resolve().parent


def environment(name: str, packages: tuple[str, ...], folder: Path, python: str, lock: Path | None = None) -> Path:
    """The interpreter of the environment `folder/name` with these packages, made on first use by `python -m venv`.

    A `lock` names all of them with their hashes instead. Wheels only, so no code of a package runs while it is
    installed. Raises InputError when it cannot be made.
    """
    made = (folder / name).resolve()
    inside, ready = made / "bin" / "python", made / "ready.txt"
    key = packages if lock is None else (file_digest(lock),)  # a lock that changed makes the environment anew
    if lock is not None:
        packages = ("--no-deps", "--require-hashes", "--requirement", str(lock.resolve()))
    wanted = "\n".join((python, *key))
    if ready.is_file() and ready.read_text(encoding="utf-8") == wanted:
        return inside
    shutil.rmtree(made, ignore_errors=True)  # half-made, or of other packages
    note(f"making the environment {name}: {' '.join(packages)}")
    run(name, [python, "-m", "venv", str(made)])
    run(name, [str(inside), "-m", "pip", "install", "-qq", "--only-binary", ":all:", *packages])
    ready.write_text(wanted, encoding="utf-8")
    return inside


def run_script(script: str, task: Task, python: Path) -> tuple[np.ndarray, float]:
    """Lists int32 `[U,k]` and seconds of training of a peer's script, run by another environment's interpreter.

    Raises InputError with the script's last line when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:  # also where libraries drop their logs
        asked, answered = Path(folder) / "task.npz", Path(folder) / "answer.npz"
        task.save(asked)
        run(script, [str(python), str(SCRIPTS / script), str(asked), str(answered)], folder)
        with np.load(answered, allow_pickle=False) as file:
            return file["rows"], float(file["train"])


def run(what: str, command: list[str], folder: str | None = None) -> None:
    """Run a command without what points Python at this environment; InputError with its last words when it fails."""
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=outside, check=False)
    except OSError as error:
        raise InputError(f"{what}: {error}") from None
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")]  # pip's, among its advice
        raise InputError(f"{what}: {(errors or said or [f'exit {done.returncode}'])[-1]}")
