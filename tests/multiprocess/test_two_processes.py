"""Two real processes over gloo: the losses of one, one voice, and a run that one process takes up again."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from m6rec_jax.artifacts.checkpoints import manifest, steps
from m6rec_jax.cli import SUCCESS, WRONG_INPUT, main
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


def together(*words, count=2, program=("-m", "m6rec_jax.cli"), code=SUCCESS):
    """What the processes of one job said on stderr, each by itself, when launch/local.sh started them."""
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    started = [ROOT / "launch/local.sh", str(count), sys.executable, *program, *words]
    ended = subprocess.run(started, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == code, ended.stderr
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


# Process 1 reads its dataset from a disk of its own, which is slow and fails after 53 steps.
ON_A_BAD_DISK = """
import os, sys, time
from pathlib import Path
from m6rec_jax.cli import main
from m6rec_jax.training.feed import Feed
words, own = sys.argv[2:], sys.argv[1]
if os.environ["M6REC_PROCESS_ID"] == "1":
    words = [own if word == words[words.index("--dataset") + 1] else word for word in words]
    real, pulled = Feed.pull, 0
    def pull(feed):
        global pulled
        pulled += 1
        time.sleep(0.1)
        for path in Path(own).glob("train-*.arrayrecord") if pulled == 54 else ():
            size = path.stat().st_size
            with open(path, "r+b") as file:
                for at in range(size // 10, 9 * size // 10, 16):
                    file.seek(at)
                    byte = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([byte ^ 0xFF]))
        return real(feed)
    Feed.pull = pull
sys.exit(main(words))
"""


@pytest.mark.timeout(420)
def test_a_slow_process_is_named_and_one_that_cannot_read_stops_all(tiny_dataset, tmp_path):  # noqa: F811
    own, run = Path(shutil.copytree(tiny_dataset, tmp_path / "own")), tmp_path / "run"
    words = [word.replace(f"train.steps={STEPS}", "train.steps=90") for word in command(tiny_dataset, run)]
    said = together(*words, program=("-c", ON_A_BAD_DISK, str(own)), code=WRONG_INPUT)
    slow = [line for line in said[0].splitlines() if "is slow" in line]
    assert len(slow) == 1 and re.match(r"process 1 on \S+ is slow: 1\d\d ms a step", slow[0]), said[0]
    lines = [[line for line in one.splitlines() if line.startswith("m6rec: ")] for one in said]
    assert len(lines[0]) == 1 and lines[0] == lines[1]
    assert re.match(
        rf"m6rec: process 1 of 2 on \S+: {re.escape(str(own))}/train-\S+: damaged at record \d+ ", lines[0][0]
    )
    assert "data.bad_records=N leaves out up to N" in lines[0][0]
    assert steps(run)[-1] in (50, 60) and len(losses(run)) < 90
