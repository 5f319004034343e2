"""Where the files under test lie, and small programs that stand in for a cluster's commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])

# A cluster is not here: each of these does on this machine what its namesake does over there, as far as a script of
# launch/ can see it. What they were asked goes into $CALLS.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$CALLS"
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_TASKS_PER_NODE=2
pids=()
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
echo "${pids[@]}" > "$CALLS.tasks"
trap 'kill -KILL "${pids[@]}" 2>/dev/null' TERM # Slurm's ends the step
code=0
for pid in "${pids[@]}"; do
    wait "$pid"; its=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; its=$?; done
    [[ $its -le $code ]] || code=$its
done
exit $code
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >> "$CALLS"
read -ra pids < "$CALLS.tasks"
[[ "$*" == *--batch* || "$*" != *--signal=TERM* ]] || kill -TERM "${pids[@]}"
"""
SCONTROL = """#!/bin/sh
echo "scontrol $*" >> "$CALLS"
"""
GCLOUD = """#!/usr/bin/env bash
case "$*" in
*describe*ipAddress*) echo 10.0.0.1 ;;
*describe*len*) echo 2 ;;
*ssh*)
    while [[ $1 != --worker ]]; do shift; done
    worker=$2
    while [[ $1 != --command ]]; do shift; done
    mkdir -p "$HOME/$worker" && cd "$HOME/$worker" && exec env --default-signal=INT bash -c "$2" ;; # ssh ends by Ctrl-C
esac
"""


def command(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def cluster(folder: Path, **programs: str) -> dict[str, str]:
    """An environment whose PATH begins with these programs; `m6rec` is this checkout's command unless given."""
    m6rec = f'#!/bin/sh\nexec "{sys.executable}" -m m6rec_jax.cli "$@"\n'
    for name, text in {"m6rec": m6rec, **programs}.items():
        command(folder / "bin", name, text)
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "CALLS": str(folder / "calls"), "HOME": str(folder)}


# The words before a command that give it a terminal of its own; what comes on stdin is typed there.
TERMINAL = (
    sys.executable,
    "-c",
    "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))",
)


def run(*words: str | Path, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, timeout=60, **more
    )


def settings(name: str) -> dict[str, str]:
    """The NAME=value lines of a file under launch/env."""
    lines = (LAUNCH / "env" / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
