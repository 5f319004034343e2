"""train, verify, evaluate, generate from the command line on the tiny dataset; stopped by signals and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest

from m6rec_jax.cli import INTERRUPTED, REQUEUE, SUCCESS, WRONG_INPUT, main
from m6rec_jax.cli.processes import BY_HAND
from m6rec_jax.data.prepare import prepare
from m6rec_jax.data.privacy import hide_id
from tests.domains import films  # noqa: F401
from tests.fixtures import tiny_card

SMALL = ["--model.layers=1", "--model.width=16", "--data.rows=4", "--data.length=64", "--optim.warmup=1"]


@pytest.mark.smoke
def test_a_run_from_training_to_lists(tiny_dataset, tmp_path, capsys):
    run, report, lists = tmp_path / "run", tmp_path / "report.json", tmp_path / "recs.parquet"
    train = ["train", "--config", "demo", *SMALL, "--dataset", str(tiny_dataset), "--run", str(run), "--train.steps=3"]
    assert main(train) == SUCCESS
    assert f"{run}: starting, 3 steps" in capsys.readouterr().err
    assert (run / "gate.json").is_file()
    assert main(train) == SUCCESS
    assert "step 3 of 3 is saved; nothing is left to train" in capsys.readouterr().err
    assert main([*train, "--model.width=32"]) == WRONG_INPUT
    assert "model.width was 16" in capsys.readouterr().err.splitlines()[-1]
    assert main(["train", "--config", str(run / "config.yaml"), "--print-config"]) == SUCCESS
    assert capsys.readouterr().out == (run / "config.yaml").read_text()
    assert main(["verify", str(run)]) == SUCCESS

    assert main(["evaluate", "--run", str(run), "--split", "valid", "--out", str(report)]) == SUCCESS
    body = json.loads(report.read_text())
    assert body["split"] == "valid" and body["metrics"]["valid_id_rate"] == 1.0
    assert {"popularity", "item_knn", "counting_floor"} <= set(body["baselines"])
    assert "counting floor" in capsys.readouterr().out

    (tmp_path / "users.txt").write_text("u7\nu9\nu11\n")
    argv = ["generate", "--run", str(run), "--users", str(tmp_path / "users.txt"), "--limit", "2", "--k", "4"]
    assert main([*argv, "--out", str(lists)]) == SUCCESS
    table = pl.read_parquet(lists)
    assert table["user_id"].unique(maintain_order=True).to_list() == ["u7", "u9"]
    assert table.group_by("user_id").len()["len"].to_list() == [4, 4]
    assert {"item_id", "rank", "score", "source", "route", "reason", "model_version"} <= set(table.columns)

    visitors = "user_id,history,age\nu7,,\nnew,item-3 item-4,\nnewer,,25\n"
    (tmp_path / "visitors.csv").write_text(visitors)
    ask = ["generate", "--run", str(run), "--users", str(tmp_path / "visitors.csv"), "--k", "1"]
    for engine, routes in (
        ("auto", ["model+memory", "session-memory", "segment"]),
        ("memory", ["memory", "session-memory", "segment"]),
        ("popularity", ["popularity", "popularity", "segment"]),
    ):
        assert main([*ask, "--engine", engine, "--out", str(lists)]) == SUCCESS
        assert pl.read_parquet(lists)["route"].to_list() == routes
    assert main([*ask, "--engine", "best", "--out", str(lists)]) == WRONG_INPUT
    assert main([*ask, "--explain", "--show-steps", "--out", str(lists)]) == SUCCESS
    told = pl.read_parquet(lists).select("attribution", "steps", "evidence").with_columns(pl.all().list.len() > 0)
    assert told.rows()[1:] == [(False, False, True), (False, False, False)] and told.row(0)[:2] == (True, True)
    (tmp_path / "stock.txt").write_text("\n".join(f"item-{n}" for n in range(30)))
    rules = ["--filter", "price < 40", "--candidates", str(tmp_path / "stock.txt"), "--per", "category", "--cap", "1"]
    assert main([*ask, *rules, "--k", "3", "--diversity", "0.3", "--new-items", "0.2", "--out", str(lists)]) == SUCCESS
    stock = pl.DataFrame({"item_id": [f"item-{n}" for n in range(30)], "group": [n // 10 for n in range(30)]})
    listed = pl.read_parquet(lists).join(stock, on="item_id", how="left")
    assert listed["group"].null_count() == 0 and not listed.select("user_id", "group").is_duplicated().any()
    assert main([*ask, "--filter", "prise < 40", "--out", str(lists)]) == WRONG_INPUT
    assert "filter, character 1: unknown item column prise" in capsys.readouterr().err.splitlines()[-1]
    capsys.readouterr()

    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    hidden = prepare(tiny_card(privacy={"ids": "hmac", "key": str(key)}), tmp_path / "hidden", like=run)
    argv += ["--dataset", str(hidden.path), "--out", str(tmp_path / "hidden.parquet")]
    assert main(argv) == WRONG_INPUT and "or give the key" in capsys.readouterr().err.splitlines()[-1]
    assert main([*argv, "--key", str(tmp_path / "lost")]) == WRONG_INPUT
    assert f"{tmp_path / 'lost'}: no such file" in capsys.readouterr().err.splitlines()[-1]
    assert main([*argv, "--key", str(key)]) == SUCCESS
    names = pl.read_parquet(tmp_path / "hidden.parquet")["user_id"].unique(maintain_order=True).to_list()
    assert names == [hide_id(user, key.read_bytes()) for user in ("u7", "u9")]


def test_two_datasets_in_one_run(tiny_dataset, films, tmp_path, capsys):  # noqa: F811
    run, lists = tmp_path / "run", tmp_path / "recs.parquet"
    argv = ["train", *SMALL, "--dataset", str(tiny_dataset), "--run", str(run), "--train.steps=2"]
    assert main([*argv, "--dataset", f"{films}=half"]) == WRONG_INPUT
    assert "'half' is no weight; write --dataset DATASET, or DATASET=0.5" in capsys.readouterr().err
    assert main([*argv, "--dataset", f"{films}=0.5"]) == SUCCESS
    assert json.loads((run / "run.json").read_text())["weights"] == [1.0, 0.5]
    assert (run / "gate.json").is_file() and (run / "domains" / "films" / "gate.json").is_file()
    valid = [row for row in map(json.loads, (run / "metrics.jsonl").open()) if "valid/ndcg@10" in row][-1]
    each = [valid[f"valid/ndcg@10@{name}"] for name in ("tiny", "films")]
    assert valid["valid/ndcg@10"] == pytest.approx(sum(each) / 2)
    assert main(["verify", str(run)]) == SUCCESS
    generate = ["generate", "--run", str(run), "--users", "all", "--limit", "3", "--k", "4", "--out", str(lists)]
    assert main([*generate, "--dataset", str(films)]) == SUCCESS
    assert pl.read_parquet(lists)["item_id"].str.starts_with("film-").all()
    assert main([*argv, "--dataset", str(films)]) == WRONG_INPUT
    assert "weights of its datasets were tiny=1, films=0.5" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_patience_ended_is_not_said_to_resume(tiny_dataset, tmp_path, capsys):
    run = tmp_path / "run"
    argv = ["train", *SMALL, "--dataset", str(tiny_dataset), "--run", str(run), "--train.steps=30"]
    argv += ["--train.eval_every=1", "--train.patience=1", "--optim.learning_rate=1e-9"]
    assert main(argv) == SUCCESS
    assert "stopped at step 2" in capsys.readouterr().err
    assert main(argv) == SUCCESS
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == f"{run}: step 2 of 30 is saved" and second.startswith("stopped at step 2 in an earlier run")


@pytest.mark.slow
def test_signals_save_and_the_same_command_resumes(tiny_dataset, tmp_path):
    run = tmp_path / "run"
    argv = [sys.executable, "-m", "m6rec_jax.cli", "train", "--config", "demo", *SMALL, "--train.eval_every=0"]
    argv += ["--dataset", str(tiny_dataset), "--run", str(run), "--train.steps=1000000", "--train.log_every=1"]
    for number, code, says in ((signal.SIGTERM, REQUEUE, "saved step"), (signal.SIGINT, INTERRUPTED, "interrupted")):
        rows = _rows(run)
        child = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        deadline = time.monotonic() + 120
        while _rows(run) < rows + 2 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        child.send_signal(number)
        _, err = child.communicate(timeout=60)
        assert child.returncode == code, err
        assert says in err.splitlines()[-1] and "Traceback" not in err
        assert (" is saved\n" in err) == (number == signal.SIGINT)
    assert main(["verify", str(run)]) == SUCCESS


def _rows(run):
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


@pytest.mark.parametrize("wrong", [("", "2", "0"), ("host:1", "", "0"), ("host:1", "2", "2"), ("host:1", "two", "0")])
def test_half_a_job_is_one_line(monkeypatch, capsys, wrong):
    for name, value in zip(BY_HAND, wrong, strict=True):
        monkeypatch.setenv(name, value)
    assert main(["train", "--dataset", "d", "--run", "r"]) == WRONG_INPUT
    assert "M6REC_COORDINATOR" in capsys.readouterr().err
