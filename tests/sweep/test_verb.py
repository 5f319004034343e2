"""`m6rec sweep`: what it refuses, and one sweep of real trainings."""

import csv
import os
import subprocess
import sys

import pytest

from m6rec_jax.cli import SUCCESS, WRONG_INPUT, main
from m6rec_jax.settings import load_config

ASK = ["sweep", "--dataset", "nowhere", "--space", "quality", "--trials", "3", "--config", "quality"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--trials", "0"], "--trials is missing"),
        (["--trials", "-1"], "--trials=-1: must be at least 1"),
        (["--jobs", "0"], "--jobs=0: must be at least 1"),
        (["--seed", "-1"], "--seed=-1: must be at least 0"),
        (["--slurm", "time=3"], "--slurm time=3 and --launcher local"),
        (["--space", "good"], "--space good: no such file; the shipped spaces are quality"),
        (["--model.layers=2"], "--model.layers is searched by"),
        (["--model.width", "32"], "--model.width is searched by"),
        ([], "nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(tmp_path, change, says, capsys):
    assert main([*ASK, "--out", str(tmp_path / "out"), *change]) == WRONG_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and not (tmp_path / "out").exists()


def test_without_optuna_it_says_how_to_get_it(tiny_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    argv = [*ASK[:1], *ASK[3:], "--dataset", str(tiny_dataset), "--out", str(tmp_path / "out")]
    assert main(argv) == WRONG_INPUT
    assert capsys.readouterr().err.endswith("m6rec sweep needs the package optuna: pip install 'm6rec-jax[sweep]'\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_real_trials(tiny_dataset, tmp_path):
    (tmp_path / "space.yaml").write_text("optim.learning_rate: {low: 1e-3, high: 1e-1, log: true}\ntrain.seed: {values: [0, 1]}\n")  # fmt: skip
    out = tmp_path / "out"
    argv = ["sweep", "--space", str(tmp_path / "space.yaml"), "--dataset", str(tiny_dataset), "--out", str(out)]
    argv += ["--model.layers=1", "--model.width=16", "--data.rows=4", "--data.length=64", "--optim.warmup=1", "--train.steps=2"]  # fmt: skip

    def run(trials):
        words = [sys.executable, "-m", "m6rec_jax.cli", *argv, "--trials", str(trials)]
        return subprocess.run(words, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})

    done = run(3)
    assert done.returncode == SUCCESS, done.stderr
    table = list(csv.DictReader((out / "trials.csv").open()))
    assert [row["state"] for row in table] == ["complete"] * 3
    best = max(table, key=lambda row: float(row["valid/ndcg@10"]))
    config = load_config([out / "best.yaml"])
    assert config.train.seed == int(best["train.seed"]) and config.train.steps == 2
    assert config.optim.learning_rate == float(best["optim.learning_rate"])
    trained = load_config([out / "trials" / f"{int(best['trial']):04d}" / "config.yaml"])
    assert (trained.optim, trained.train) == (config.optim, config.train)
    assert (out / "parallel.png").is_file() and f"m6rec train --config {out}/best.yaml" in done.stderr
    again = run(3)
    assert again.returncode == SUCCESS and "3 of 3 trials were begun before" in again.stderr
    assert list(csv.DictReader((out / "trials.csv").open())) == table
