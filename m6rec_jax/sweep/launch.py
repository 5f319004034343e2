"""Where the trials of a sweep run: a process on this machine, or a job under Slurm (through submitit)."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from m6rec_jax.errors import InputError

STOPPED = 128 + signal.SIGTERM
LEAVE_SECONDS = 120.0  # to save after SIGTERM, before the process is killed


class Job(Protocol):
    """A trial under way."""

    @property
    def name(self) -> str:
        """What finds it again from another process."""
        ...

    def code(self) -> int | None:
        """The exit code (minus the signal that killed it), None while it runs."""
        ...

    def stop(self) -> None:
        """Ask it to save and end."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...

    def said(self) -> str:
        """All that it wrote to its log."""
        ...


class Launcher(Protocol):
    """Starts trials. `adopt` finds the job of a sweep that is no more: the job, or None when it ended (or was ended)."""

    def start(self, command: Sequence[str], log: Path, slot: int) -> Job: ...

    def adopt(self, name: str, log: Path, run: Path) -> Job | None: ...


class Process:
    """A process in a session of its own: Ctrl-C at the terminal reaches the sweep alone, which then stops its trials."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=dict(environment), start_new_session=True
            )

    @property
    def name(self) -> str:
        return str(self.process.pid)

    def code(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()

    def said(self) -> str:
        return read_log(self.log)


class LocalLauncher:
    """Processes on this machine, `jobs` side by side. Devices listed in CUDA_VISIBLE_DEVICES are dealt out among them."""

    def __init__(self, jobs: int, environment: Mapping[str, str] | None = None):
        self.jobs, self.environment = jobs, dict(os.environ if environment is None else environment)

    def start(self, command: Sequence[str], log: Path, slot: int) -> Process:
        return Process(command, log, self.environment | dealt(self.environment, slot, self.jobs))

    def adopt(self, name: str, log: Path, run: Path) -> None:
        """Two processes must not train into one folder: one that a killed sweep left behind saves and ends first."""
        pid, until = int(name), time.monotonic() + LEAVE_SECONDS
        while _trains_into(pid, run):
            os.kill(pid, signal.SIGTERM if time.monotonic() < until else signal.SIGKILL)
            time.sleep(0.5)


def dealt(environment: Mapping[str, str], slot: int, jobs: int) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES of one of `jobs` workers: every jobs-th device from `slot` on; of fewer devices, one in turn."""
    devices = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if jobs == 1 or len(devices) < 2:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[slot::jobs] or [devices[slot % len(devices)]])}


def _trains_into(pid: int, run: Path) -> bool:
    """Whether that process is there and is a training of this run; pids are given anew, so the number alone says little."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return str(run) in words


class Training:
    """What a Slurm job calls: `m6rec train`. Before the time limit submitit calls `checkpoint`: the training saves, and
    the job queues itself again with the same command, which resumes."""

    def __init__(self, command: Sequence[str], log: Path):
        self.command, self.log = list(command), log
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        with open(self.log, "ab") as out:
            self.child = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        return self.child.wait()

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        if self.child is not None:
            self.child.terminate()
            self.child.wait()
        return DelayedSubmission(Training(self.command, self.log))


class ClusterJob:
    """A job of submitit."""

    def __init__(self, job: Any, log: Path):
        self.job, self.log = job, log
        self._stopped = False

    @property
    def name(self) -> str:
        return str(self.job.job_id)

    def code(self) -> int | None:
        if not self.job.done():
            return None
        if not self.job.paths.result_pickle.is_file():  # cancelled, or the node is gone
            return STOPPED if self._stopped else 1
        outcome, result = self.job._get_outcome_and_result()
        return int(result) if outcome == "success" else 1

    def stop(self) -> None:
        self._stopped = True
        self.job.cancel(check=False)

    kill = stop

    def said(self) -> str:
        own = read_log(self.log)
        return own if own.strip() else f"the job {self.name} is {self.job.state}: {self.job.stderr() or 'no log'}"


class ClusterLauncher:
    """Jobs through an executor of submitit, one a trial."""

    def __init__(self, executor: Any):
        self.executor = executor

    def start(self, command: Sequence[str], log: Path, slot: int) -> ClusterJob:
        log.parent.mkdir(parents=True, exist_ok=True)
        return ClusterJob(self.executor.submit(Training(command, log.absolute())), log)

    def adopt(self, name: str, log: Path, run: Path) -> ClusterJob | None:
        job = ClusterJob(self.executor.job_class(folder=self.executor.folder, job_id=name), log)
        return job if job.code() is None else None


def slurm_launcher(folder: Path, options: Mapping[str, Any]) -> ClusterLauncher:
    """Jobs under Slurm; `options` are submitit's, such as partition, time (minutes), gpus_per_node.

    Raises InputError without submitit, without Slurm's commands, and for an option that submitit does not know.
    """
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise InputError("--launcher slurm needs the package submitit: pip install 'm6rec-jax[sweep]', or use --launcher local") from None  # fmt: skip
    if SlurmExecutor.affinity() < 0:
        raise InputError("--launcher slurm: no srun here; start it where jobs are submitted, or use --launcher local")
    executor = SlurmExecutor(folder=folder, max_num_timeout=100)
    known = sorted(SlurmExecutor._valid_parameters())
    for name in options:
        if name not in known:
            raise InputError(f"--slurm {name}: unknown option; known: {', '.join(known)}")
    executor.update_parameters(**{"job_name": "m6rec-sweep", "time": 12 * 60, "signal_delay_s": 180, **options})
    return ClusterLauncher(executor)


def read_log(path: Path) -> str:
    """The end of a log; empty when there is none."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - 65536, 0))
        return file.read().decode("utf-8", errors="replace")
