import json

import pytest

from m6rec_jax.artifacts.atomic import write_json
from m6rec_jax.cli import SUCCESS, main
from m6rec_jax.cli.tables import print_comparison

ROW = {
    "a": "runs/[a]",
    "b": "b",
    "mean_a": 0.2,
    "mean_b": 0.1,
    "difference": 0.1,
    "ci95": (0.05, 0.15),
    "relative": 1.0,
}
SURE = {**ROW, "metric": "ndcg@10", "p": 0.0001, "p_holm": 0.0002, "winner": "runs/[a]"}
UNSURE = {**ROW, "metric": "recall@10", "p": 0.2, "p_holm": 0.2, "winner": None}


def test_the_table_names_winners_and_says_where_there_is_none(capsys):
    print_comparison({"split": "valid", "users": 1234, "method": "Paired.", "protocol": "All.", "rows": [SURE, UNSURE]})
    lines = capsys.readouterr().out.splitlines()
    sure, unsure = (next(line for line in lines if name in line) for name in ("ndcg@10", "recall@10"))
    assert sure.count("runs/[a]") == 2 and "< 0.001" in sure and "+0.1000" in sure
    assert "0.2000" in unsure and "not" in unsure and "1,234 users" in lines[0]
    assert "significant" in " ".join(lines)


def test_the_verb_hands_over_its_options_and_writes_json(tmp_path, monkeypatch, capsys):
    asked = []

    def compare(*options):
        asked.append(options)
        return {"split": "valid", "users": 3, "method": "m", "protocol": "p", "rows": [SURE]}

    monkeypatch.setattr("m6rec_jax.recommend.compare.compare", compare)
    out = tmp_path / "comparison.json"
    argv = ["compare", "a", "b", "--split", "valid", "--metric", "mrr@5", "--metric", "mrr@5", "--out", str(out)]
    assert main(argv) == SUCCESS
    assert asked == [(["a", "b"], "valid", ["mrr@5"], None)]
    write_json(tmp_path / "same.json", {"rows": [SURE]})
    assert json.loads(out.read_text())["rows"] == json.loads((tmp_path / "same.json").read_text())["rows"]
    assert main(["compare", "a", "b"]) == SUCCESS
    assert asked[1] == (["a", "b"], "test", ["ndcg@10", "recall@10"], None)
    assert str(out) in capsys.readouterr().err


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_tables_need_no_pages(module, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    for name in [n for n in sys.modules if n in ("m6rec_jax.recommend.wording", "m6rec_jax.recommend.evaluate")]:
        monkeypatch.delitem(sys.modules, name)
    import m6rec_jax.recommend.evaluate
    import m6rec_jax.recommend.wording

    assert m6rec_jax.recommend.wording.systems({"metrics": {"ndcg@10": 0.1}})[0]["name"] == "Model with memory"
