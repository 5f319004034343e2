"""The demo's bookkeeping: a stage is done once, and its seconds add up over interruptions."""

import pytest

from m6rec_jax.cli.demo import Stages
from m6rec_jax.cli.tables import print_lists, print_report
from m6rec_jax.errors import InputError


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
    assert stages.known["train"]["done"] and stages.seconds() == {"train": 7.0, "total": 7.0}


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
    for part in ("0.0912 ± 0.0050", "0.0439 ± 0.0020", "counting floor", "below the floor", "full ranking", "943"):
        assert part in said
    assert "model alone" not in said


def test_titles_are_printed_as_they_are(capsys):
    new = {"title": "[bold]Ran[/] (1985)", "item_id": "7", "score": 0.25, "source": "memory", "because": []}
    print_lists({"user": "u[1]", "history": ["Star Wars", "七人の侍"], "more": 0, "recommendations": [new]})
    said = capsys.readouterr().out
    assert (
        "[bold]Ran[/] (1985)" in said and "七人の侍" in said and "0.250" in said and "memory" in said and "u[1]" in said
    )
