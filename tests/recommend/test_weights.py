"""A run with int8 weights: near the full ones, named in what it writes, measured beside them."""

from __future__ import annotations

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from m6rec_jax.cli import SUCCESS, WRONG_INPUT, main
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.errors import InputError
from m6rec_jax.recommend import metrics
from m6rec_jax.recommend.evaluate import evaluate
from m6rec_jax.recommend.gate import GATE_FILE, load_gate
from m6rec_jax.recommend.gating import with_gate
from m6rec_jax.recommend.generate import generate
from m6rec_jax.recommend.histories import held_out
from m6rec_jax.recommend.recommender import Recommender

# How far, relatively, the log-probability of a listed item may move, on average and at most. Weights are random and
# drawn wide here, so that logits are large; those of a trained run move far less.
MEAN, MOST = 0.02, 0.2


@pytest.fixture
def without_qwix(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)


@pytest.fixture(scope="module")
def report(tiny_run, tiny_dataset, tmp_path_factory):
    """(report with int8, per-user table) of the tiny run."""
    pytest.importorskip("qwix")
    out = tmp_path_factory.mktemp("weights") / "int8.json"
    evaluate(tiny_run, "valid", out, tiny_dataset, weights="int8")
    return json.loads(out.read_text(encoding="utf-8")), pl.read_parquet(out.with_name("int8.users.parquet"))


def test_lists_and_scores_are_near_those_of_full_weights(levels_run, tiny_levels):
    pytest.importorskip("qwix")
    data = open_dataset(tiny_levels)
    full, int8 = (Recommender.load(levels_run, dataset=data, weights=weights) for weights in ("full", "int8"))
    assert int8.model_version == f"{full.model_version}+int8"
    assert {x.dtype for x in jax.tree.leaves(int8.engine.params)} == {jnp.dtype(jnp.int8), jnp.dtype(jnp.float32)}
    asked = held_out(data, "valid")
    a, b = (one.recommend_histories(asked, 10, memory=False) for one in (full, int8))
    assert metrics.member(a.rows, list(b.rows))[a.rows >= 0].mean() > 0.9
    same = (a.rows == b.rows) & (a.rows >= 0)
    assert same.mean() > 0.4
    moved = np.abs(b.scores[same] / a.scores[same] - 1)
    assert 0 < moved.mean() < MEAN and moved.max() < MOST


def test_a_report_has_both_on_the_same_users(report, tiny_run, tiny_dataset, tmp_path):
    body, users = report
    cost = body["weights"]
    assert cost["kept_as"] == "int8" and cost["model_version"].endswith("+int8")
    bytes_of = cost["parameter_bytes"]
    assert 0.25 < bytes_of["int8"] / bytes_of["full"] < 0.6
    for system, mean in (("model", body["metrics"]), ("model_alone", body["model_alone"])):
        assert 0.5 < cost["same_items"][system] <= 1
        for measure in ("ndcg@10", "recall@10"):
            found, ours = cost["difference"][system][measure], cost["metrics"][system][measure]
            assert found["difference"] == pytest.approx(ours - mean[measure])
            assert found["ci95"][0] <= found["difference"] <= found["ci95"][1]
            assert users[f"{system}/{measure}"].mean() == pytest.approx(mean[measure])
            assert users[f"{system}_int8/{measure}"].mean() == pytest.approx(ours)
    assert not users["model_alone/rank"].equals(users["model_alone_int8/rank"])
    plain = evaluate(tiny_run, "valid", None, tiny_dataset)
    assert "weights" not in plain and plain["metrics"] == body["metrics"] and plain["ci95"]["ndcg@10"] == tuple(body["ci95"]["ndcg@10"])  # fmt: skip


def test_a_gate_fitted_beside_int8_is_not_kept_with_the_run(report, tiny_run, tiny_dataset, tmp_path, monkeypatch):
    run, data = tmp_path / "run", open_dataset(tiny_dataset)
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns(GATE_FILE))
    fitted = load_gate(tiny_run / GATE_FILE)  # by `evaluate`, beside full weights
    monkeypatch.setattr("m6rec_jax.recommend.gating._fitted", lambda *_: fitted)
    for weights in ("int8", "full"):
        assert with_gate(Recommender.load(run, dataset=data, weights=weights), run, data).gate == fitted
        assert (run / GATE_FILE).exists() == (weights == "full")


