"""`m6rec data card` and `m6rec data fetch`: a draft that prepare takes as it is, and refusals of one line."""

from m6rec_jax.cli import SUCCESS, WRONG_INPUT, main
from tests.fixtures import tiny_tables


def test_a_drafted_card_is_ready_to_prepare(tmp_path, capsys):
    tables = tiny_tables()
    raw = tmp_path / "raw"
    raw.mkdir()
    tables["events"].rename({"u": "user_id", "i": "item_id", "t": "timestamp"}).write_csv(raw / "events.csv")
    tables["items"].rename({"id": "item_id"}).write_ndjson(raw / "items.jsonl")
    card = tmp_path / "cards" / "card.yaml"  # not beside the tables: its paths must still lead to them
    assert main(["data", "card", "--from", str(raw), "--out", str(card)]) == SUCCESS
    assert main(["prepare", "--card", str(card), "--out", str(tmp_path / "out"), "--vocab-size", "500"]) == SUCCESS
    assert "56 items, 60 users" in capsys.readouterr().err
    assert main(["data", "card", "--from", str(raw)]) == SUCCESS
    assert "events.csv" in capsys.readouterr().out


def test_an_empty_folder_and_an_unknown_name_are_one_line(tmp_path, capsys):
    assert main(["data", "card", "--from", str(tmp_path)]) == WRONG_INPUT
    assert main(["data", "fetch", "ml-100kk", "--out", str(tmp_path / "x")]) == WRONG_INPUT
    first, second = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in first and "ml-100kk" in second and "registered: ml-100k" in second
    argv = ["data", "fetch", "ml-100k", "--out", str(tmp_path / "x"), "--source", str(tmp_path / "none.zip")]
    assert main(argv) == WRONG_INPUT
    assert "none.zip" in capsys.readouterr().err and not (tmp_path / "x" / "card.yaml").exists()
