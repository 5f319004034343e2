"""Two real processes over gloo: the losses of one, one voice, and a run that one process takes up again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from m6rec_jax.artifacts.checkpoints import manifest, steps
from m6rec_jax.cli import SUCCESS, main
from m6rec_jax.training.metrics import read_rows
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
OPTIONS = [
    "--model.layers=1", "--model.width=16", "--data.rows=4", "--data.length=64", "--optim.warmup=4",
    "--train.log_every=1", "--train.eval_every=0", "--checkpoint.every=10", f"--train.steps={STEPS}",
]  # fmt: skip


def command(dataset, run, *more):
    return ["train", "--config", "demo", *OPTIONS, *more, "--dataset", str(dataset), "--run", str(run)]


def together(*words, count=2):
    """What the processes of one job said on stderr, each by itself, when launch/local.sh started them."""
    environment = {**os.environ, "PYTHON": sys.executable}
    program = [ROOT / "launch/local.sh", str(count), sys.executable, "-m", "m6rec_jax.cli", *words]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == SUCCESS, ended.stderr
    lines = ended.stderr.splitlines()
    return ["\n".join(line[4:] for line in lines if line.startswith(f"[{number}] ")) for number in range(count)]


def losses(run):
    return np.array([row["loss"] for row in read_rows(run) if "loss" in row])


@pytest.fixture(scope="module")
def alone(tiny_dataset, tmp_path_factory):  # noqa: F811
    run = tmp_path_factory.mktemp("alone") / "run"
    assert main(command(tiny_dataset, run)) == SUCCESS
    return run


@pytest.mark.timeout(420)  # two processes compile; other tests may have the cores
def test_two_processes_train_as_one_and_the_first_alone_speaks(alone, tiny_dataset, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    said = together(*command(tiny_dataset, run))
    assert len(losses(run)) == STEPS
    np.testing.assert_allclose(losses(run), losses(alone), rtol=1e-5)
    assert "train: done, 20 steps" in said[0] and "train: " not in said[1]
    for number in range(2):
        expected = rf"process {number} of 2 on \S+: 1 \S+ device of 2, coordinator 127\.0\.0\.1:\d+"
        assert re.fullmatch(expected, next(line for line in said[number].splitlines() if line.startswith("process ")))
    assert main(["verify", str(run)]) == SUCCESS
    # One process takes up what two have saved: the second half again, from step 10.
    import shutil

    shutil.rmtree(run / "checkpoints" / str(STEPS))
    assert main(command(tiny_dataset, run)) == SUCCESS
    assert steps(run)[-1] == STEPS
    assert manifest(run, STEPS)["rows"] == manifest(alone, STEPS)["rows"]
    np.testing.assert_allclose(losses(run), losses(alone), rtol=1e-5)


@pytest.mark.timeout(420)  # two processes start, after the run that they read was trained
def test_shards_of_a_batch_are_processes_that_make_the_same_lists(alone, tmp_path):
    words = ["generate", "--run", str(alone), "--users", "all", "--k", "3", "--chunk", "16", "--engine", "popularity"]
    assert main([*words, "--out", str(tmp_path / "one.parquet")]) == SUCCESS
    said = together(*words, "--out", str(tmp_path / "two.parquet"))
    assert pl.read_parquet(tmp_path / "two.parquet").equals(pl.read_parquet(tmp_path / "one.parquet"))
    made = sorted(path.name for path in (tmp_path / "two.parquet.parts").glob("manifest*"))
    assert "process " not in "".join(said)  # they are not joined
    assert made == ["manifest.json"], made
