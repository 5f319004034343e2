"""Which of several processes this one is, by hand in the environment or under srun; and joining the others."""

from __future__ import annotations

import os
import platform
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from m6rec_jax.errors import InputError
from m6rec_jax.progress import speak

BY_HAND = ("M6REC_COORDINATOR", "M6REC_PROCESSES", "M6REC_PROCESS_ID")
JOIN_SECONDS = "M6REC_JOIN_SECONDS"  # how long the processes wait for each other at the start


def join_processes() -> None:
    """Join the other processes of the job, where there are any, so that jax sees the devices of all; say so in a line.

    By hand each process gets M6REC_COORDINATOR=host:port, M6REC_PROCESSES and M6REC_PROCESS_ID; under srun jax finds
    them itself. Raises InputError when only some of the three are set, or are no numbers. When the others do not come
    within M6REC_JOIN_SECONDS (300 if left out) the process ends: one line says what it could and could not reach,
    exit code 69.
    """
    seconds = os.environ.get(JOIN_SECONDS, "300")
    if not seconds.isdigit() or not int(seconds):
        raise InputError(f"{JOIN_SECONDS}={seconds}: give whole seconds, at least 1")
    hand = {name: os.environ.get(name, "") for name in BY_HAND}
    if any(hand.values()):
        coordinator, processes, process = hand.values()
        port = coordinator.rpartition(":")[2]
        if not coordinator[: -len(port) - 1] or not port.isdigit() or not _among(process, processes):
            raise InputError(f"{_said(hand)}: give each process host:port of the first one, how many there are, and its number from 0")  # fmt: skip
        if int(process) == 0:
            _check_free(coordinator, int(port))
        where: dict[str, Any] = {
            "coordinator_address": coordinator,
            "num_processes": int(processes),
            "process_id": int(process),
            "cluster_detection_method": "deactivate",  # the three say all
        }
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        where = slurm_devices(os.environ)
    else:
        return
    import jax

    with _or_leave(int(seconds)):
        # jax itself would abort with a stack trace: it gets more time than we take.
        jax.distributed.initialize(**where, initialization_timeout=int(seconds) + 60)
        local = jax.local_devices()  # here processes that fell behind are waited for once more
    # jax catches SIGTERM from now on and only takes a note. Until the training loop asks for it, it is to end us.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    count = f"{len(local)} {local[0].device_kind} device{'s' if len(local) > 1 else ''}"
    print(
        f"process {jax.process_index()} of {jax.process_count()} on {platform.node()}: {count} of "
        f"{jax.device_count()}, coordinator {_address()}",
        file=sys.stderr,
        flush=True,
    )
    speak(jax.process_index() == 0)


def _check_free(coordinator: str, port: int) -> None:
    """Raise InputError when the first process cannot listen at its port; jaxlib crashes then."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"M6REC_COORDINATOR={coordinator}: process 0 cannot listen at this port ({reason}); give all processes another one") from None  # fmt: skip


def _address() -> str | None:
    from jax._src.distributed import global_state  # jax finds it itself under srun, and says it nowhere else

    return global_state.coordinator_address


def slurm_devices(environment: Mapping[str, str]) -> dict[str, Any]:
    """What jax must be told of the devices of a Slurm task; it would take the one with the task's number on its node.

    A task that has its node to itself takes all GPUs there; one that Slurm shows a single GPU (--gpus-per-task=1,
    --gpu-bind) takes that one, whose number is 0 then.
    """
    if environment.get("SLURM_STEP_TASKS_PER_NODE", "").startswith("1(") and "SLURM_GPUS_ON_NODE" in environment:
        return {"local_device_ids": list(range(int(environment["SLURM_GPUS_ON_NODE"])))}
    shown = environment.get("CUDA_VISIBLE_DEVICES", "")
    return {"local_device_ids": [0]} if shown and "," not in shown else {}


@contextmanager
def _or_leave(seconds: int) -> Iterator[None]:
    """End this process with one line when what is inside does not return in time: the wait is in C++, which can only
    abort."""
    joined = threading.Event()

    def watch() -> None:
        if not joined.wait(seconds):
            from m6rec_jax.cli import ALONE

            print(f"m6rec: {_why_alone(seconds)}", file=sys.stderr, flush=True)
            os._exit(ALONE)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _why_alone(seconds: int) -> str:
    """One line: which process waited, for whom, what can be reached now, and what to look at."""
    from jax._src.distributed import global_state

    address = _address()
    if address is None:
        return f"this process found no coordinator within {seconds} s; set {', '.join(BY_HAND)} by hand"
    process, more = global_state.process_id, f"{JOIN_SECONDS} gives them longer"
    if process == 0 and global_state.service is not None:
        return (
            f"process 0 on {platform.node()} waited {seconds} s at {address}, and not all others came; see what their "
            f"logs say, whether all have the same coordinator and number of processes, and whether the port is open "
            f"between the machines; {more}"
        )
    host, _, port = address.rpartition(":")
    begun = f"process {process} on {platform.node()} could not join at {address} within {seconds} s"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            pass
    except socket.gaierror:
        return f"{begun}: this machine knows no host {host}; give an address that all machines can look up"
    except OSError as error:
        reason = error.strerror or "no answer"
        return (
            f"{begun}: {reason}; see whether process 0 runs on {host}, what its log says, and whether port {port} is "
            f"open between the machines; {more}"
        )
    return (
        f"{begun}: something answers there, but not all processes came; see what their logs say, and whether all have "
        f"the same number of processes; {more}"
    )


def shard_of_job(shard: int | None, shards: int | None) -> tuple[int | None, int | None]:
    """(which, of how many) by the options --shard and --shards, else by the environment; (None, None): nothing says it.

    For work that processes share without a word to each other. They are not joined: none waits for the slowest, and
    one that dies takes no other with it. Raises InputError when the two do not fit together.
    """
    if shard is not None or shards is not None:
        if shard is None or shards is None or not 0 <= shard < shards:
            raise InputError(f"--shards={shards} --shard={shard}: say how many processes share the work, and which of them this is, from 0")  # fmt: skip
        return shard, shards
    hand = {name: os.environ.get(name, "") for name in BY_HAND[1:]}
    if any(hand.values()):
        processes, process = hand.values()
        if not _among(process, processes):
            raise InputError(f"{_said(hand)}: give each process how many there are, and its number from 0")
        return int(process), int(processes)
    if (tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))) > 1:
        return int(os.environ.get("SLURM_PROCID", "0")), tasks
    return None, None


def _among(process: str, processes: str) -> bool:
    return processes.isdigit() and process.isdigit() and int(process) < int(processes)


def _said(hand: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in hand.items())
