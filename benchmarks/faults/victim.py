"""`m6rec train` that writes down what it trains on and dies where it is told: python -m benchmarks.faults.victim JOB

JOB is JSON: `train` (the words of `m6rec train`), `trace` (a file that lines are appended to), `life` (which start this
is), and how to die: `fault` (none, step, serialise, commit; term: asked to stop), `after` (steps or saves that pass before), `point` (commit:
before, rename, after, drop), `delay` (serialise: seconds after the save has begun). A line of the trace says which rows a
step was given, by the digest of their tokens and by the plan entries that are in them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import xxhash

from m6rec_jax.artifacts import atomic
from m6rec_jax.artifacts.content import content, digests
from m6rec_jax.cli import main
from m6rec_jax.training import checkpoint, loop, run


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch(job: dict[str, Any]) -> None:
    """Patch the trainer of this process: everything it does is noted, nothing is changed."""
    file = os.open(job["trace"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    seen: dict[str, Any] = {"given": 0, "first": 0}

    def write(**line: Any) -> None:
        line |= {"life": job["life"], "process": jax.process_index(), "at": time.time()}
        os.write(file, (json.dumps(line) + "\n").encode())  # at once: what a killed process has written stays

    class Rows(run.PlanRows):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            seen["rows"] = self

    restore, place_batch = run.restore, loop.place_batch

    def restored(folder: Path, abstract: Any) -> Any:
        found = restore(folder, abstract)
        if found is not None:
            seen["first"] = int(found[0].step)
            # Of the arrays as they were restored, by every process; not what the manifest says of them.
            parts = {"params": found[0].served, "optimizer": checkpoint._rest(found[0])}
            write(restored=seen["first"], content={name: digests(content(tree)) for name, tree in parts.items()})
        return found

    def placed(mesh: Any, batch: Any, accumulate: int) -> Any:
        rows, given = seen["rows"], seen["given"]
        if job["fault"] == "step" and given == job["after"]:
            die()
        if job["fault"] == "term" and given == job["after"]:
            os.kill(os.getpid(), signal.SIGTERM)
        numbers = range(
            rows.first + given * rows.rows + rows.offset, rows.first + given * rows.rows + rows.offset + rows.mine
        )
        write(
            step=seen["first"] + given + 1,
            rows=[xxhash.xxh3_64_hexdigest(tokens.tobytes()) for tokens in batch["tokens"]],
            entries=[rows.plan.row(number).number.tolist() for number in numbers],
        )
        seen["given"] = given + 1
        return place_batch(mesh, batch, accumulate)

    run.PlanRows, run.restore, loop.place_batch = Rows, restored, placed
    if job["fault"] == "serialise":
        _die_while_serialising(job)
    if job["fault"] == "commit":
        _die_while_committing(job)


def _die_while_serialising(job: dict[str, Any]) -> None:
    save, begun = checkpoint.ocp.save_checkpointables_async, []

    def saving(*args: Any, **kwargs: Any) -> Any:
        begun.append(args)
        if len(begun) > job["after"]:
            threading.Thread(target=lambda: (time.sleep(job["delay"]), die()), daemon=True).start()
        return save(*args, **kwargs)

    checkpoint.ocp.save_checkpointables_async = saving


def _die_while_committing(job: dict[str, Any]) -> None:
    """At one of the points between the last array on disk and the end of the save."""
    write, drop, replace, begun = checkpoint.write_manifest, checkpoint.shutil.rmtree, os.replace, []

    def writing(folder: Path, *args: Any) -> None:
        begun.append(folder)
        due, point = len(begun) > job["after"], job["point"]
        if due and point == "before":
            die()
        if due and point == "rename":
            atomic.os.replace = lambda *paths: die()
        write(folder, *args)
        atomic.os.replace = replace
        if due and point == "after":
            die()
        if due and point == "drop":
            checkpoint.shutil.rmtree = lambda *paths: die()

    checkpoint.write_manifest = writing
    assert drop is checkpoint.shutil.rmtree


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    watch(asked)
    sys.exit(main(asked["train"]))
