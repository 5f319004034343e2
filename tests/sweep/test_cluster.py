"""Trials as jobs of submitit: run by its local executor; for Slurm, what is handed to sbatch."""

import signal
import sys
import time

import pytest
import submitit

from m6rec_jax.errors import InputError
from m6rec_jax.sweep.launch import STOPPED, ClusterLauncher, Training, slurm_launcher


def commands(tmp_path, monkeypatch, **scripts):
    """A PATH with these commands in front."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def wait(job, seconds=60):
    until = time.monotonic() + seconds
    while job.code() is None and time.monotonic() < until:
        time.sleep(0.1)
    return job.code()


def test_a_job_hands_back_the_exit_code_and_what_was_said(tmp_path):
    launcher = ClusterLauncher(submitit.LocalExecutor(tmp_path / "jobs"))
    jobs = [
        launcher.start([sys.executable, "-S", "-c", f"print('m6rec: number {n}'); raise SystemExit({n})"], tmp_path / "trials" / f"{n}.log", 0)
        for n in (0, 2)
    ]  # fmt: skip
    assert [wait(job) for job in jobs] == [0, 2]
    assert [job.said() for job in jobs] == ["m6rec: number 0\n", "m6rec: number 2\n"]
    assert launcher.adopt(jobs[0].name, tmp_path / "trials" / "0.log", tmp_path) is None  # it ended


def test_before_the_time_limit_the_training_saves_and_the_same_command_is_queued(tmp_path):
    body = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(75))); print('up', flush=True); time.sleep(30)"  # fmt: skip
    training, log = Training([sys.executable, "-S", "-c", body], tmp_path / "log"), tmp_path / "log"
    import threading

    codes = []
    thread = threading.Thread(target=lambda: codes.append(training()))
    thread.start()
    while not log.is_file() or "up" not in log.read_text():
        time.sleep(0.02)
    queued = training.checkpoint()
    thread.join(30)
    assert codes == [75] and log.read_text() == "up\nsaved\n"
    assert queued.function.command == training.command and queued.function.child is None


def test_slurm_gets_the_options_and_knows_which_there_are(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="--launcher slurm: no srun here"):
        slurm_launcher(tmp_path / "slurm", {})
    commands(tmp_path, monkeypatch, srun="exit 0", sbatch=f'cp "$1" {tmp_path}/handed; echo Submitted batch job 41', scancel=f'echo "$@" > {tmp_path}/cancelled', sacct="echo 'JobID|State'; echo '41|CANCELLED by 0'")  # fmt: skip
    with pytest.raises(InputError, match=r"--slurm partitoin: unknown option; known: account, .*partition"):
        slurm_launcher(tmp_path / "slurm", {"partitoin": "gpu"})
    launcher = slurm_launcher(tmp_path / "slurm", {"partition": "gpu", "gpus_per_node": 1, "time": 60})
    job = launcher.start(["m6rec", "train"], tmp_path / "0.log", 0)
    assert job.name == "41"
    handed = (tmp_path / "handed").read_text()
    for line in ("--partition=gpu", "--gpus-per-node=1", "--time=60", "--signal=USR2@180", "--job-name=m6rec-sweep"):
        assert f"#SBATCH {line}\n" in handed
    assert "submitit.core._submit" in handed
    delayed = submitit.core.utils.DelayedSubmission.load(job.job.paths.submitted_pickle)
    assert delayed.function.command == ["m6rec", "train"] and delayed.function.log == tmp_path / "0.log"
    job.stop()
    assert (tmp_path / "cancelled").read_text() == "41\n"
    job.job.watcher.update()
    assert job.code() == STOPPED == 128 + signal.SIGTERM
