"""Two real processes over gloo: the losses of one, one voice, and a run that one process takes up again."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from m6rec_jax.artifacts.checkpoints import manifest, steps
from m6rec_jax.cli import SUCCESS, main
from m6rec_jax.training.metrics import read_rows
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401

STEPS = 20
OPTIONS = [
    "--model.layers=1", "--model.width=16", "--data.rows=4", "--data.length=64", "--optim.warmup=4",
    "--train.log_every=1", "--train.eval_every=0", "--checkpoint.every=10", f"--train.steps={STEPS}",
]  # fmt: skip


def command(dataset, run, *more):
    return ["train", "--config", "demo", *OPTIONS, *more, "--dataset", str(dataset), "--run", str(run)]


def together(argv):
    """stderr of two processes that run one command as one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    job = {**os.environ, "M6REC_COORDINATOR": coordinator, "M6REC_PROCESSES": "2"}
    program = [sys.executable, "-m", "m6rec_jax.cli", *argv]
    children = [
        subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env={**job, "M6REC_PROCESS_ID": str(number)})
        for number in range(2)
    ]
    said = [child.communicate(timeout=170)[1] for child in children]
    assert [child.returncode for child in children] == [SUCCESS, SUCCESS], said
    return said


def losses(run):
    return np.array([row["loss"] for row in read_rows(run) if "loss" in row])


@pytest.fixture(scope="module")
def alone(tiny_dataset, tmp_path_factory):  # noqa: F811
    run = tmp_path_factory.mktemp("alone") / "run"
    assert main(command(tiny_dataset, run)) == SUCCESS
    return run


def test_two_processes_train_as_one_and_the_first_alone_speaks(alone, tiny_dataset, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    said = together(command(tiny_dataset, run))
    assert len(losses(run)) == STEPS
    np.testing.assert_allclose(losses(run), losses(alone), rtol=1e-5)
    assert "train: done, 20 steps" in said[0] and "train: " not in said[1]
    assert main(["verify", str(run)]) == SUCCESS
    # One process takes up what two have saved: the second half again, from step 10.
    import shutil

    shutil.rmtree(run / "checkpoints" / str(STEPS))
    assert main(command(tiny_dataset, run)) == SUCCESS
    assert steps(run)[-1] == STEPS
    assert manifest(run, STEPS)["rows"] == manifest(alone, STEPS)["rows"]
    np.testing.assert_allclose(losses(run), losses(alone), rtol=1e-5)
