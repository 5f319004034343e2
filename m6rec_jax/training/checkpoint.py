"""Writing checkpoints, and taking a run up again.

The content of every array is digested on the devices before the step after may change it; a step is saved by Orbax in
the background, its files are digested, and only then gets its manifest, by rename: from that moment it is good. A crash
at any point leaves the last good step as it was.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from m6rec_jax.artifacts.atomic import remove
from m6rec_jax.artifacts.checkpoints import (
    FOLDER,
    best_step,
    check_content,
    check_shapes,
    check_step,
    manifest,
    step_folder,
    steps,
    tree_shapes,
)
from m6rec_jax.artifacts.content import content, digests
from m6rec_jax.artifacts.manifest import MANIFEST, write_manifest
from m6rec_jax.artifacts.schemas import CHECKPOINT
from m6rec_jax.config import CheckpointConfig
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.training.beside import Beside
from m6rec_jax.training.guards import Guard
from m6rec_jax.training.prune import Masks
from m6rec_jax.training.state import TrainState


class Position(NamedTuple):
    """Where in the plan a run stands: `rows` consumed, the `block` of the next row, and the rows before that block."""

    rows: int = 0
    block: int = 0
    block_start: int = 0


class CheckpointWriter:
    """Saves states of a run, one at a time in the background, and keeps the newest and the best."""

    def __init__(self, run: Path, config: CheckpointConfig):
        self.run, self.config = run, config
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if jax.process_index() == 0:
            sweep(run)

    def save(self, state: TrainState, position: Position, metrics: dict[str, float]) -> int:
        """Start saving; returns the step. The arrays are copied off before this returns, so the state may be donated.

        Raises InputError when this or the save before it failed, a full disk for one.
        """
        self.wait()
        step = int(state.step)
        folder = step_folder(self.run, step)
        if (folder / MANIFEST).is_file():
            return step
        if jax.process_index() == 0:
            remove(folder)
        parts = {"params": state.served, "optimizer": _rest(state), "data": position._asdict()}
        arrays = {name: parts[name] for name in ("params", "optimizer")}
        shapes = {name: tree_shapes(tree) for name, tree in arrays.items()}
        held = {name: content(tree) for name, tree in arrays.items()}  # dispatched here, read where the save ends
        body = {"step": step, "rows": position.rows, "metrics": metrics, "shapes": shapes}
        try:
            response = ocp.save_checkpointables_async(folder, parts)
        except Exception as error:
            raise self._failed(error) from error
        self._thread = threading.Thread(target=self._finish, args=(response, folder, body, held), daemon=True)
        self._thread.start()
        return step

    def wait(self) -> None:
        """Return once the save under way is good. Raises InputError when it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise self._failed(error) from error

    def _finish(self, response: Any, folder: Path, body: dict[str, Any], held: dict[str, Any]) -> None:
        try:
            response.result()
            body["content"] = {name: digests(sums) for name, sums in held.items()}
            if jax.process_index() == 0:
                files = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
                write_manifest(folder, *CHECKPOINT, body, files)
                self._drop_old()
        except BaseException as error:
            self._error = error

    def _drop_old(self) -> None:
        known = steps(self.run)
        for step in set(known[: -self.config.keep]) - {best_step(self.run)}:
            (step_folder(self.run, step) / MANIFEST).unlink()  # from here on it is no checkpoint any more
            shutil.rmtree(step_folder(self.run, step))

    def _failed(self, error: BaseException) -> InputError:
        good = steps(self.run)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return InputError(
            f"{self.run / FOLDER}: saving failed ({reason}); free disk space or check the folder, then run the same "
            f"command again: it resumes from {f'step {good[-1]}' if good else 'the start'}"
        )


def sweep(run: Path) -> None:
    """Remove what a crash left half-written: step folders without a manifest."""
    folder = run / FOLDER
    for path in folder.iterdir() if folder.is_dir() else []:
        if path.is_dir() and not (path / MANIFEST).is_file():
            note(f"{path}: half-written by an earlier run; removed")
            shutil.rmtree(path)


def unsaved(run: Path, step: int) -> str:
    """In words: step `step` ends a start and is not saved, and which one is; both as the disk has it."""
    good = steps(run)
    last = f"the last one saved is step {good[-1]}" if good else "none was saved yet"
    return f"step {step} is not saved, for it was skipped or its validation is not finite; {last}"


def disown(run: Path, step: int) -> None:
    """Take a step's manifest away, unless a validation found figures for its parameters: training went on from it, not one
    step counted, and whoever goes on from it comes to the same end. Called once no save is under way."""
    if step in steps(run) and not manifest(run, step)["metrics"]:
        (step_folder(run, step) / MANIFEST).unlink()
        note(f"checkpoint {step} is given up: no step after it counted, and no validation says that it is good")


def restore(run: Path, abstract: TrainState) -> tuple[TrainState, Position] | None:
    """`(state, position in the plan)` of the newest good step, placed like `abstract`; None when there is no checkpoint.

    A damaged step is passed over with a line that says why, and loses its manifest: training comes by it again.
    Raises InputError when a shape differs or all are damaged.
    """
    known = steps(run)
    damaged = []
    for step in reversed(known):
        if problems := check_step(run, step):
            note(f"checkpoint {step} is damaged and passed over: {problems[0]}")
            damaged.append(step)
            continue
        check_shapes(run, step, abstract.params)
        optimizer = _rest(abstract)
        check_shapes(run, step, optimizer, "optimizer")
        loaded = ocp.load_checkpointables(
            step_folder(run, step), {"params": abstract.params, "optimizer": optimizer, "data": None}
        )
        if problems := check_content(run, step, params=loaded["params"], optimizer=loaded["optimizer"]):
            note(f"checkpoint {step} is damaged and passed over: {problems[0]}")
            damaged.append(step)
            continue
        for bad in damaged if jax.process_index() == 0 else ():
            (step_folder(run, bad) / MANIFEST).unlink(missing_ok=True)
        saved, served = loaded["optimizer"], loaded["params"]
        trained, average = (saved["trained"], served) if "trained" in saved else (served, None)
        masks = Masks(**saved["masks"]) if "masks" in saved else None
        beside = Beside(**saved["beside"]) if "beside" in saved else None
        state = TrainState(
            trained, saved["moments"], saved["step"], saved["skipped"], average, Guard(**saved["guard"]), masks, beside
        )
        return state, Position(**loaded["data"])
    if known:
        raise InputError(f"{run / FOLDER}: every checkpoint is damaged; restore one from a copy or use another --run")
    return None


def _rest(state: TrainState) -> dict[str, Any]:
    """What only training needs of a state; the parameters that are served lie apart from it."""
    trained = {} if state.average is None else {"trained": state.params}
    counters = {"step": state.step, "skipped": state.skipped, "guard": state.guard._asdict()}
    masks = {} if state.masks is None else {"masks": state.masks._asdict()}
    beside = {} if state.beside is None else {"beside": state.beside._asdict()}
    return {"moments": state.optimizer} | counters | trained | masks | beside