def test_lists_say_int8_and_parts_of_other_weights_do_not_mix(tiny_run, tiny_dataset, tmp_path):
    pytest.importorskip("qwix")
    out, whole = tmp_path / "recs", tmp_path / "recs.parquet"
    out.mkdir()
    asked = {"dataset": tiny_dataset, "users": ["u7", "u9"], "k": 3}
    generate(tiny_run, out=out, **asked)
    with pytest.raises(InputError, match=r"model .*\+int8"):
        generate(tiny_run, out=out, **asked, weights="int8")
    generate(tiny_run, out=whole, **asked, weights="int8")
    versions = {file: pl.read_parquet(file)["model_version"].unique().to_list() for file in (whole, *out.glob("*.parquet"))}  # fmt: skip
    assert len(versions) == 2 and all(len(named) == 1 for named in versions.values())
    assert all(named[0].endswith("+int8") == (file == whole) for file, named in versions.items())
    job = json.loads((tmp_path / "recs.parquet.parts" / "manifest.json").read_text())["job"]
    other = json.loads((out / "manifest.json").read_text())["job"]
    assert {name for name in job if job[name] != other[name]} == {"model"} and set(job) == set(other)


def test_the_verbs_take_weights_and_print_what_they_cost(tiny_run, tiny_dataset, tmp_path, capsys):
    pytest.importorskip("qwix")
    given = ["--run", str(tiny_run), "--dataset", str(tiny_dataset), "--weights", "int8"]
    assert main(["evaluate", *given, "--split", "valid", "--out", str(tmp_path / "r.json")]) == SUCCESS
    said = capsys.readouterr().out
    cost = json.loads((tmp_path / "r.json").read_text())["weights"]
    assert "int8 - full (95 %)" in said and f"{cost['parameter_bytes']['int8']:,} as int8" in said
    assert f"{cost['metrics']['model_alone']['recall@10']:.4f}" in said
    (tmp_path / "users.txt").write_text("u7\n")
    lists = [
        "generate",
        *given,
        "--users",
        str(tmp_path / "users.txt"),
        "--k",
        "2",
        "--out",
        str(tmp_path / "l.parquet"),
    ]
    assert main(lists) == SUCCESS
    [version] = pl.read_parquet(tmp_path / "l.parquet")["model_version"].unique()
    assert version == cost["model_version"]


@pytest.mark.parametrize("verb", [["evaluate"], ["generate", "--users", "all"]])
def test_unknown_weights_and_a_missing_extra_are_one_line(verb, without_qwix, tiny_run, tiny_dataset, tmp_path, capsys):
    argv = [*verb, "--run", str(tiny_run), "--dataset", str(tiny_dataset), "--out", str(tmp_path / "out"), "--weights"]
    for weights, says in (("int4", ("--weights", "'full', 'int8'")), ("int8", ("qwix", "m6rec-jax[quant]"))):
        assert main([*argv, weights]) == WRONG_INPUT
        [line] = capsys.readouterr().err.splitlines()
        assert all(word in line for word in says)
    assert not list(tmp_path.iterdir())


def test_full_weights_do_not_need_the_extra(without_qwix, tiny_run, tiny_dataset):
    one = Recommender.load(tiny_run, dataset=tiny_dataset)
    assert one.engine is not None and "int8" not in one.model_version
    for wrong, says in (("int8", r"m6rec-jax\[quant\]"), ("int4", "one of full, int8")):
        for engine in ("auto", "memory"):  # also where no parameters are loaded
            with pytest.raises(InputError, match=says):
                Recommender.load(tiny_run, dataset=tiny_dataset, weights=wrong, engine=engine)


def test_without_parameters_there_is_nothing_to_keep_as_int8(tiny_run, tiny_dataset, tmp_path):
    pytest.importorskip("qwix")
    shutil.copytree(tiny_run, tmp_path / "young", ignore=shutil.ignore_patterns("checkpoints", GATE_FILE))
    with pytest.raises(InputError, match="no parameters yet"):
        evaluate(tmp_path / "young", "test", None, tiny_dataset, weights="int8")
    assert not (tmp_path / "young" / "looks.jsonl").exists() or (tiny_run / "looks.jsonl").exists()
    assert Recommender.load(tiny_run, dataset=tiny_dataset, engine="memory", weights="int8").model_version.endswith(
        "@none"
    )
