"""The demo once through on made-up films; its bookkeeping: a stage is done once, seconds add up over interruptions."""

import json
import time

import polars as pl
import pytest

from m6rec_jax.cli import SUCCESS, WRONG_INPUT, main
from m6rec_jax.cli.demo import SHOWN_USERS, Stages
from m6rec_jax.cli.tables import print_lists, print_report
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.wording import systems
from tests.data.test_registry import copies  # noqa: F401

TINY = ["--model.layers=1", "--model.width=8", "--model.heads=1", "--data.rows=4", "--data.length=64"]
TINY += ["--optim.warmup=1", "--train.steps=2", "--train.eval_every=0"]


@pytest.mark.smoke
def test_the_demo_makes_its_report_once_and_finds_it_complete_afterwards(copies, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "demo"
    argv = ["demo", "--out", str(out), "--source", str(copies["wheel"]), "--config", "demo", *TINY]
    assert main(argv) == SUCCESS
    first = capsys.readouterr()
    for name in (
        "report.html",
        "recommendations.parquet",
        "evaluation.json",
        "run/run.json",
        "dataset/manifest.json",
        "charts/ndcg-10.png",
    ):
        assert (out / name).is_file(), name
    report, evaluation = (
        json.loads((out / "report.json").read_text()),
        json.loads((out / "evaluation.json").read_text()),
    )
    assert set(report) == {*evaluation, "seconds", "stages"}
    assert all(report[key] == evaluation[key] for key in evaluation)
    assert list(report["stages"]) == ["fetch", "prepare", "train", "evaluate", "generate", "report"]
    assert report["seconds"] == pytest.approx(sum(report["stages"].values()), abs=0.01)
    assert pl.read_parquet(out / "recommendations.parquet")["user_id"].n_unique() == 943
    assert first.out.count("history, latest last") == SHOWN_USERS == 3
    assert "report: 1 pages" in first.err

    made = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "report.json"}
    start = time.monotonic()
    assert main(argv) == SUCCESS
    seconds, again = time.monotonic() - start, capsys.readouterr()
    assert again.err.count("complete since an earlier run") == len(report["stages"])
    assert again.out == first.out and json.loads((out / "report.json").read_text()) == report
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert seconds < 5

    assert main([*argv, "--model.width=16"]) == WRONG_INPUT
    said = capsys.readouterr().err.splitlines()[-1]
    assert "model.width was 8 and is 16 now" in said and "another demo with --out" in said and "--run" not in said


@pytest.fixture
def file(tmp_path):
    return tmp_path / "demo" / "stages.json"


def test_a_complete_stage_is_not_done_again(file, tmp_path):
    made, calls = tmp_path / "made", []

    def work():
        calls.append(1)
        made.write_text("x")

    Stages.open(file).run("prepare", "a", made, work)
    Stages.open(file).run("prepare", "a", made, work)
    assert len(calls) == 1
    Stages.open(file).run("prepare", "b", made, work)  # other input
    assert len(calls) == 2
    made.unlink()
    Stages.open(file).run("prepare", "b", made, work)  # its result is gone
    assert len(calls) == 3


def test_an_interrupted_stage_is_continued_and_both_times_count(file, tmp_path, monkeypatch):
    made, now = tmp_path / "made", [0.0]
    monkeypatch.setattr("m6rec_jax.cli.demo.time.monotonic", lambda: now[0])

    def interrupted():
        now[0] += 3
        made.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stages.open(file).run("train", "a", made, interrupted)
    stages = Stages.open(file)
    stages.run("train", "a", made, lambda: now.__setitem__(0, now[0] + 4))
    assert stages.known["train"]["done"] and stages.seconds() == {"train": 7.0}


def test_damaged_bookkeeping_is_one_line(file):
    file.parent.mkdir()
    for text in ("{", "[1]"):
        file.write_text(text)
        with pytest.raises(InputError, match="remove it"):
            Stages.open(file)


REPORT = {
    "split": "test",
    "users": 943,
    "protocol": "Leave-one-out, full ranking.",
    "verdict": "below the floor",
    "metrics": {"ndcg@10": 0.0912, "recall@10": 0.175, "coverage@10": 0.4, "novelty@10": 3.2},
    "ci95": {"ndcg@10": [0.0862, 0.0962]},
    "model_alone": None,
    "baselines": {"popularity": {"ndcg@10": 0.0439}, "counting_floor": {"ndcg@10": 0.1144}},
    "intervals": {"popularity": {"ndcg@10": [0.0419, 0.0459]}},
}


def test_the_table_holds_every_system_and_how_it_was_measured(capsys):
    print_report(REPORT)
    said = capsys.readouterr().out
    for part in ("0.0912 ± 0.0050", "0.0439 ± 0.0020", "Counting floor", "below the floor", "full ranking", "943"):
        assert part in said
    assert "Model alone" not in said
    assert all(one["name"] in said for one in systems(REPORT))  # what the page calls it, the table calls it


def test_titles_are_printed_as_they_are(capsys):
    new = {"title": "[bold]Ran[/] (1985)", "item_id": "7", "score": 0.25, "source": "memory", "because": []}
    print_lists({"user": "u[1]", "history": ["Star Wars", "七人の侍"], "more": 0, "recommendations": [new]})
    said = capsys.readouterr().out
    assert (
        "[bold]Ran[/] (1985)" in said and "七人の侍" in said and "0.250" in said and "memory" in said and "u[1]" in said
    )
