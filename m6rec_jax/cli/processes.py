"""Which of several processes this one is: by hand in the environment, or under srun."""

from __future__ import annotations

import os

from m6rec_jax.errors import InputError
from m6rec_jax.progress import speak

BY_HAND = ("M6REC_COORDINATOR", "M6REC_PROCESSES", "M6REC_PROCESS_ID")


def join_processes() -> None:
    """Join the other processes of the job, where there are any, so that jax sees the devices of all.

    By hand each process gets M6REC_COORDINATOR=host:port, M6REC_PROCESSES and M6REC_PROCESS_ID; under srun jax finds
    them itself. Raises InputError when only some of the three are set, or are no numbers.
    """
    hand = {name: os.environ.get(name, "") for name in BY_HAND}
    if any(hand.values()):
        coordinator, processes, process = hand.values()
        if not coordinator or not _among(process, processes):
            raise InputError(f"{_said(hand)}: give each process host:port of the first one, how many there are, and its number from 0")  # fmt: skip
        where = {"coordinator_address": coordinator, "num_processes": int(processes), "process_id": int(process)}
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        # jax gives a Slurm task one device; a task that has its machine to itself takes them all.
        alone = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").startswith("1(") and "SLURM_GPUS_ON_NODE" in os.environ
        where = {"local_device_ids": list(range(int(os.environ["SLURM_GPUS_ON_NODE"])))} if alone else {}
    else:
        return
    import jax

    jax.distributed.initialize(**where)
    speak(jax.process_index() == 0)


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
