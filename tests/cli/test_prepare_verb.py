"""`m6rec prepare` from files on disk to a dataset that `m6rec verify` accepts, and its refusals."""

import pytest
import yaml

from m6rec_jax.cli import SUCCESS, WRONG_INPUT, main
from m6rec_jax.data.dataset import open_dataset
from tests.fixtures import tiny_tables


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    tables = tiny_tables()
    tables["events"].write_csv(folder / "events.csv")
    tables["items"].write_ndjson(folder / "items.jsonl")
    body = {
        "name": "shop",
        "events": {"path": "events.csv", "format": "csv", "user": "u", "item": "i", "time": "t", "time_unit": "s"},
        "items": {"path": "items.jsonl", "format": "jsonl", "id": "id", "title": "title", "categories": "group"},
        "split": "leave-one-out",
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(body))
    return folder / "card.yaml"


def test_files_become_a_dataset_that_verifies(card, capsys):
    out = card.parent / "dataset"
    argv = ["prepare", "--card", str(card), "--out", str(out), "--vocab-size", "500"]
    assert main(argv) == SUCCESS
    said = capsys.readouterr()
    assert said.out == "" and f"wrote {out}: 56 items, 60 users" in said.err
    assert open_dataset(out).levels == 1
    assert main(["verify", str(out)]) == SUCCESS
    assert main(argv) == SUCCESS  # the same again costs nothing and changes nothing
    capsys.readouterr()
    assert main([*argv, "--levels", "3"]) == WRONG_INPUT  # but another dataset is not put in its place
    assert str(out) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path": "nothing.csv"}, "nothing.csv"),
        ({"user": "uid"}, "uid"),
        ({"usr": "u"}, "usr"),
    ],
)
def test_a_wrong_card_is_exit_2_and_one_line_with_card_and_way_out(card, tmp_path, change, says, capsys):
    body = yaml.safe_load(card.read_text())
    body["events"] |= {"path": str(card.parent / "events.csv")} | change
    body["items"]["path"] = str(card.parent / "items.jsonl")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(body))
    assert main(["prepare", "--card", str(tmp_path / "wrong.yaml"), "--out", str(tmp_path / "out")]) == WRONG_INPUT
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert says in last and "wrong.yaml" in last and "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_a_card_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["prepare", "--card", str(tmp_path / "no.yaml"), "--out", str(tmp_path / "out")]) == WRONG_INPUT
    assert "no.yaml" in capsys.readouterr().err.splitlines()[-1]
