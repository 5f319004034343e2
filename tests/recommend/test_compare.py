import json
import shutil

import numpy as np
import polars as pl
import pytest

from m6rec_jax.data.prepare import prepare
from m6rec_jax.errors import InputError
from m6rec_jax.recommend import metrics
from m6rec_jax.recommend.compare import compare
from m6rec_jax.recommend.evaluate import evaluate
from tests.fixtures import tiny_card, tiny_tables


@pytest.fixture(scope="module")
def report(tiny_run, tiny_dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("reports") / "one.json"
    evaluate(tiny_run, "valid", out, tiny_dataset)
    return out


def copy(report, to, change=lambda body: None, users=lambda table: table):
    """The report under another name, with changes."""
    body = json.loads(report.read_text(encoding="utf-8"))
    change(body)
    to.write_text(json.dumps(body), encoding="utf-8")
    users(pl.read_parquet(report.with_name("one.users.parquet"))).write_parquet(to.with_name(f"{to.stem}.users.parquet"))  # fmt: skip
    return to


def better(table):
    """Half of the users get a perfect list; rows in another order."""
    gained = pl.when(pl.int_range(pl.len()) % 2 == 0).then(1.0).otherwise(pl.col("model/ndcg@10")).cast(pl.Float32)
    return table.with_columns(gained.alias("model/ndcg@10")).reverse()


def test_pairs_are_tested_on_the_same_users_and_corrected_together(report, tmp_path):
    good = copy(report, tmp_path / "good.json", users=better)
    same = copy(report, tmp_path / "same.json")
    made = compare([report, good, same], "valid", ["ndcg@10", "recall@10"])
    assert len(made["rows"]) == 6 and made["users"] == pl.read_parquet(report.with_name("one.users.parquet")).height
    rows = {(row["a"], row["b"], row["metric"]): row for row in made["rows"]}
    first = rows[str(report), str(good), "ndcg@10"]
    a, b = (pl.read_parquet(p.with_name(f"{p.stem}.users.parquet")).sort("user_id")["model/ndcg@10"].to_numpy() for p in (report, good))  # fmt: skip
    assert first["difference"] == pytest.approx(float((a - b).mean()), abs=1e-6) and first["difference"] < 0
    assert first["ci95"][0] < first["difference"] < first["ci95"][1] < 0
    assert first["p"] == metrics.paired_randomisation(a, b) and first["winner"] == str(good)
    assert [row["p_holm"] for row in made["rows"]] == metrics.holm([row["p"] for row in made["rows"]])
    assert first["p_holm"] > first["p"]
    nothing = rows[str(report), str(same), "recall@10"]
    assert (nothing["difference"], nothing["p_holm"], nothing["winner"]) == (0, 1.0, None)


def test_what_was_not_measured_alike_is_refused(report, tmp_path):
    def refused(says, change=lambda body: None, users=lambda table: table):
        with pytest.raises(InputError, match=says):
            compare([report, copy(report, tmp_path / "other.json", change, users)], "valid")

    refused("dataset is 'tiny' in one, 'shop' in the other", lambda body: body["dataset"].update(name="shop"))
    refused("split rule is", lambda body: body["dataset"].update(split="ratio"))
    refused("protocol is", lambda body: body.update(protocol="sampled ranking"))
    refused("a report on test, not on valid; say --split test", lambda body: body.update(split="test"))
    refused("schema evaluation 99", lambda body: body.update(version=99))
    refused("no report of `m6rec evaluate`", lambda body: body.pop("looks"))
    refused("users or targets differ", users=lambda t: t.with_columns(user_id=pl.col("user_id") + "x"))
    refused("users or targets differ", users=lambda t: t.with_columns(target=pl.col("target").reverse()))
    refused("users where .* speaks of", users=lambda t: t.head(5))
    refused("--metric ndcg@10: .*it has", users=lambda t: t.drop("model/ndcg@10"))
    with pytest.raises(InputError, match="named twice"):
        compare([report, report], "valid")
    (tmp_path / "other.users.parquet").unlink()
    with pytest.raises(InputError, match=r"other.users.parquet: missing"):
        compare([report, tmp_path / "other.json"], "valid")


def test_a_run_is_evaluated_once_and_a_look_is_said(tiny_run, tiny_dataset, tmp_path, capsys):
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("looks.jsonl", "reports"))
    made = compare(runs, "test", ["mrr@5"], tiny_dataset)
    assert capsys.readouterr().err.count("a look at its test targets") == 2
    assert [one["looks"] for one in made["compared"]] == [1, 1] and made["rows"][0]["winner"] is None
    assert compare(runs, "test", ["mrr@5"], tiny_dataset) == made
    assert "evaluating" not in capsys.readouterr().err and len((runs[0] / "looks.jsonl").read_text().splitlines()) == 1
    file = runs[1] / "reports" / "test.json"
    body = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**body, "step": body["step"] - 1}), encoding="utf-8")  # of older parameters
    assert compare(runs, "test", ["mrr@5"], tiny_dataset)["compared"][1]["looks"] == 2


def test_other_codes_over_the_same_events_may_be_compared(tiny_run, report, tmp_path, capsys):
    data = prepare(tiny_card(tiny_tables()), tmp_path / "again", like=tiny_run)
    body = evaluate(tiny_run, "valid", tmp_path / "again.json", data)
    assert np.isfinite(compare([report, tmp_path / "again.json"], "valid")["rows"][0]["p"])
    same = body["dataset"]["digest"] == json.loads(report.read_text(encoding="utf-8"))["dataset"]["digest"]
    assert same != ("prepared differently" in capsys.readouterr().err)
