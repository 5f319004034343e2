import json
import re
import shutil
from dataclasses import asdict, replace

import jax
import numpy as np
import polars as pl
import pytest
from matplotlib.image import imread

from m6rec_jax.artifacts.checkpoints import load_params
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.prepare import prepare
from m6rec_jax.data.privacy import hide_id
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.recommend.charts import charts_of, write_charts
from m6rec_jax.recommend.coldstart import SOURCES
from m6rec_jax.recommend.evaluate import ValidationEvaluator, evaluate
from m6rec_jax.recommend.facts import facts_of, target_values
from m6rec_jax.recommend.gate import load_gate
from m6rec_jax.recommend.gating import fit_gate
from m6rec_jax.recommend.generate import generate
from m6rec_jax.recommend.histories import Past, held_out, interactions
from m6rec_jax.recommend.recommender import Recommender
from m6rec_jax.recommend.report import write_report
from tests.fixtures import tiny_card, tiny_tables

BASELINES = {"popularity", "item_knn", "counting_floor"}
MEASURES = {
    "ndcg@5",
    "ndcg@10",
    "recall@5",
    "recall@10",
    "mrr@10",
    "coverage@10",
    "novelty@10",
    "gini@10",
    "valid_id_rate",
    "hit_rate@1",
    "f1@10",
    "map@10",
    "accuracy@5",
    "diversity@10",
    "serendipity@10",
    "recent@10",
    "category_coverage@10",
}


@pytest.fixture(scope="module")
def measured(tiny_run, tiny_dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "report.json"
    return evaluate(tiny_run, "test", out, tiny_dataset), out, open_dataset(tiny_dataset)


def test_report_has_the_keys_of_the_contract(measured):
    report, out, data = measured
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(json.dumps(report))
    for key in ("schema", "protocol", "ties", "split", "users", "seed", "metrics", "ci95", "baselines", "model_alone"):
        assert key in report
    assert (report["schema"], report["split"], report["users"]) == ("evaluation", "test", len(held_out(data, "test")))
    assert set(report["baselines"]) == BASELINES
    for scores in (report["metrics"], report["model_alone"], *report["baselines"].values()):
        assert set(scores) >= MEASURES
        assert all(0 <= value <= 1 for value in scores.values())
        assert scores["valid_id_rate"] == 1.0
    assert set(report["beyond"]) == {"model", "model_alone", *BASELINES}
    # Popularity shows what all had: far more popular than what its users had themselves.
    assert (
        report["beyond"]["popularity"]["popularity_lift@10"] > 0 and "log2(users)" in report["conventions"]["Novelty"]
    )
    for name, (low, high) in report["ci95"].items():
        assert low <= report["metrics"][name] <= high
    for name, bounds in report["intervals"].items():
        scores = report["model_alone"] if name == "model_alone" else report["baselines"][name]
        assert bounds["ndcg@10"][0] <= scores["ndcg@10"] <= bounds["ndcg@10"][1]
    assert 0 < report["comparison"]["counting_floor"]["p"] <= 1
    above = report["metrics"]["ndcg@10"] > report["baselines"]["counting_floor"]["ndcg@10"]
    assert report["above_floor"] == above and ("below" in report["verdict"] or "above" in report["verdict"])
    assert "Leave-one-out" in report["protocol"] and "row order" in report["ties"]


def test_the_seed_is_the_runs_and_looks_at_test_targets_are_counted(tiny_run, tiny, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("looks.jsonl"))
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["config"]["train"]["seed"] = 17
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    first = evaluate(run, "test", dataset=tiny)
    assert evaluate(run, "valid", dataset=tiny)["looks"] == first["looks"] == 1
    second = evaluate(run, "test", dataset=tiny, bootstrap_seed=3)
    assert (second["seed"], second["bootstrap_seed"], first["seed"], first["bootstrap_seed"]) == (17, 3, 17, 0)
    assert second["ci95"] != first["ci95"] and second["metrics"] == first["metrics"] and second["looks"] == 2
    looks = [json.loads(line) for line in (run / "looks.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [set(look) for look in looks] == [{"time", "code", "split", "step", "dataset"}] * 2
    assert {(look["split"], look["step"], look["code"]) for look in looks} == {("test", first["step"], first["code"])}


def test_per_user_vectors_average_to_the_report(measured):
    report, out, data = measured
    users = pl.read_parquet(out.with_name("report.users.parquet"))
    assert users.height == report["users"]
    for name, scores in (("model", report["metrics"]), ("model_alone", report["model_alone"]), *report["baselines"].items()):  # fmt: skip
        for measure in ("ndcg@10", "recall@5", "mrr@10"):
            assert users[f"{name}/{measure}"].mean() == pytest.approx(scores[measure], abs=1e-6)
        assert ((users[f"{name}/rank"] > 0).mean()) == pytest.approx(scores["recall@10"])
    asked = held_out(data, "test")
    assert users["target"].to_list() == [data.item_ids[t] for t in asked.targets]
    difference = (users["model/ndcg@10"] - users["counting_floor/ndcg@10"]).mean()
    assert report["comparison"]["counting_floor"]["difference"] == pytest.approx(difference, abs=1e-6)


def test_groups_curves_and_calibration_add_up_to_the_report(measured, tiny_run, tiny):
    report, out, data = measured
    users, asked = pl.read_parquet(out.with_name("report.users.parquet")), held_out(data, "test")
    groups = report["groups"]
    for part in (("few events", "middling events", "many events"), ("new target", "known target"), ("head category", "tail category")):  # fmt: skip
        assert sum(groups[name]["users"] for name in part) == report["users"]
        mean = sum(groups[n]["users"] * groups[n]["metrics"]["model"]["ndcg@10"] for n in part if groups[n]["users"])
        assert mean / report["users"] == pytest.approx(report["metrics"]["ndcg@10"])
    unseen = ~data.seen[asked.targets]
    assert groups["new target"]["users"] == unseen.sum()
    few = users.filter(pl.col("history") <= int(groups["few events"]["says"].split()[2]))
    assert few["model/ndcg@10"].mean() == pytest.approx(groups["few events"]["metrics"]["model"]["ndcg@10"])
    coverage = report["curves"]["coverage"]
    assert coverage["k"] == list(range(1, 11)) and coverage["model"][-1] == report["metrics"]["coverage@10"]
    assert coverage["model"] == sorted(coverage["model"])
    tiers = report["curves"]["popularity"]
    assert all(sum(tiers[name]) == pytest.approx(1) for name in tiers if name != "tiers")
    assert tiers["popularity"][0] > tiers["histories"][0] > tiers["catalogue"][0]  # most popular items, shown most
    calibration = report["calibration"]
    lists = Recommender.load(tiny_run, dataset=tiny).recommend_histories(asked)
    counted = int(((lists.rows >= 0) & (lists.sources != SOURCES.index("popularity"))).sum())
    assert calibration["places"] == counted == sum(b["n"] for b in calibration["bins"])
    hits = sum(b["n"] * b["hit"] for b in calibration["bins"])
    assert hits == pytest.approx(counted / 10 * report["metrics"]["recall@10"], abs=2) and hits > 0
    mean = sum(b["n"] * b["p"] for b in calibration["bins"]) / counted
    assert mean == pytest.approx(np.exp(lists.scores[lists.rows >= 0]).mean(), rel=0.05)


def test_newest_items_are_dated_by_their_first_training_event(measured):
    report, _, data = measured
    events = pl.read_parquet(data.path / "events.parquet").filter(pl.col("split") == 0)
    first = events.group_by("item").agg(pl.col("time").min())
    facts, said = facts_of(data, interactions(data))
    since = np.quantile(first["time"].to_numpy(), 0.9, method="higher")
    wanted = set(first.filter(pl.col("time") >= since)["item"].to_list()) | set(np.flatnonzero(~data.seen).tolist())
    assert set(np.flatnonzero(facts.recent).tolist()) == wanted and said == report["recent"]
    assert said["share_of_catalogue"] == len(wanted) / data.catalogue and said["dated_by"] == "the first training event"
    assert 0 < report["baselines"]["item_knn"]["recent@10"] < 1


def test_ratings_types_and_dates_are_used_where_there_are_any(tiny_run, tmp_path):
    tables = tiny_tables()
    rating = pl.Series([float(1 + n % 5) if n % 3 else None for n in range(tables["events"].height)])
    year = [1990 + n // 2 for n in range(tables["items"].height)]
    tables["events"] = tables["events"].with_columns(r=rating)
    tables["items"] = tables["items"].with_columns(y=pl.Series(year), sort=pl.Series(["toy", "tool"] * 28))
    card = tiny_card(tables)
    card["events"] |= {"value": "r"}
    card["items"] |= {"published": "y", "type": "sort"}
    data = prepare(card, tmp_path / "rated", like=tiny_run)
    facts, said = facts_of(data, interactions(data))
    newest = {int(data.item_ids[row].removeprefix("item-")) for row in np.flatnonzero(facts.recent)}
    assert said["dated_by"].startswith("published") and min(newest) >= 48 and len(newest) >= 5
    asked = held_out(data, "test")
    values = target_values(data, asked, "test")
    given = {(u, i, t): r for u, i, t, r in tables["events"].select("u", "i", "t", "r").iter_rows()}
    wanted = [given[data.users["user_id"][u], data.item_ids[i], t] for u, i, t in zip(asked.users.tolist(), asked.targets, asked.target_times.tolist(), strict=True)]  # fmt: skip
    assert [None if np.isnan(v) else v for v in values] == wanted and None in wanted
    report = evaluate(tiny_run, "test", dataset=data)
    said = report["beyond"]["item_knn"]
    assert 1 <= said["satisfaction@10"] <= 5 and 0 < said["satisfaction_coverage@10"] < 1
    assert report["metrics"]["type_coverage@10"] == 1.0


def test_without_ratings_nothing_is_said_of_satisfaction(measured):
    report, *_ = measured
    assert all(set(more) == {"popularity_lift@10"} for more in report["beyond"].values())
    assert "type_coverage@10" not in report["metrics"] and "satisfaction" not in json.dumps(report["groups"])


def test_charts_are_pictures_of_the_report(measured, tmp_path):
    report, *_ = measured
    made = write_charts(report, tmp_path / "charts")
    assert [path.stem for path in made] == ["ndcg-10", "recall-10", "coverage", "calibration", "popularity"]
    for path in made:
        picture = imread(path)
        assert min(picture.shape[:2]) > 300 and len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 20
        assert (picture[:10, :10, :3] == 1).all()  # white paper
    bare = {"metrics": report["metrics"], "ci95": {}, "baselines": {}}
    assert [one.name for one in charts_of(bare)] == ["ndcg-10", "recall-10"]


def test_the_gate_is_fitted_on_validation_and_stored_once(measured, tiny_run):
    report, _, data = measured
    gate = load_gate(tiny_run / "gate.json")
    assert gate.users <= len(held_out(data, "valid")) and gate.step == report["step"] and gate.gain >= -1e-6
    before = (tiny_run / "gate.json").stat().st_mtime_ns
    assert fit_gate(tiny_run, data) == gate
    assert (tiny_run / "gate.json").stat().st_mtime_ns == before


def test_fitting_the_gate_counts_the_users(tiny_run, tiny, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("gate.json"))
    gate = fit_gate(run, tiny)
    said = capsys.readouterr().err
    assert (
        f"gate of the memory: {gate.users} users\n" in said and f"gate of the memory: done, {gate.users} users" in said
    )


def test_a_gate_speaks_for_its_own_parameters_and_data_only(measured, tiny_run, tiny, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    file = run / "gate.json"
    kept, gate = file.read_bytes(), load_gate(file)
    assert gate.dataset == tiny.digest
    other = prepare(tiny_card(tiny_tables(seed=5)), tmp_path / "other", like=run)
    report = evaluate(run, "test", dataset=other)
    assert report["gate"]["dataset"] == other.digest and report["gate"] != asdict(gate)
    assert "not kept with the run" in capsys.readouterr().err and file.read_bytes() == kept
    replace(gate, step=gate.step + 1).save(file)
    young = Recommender.load(run)
    assert young.gate is None and f"fitted beside step {gate.step + 1}" in capsys.readouterr().err
    asked = held_out(tiny, "test")
    for _ in range(2):
        assert set(young.recommend_histories(asked).routes) == {"model"}
    assert capsys.readouterr().err.count("recommends alone") == 1
    assert fit_gate(run, tiny) == gate and load_gate(file) == gate


@pytest.fixture(scope="module")
def parameters(tiny_run):
    run = read_run(tiny_run)
    blueprint = Blueprint(run.config.model, run.vocab, run.content_width)
    return blueprint, jax.device_get(load_params(tiny_run, "best", blueprint.shapes())[1])


def test_training_sees_what_evaluation_measures(tiny_run, tiny, parameters):
    blueprint, params = parameters
    seen = ValidationEvaluator(blueprint, tiny, length=64)(params)
    report = evaluate(tiny_run, "valid", dataset=tiny)
    assert {name: report["model_alone"][name] for name in seen} == pytest.approx(seen)
    assert "the gate has seen the targets" in report["protocol"]


def test_evaluator_takes_new_parameters_and_a_fixed_sample(tiny, parameters):
    blueprint, params = parameters
    evaluator = ValidationEvaluator(blueprint, tiny, length=64)
    good = evaluator(params)
    assert set(good) == {"ndcg@10", "recall@10"}
    worse = evaluator(jax.tree.map(np.zeros_like, params))
    assert worse != good and evaluator(params) == good
    some = [ValidationEvaluator(blueprint, tiny, length=64, users=9, seed=s) for s in (1, 1, 2)]
    assert len(some[0].asked) == 9 and np.array_equal(some[0].asked.users, some[1].asked.users)
    assert not np.array_equal(some[0].asked.users, some[2].asked.users)


def test_code_levels_kinds_and_searches_evaluate_too(levels_run, tiny_levels):
    report = evaluate(levels_run, "test", dataset=tiny_levels)
    assert report["metrics"]["valid_id_rate"] == 1.0 and report["metrics"]["fill@10"] == 1.0
    assert set(report["routes"]) <= {"model+memory", "popularity"}


def test_bad_requests_end_in_one_line(tiny_run, tmp_path):
    with pytest.raises(InputError, match="split=train"):
        evaluate(tiny_run, "train")
    moved = tmp_path / "moved"
    shutil.copytree(tiny_run, moved)
    record = json.loads((moved / "run.json").read_text(encoding="utf-8"))
    record["datasets"][0]["path"] = "/nowhere/dataset"
    (moved / "run.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match="/nowhere/dataset.*--dataset"):
        evaluate(moved)


def test_generate_writes_lists_for_known_and_unknown_users(tiny_run, tiny, tiny_dataset, tmp_path):
    out = tmp_path / "recs.parquet"
    generate(tiny_run, tiny_dataset, out=out)
    table = pl.read_parquet(out)
    whole = Past(tiny).all()
    ids = tiny.users["user_id"].gather(whole.users).to_list()
    assert table["user_id"].unique(maintain_order=True).to_list() == ids and table.height == 10 * len(ids)
    for user, history in zip(ids, whole.items, strict=True):
        assert not set(table.filter(pl.col("user_id") == user)["item_id"]) & {tiny.item_ids[i] for i in history}
    generate(tiny_run, tiny_dataset, users=["stranger", ids[5], "stranger"], out=out)  # another job, same file
    table = pl.read_parquet(out)
    assert table["user_id"].to_list() == ["stranger"] * 10 + [ids[5]] * 10
    assert table["route"].to_list() == ["popularity"] * 10 + ["model+memory"] * 10
    generate(tiny_run, tiny_dataset, limit=2, engine="popularity", k=2, out=out)
    assert pl.read_parquet(out)["source"].to_list() == ["popularity"] * 4


def test_users_that_the_dataset_does_not_know_are_spoken_of(tiny_run, tiny, tiny_dataset, tmp_path, capsys):
    out = tmp_path / "recs.parquet"
    generate(tiny_run, tiny_dataset, users=["u5", "who", "u6", "who"], out=out)
    assert "1 of 3 ids are not in" in capsys.readouterr().err
    generate(tiny_run, tiny_dataset, users=["u5"], out=out)
    assert "not in" not in capsys.readouterr().err
    with pytest.raises(InputError, match=r"none of the 2 ids is in .*users\.parquet"):
        generate(tiny_run, tiny_dataset, users=["who", "else"], out=out)
    with pytest.raises(InputError, match="engine=best: unknown"):
        generate(tiny_run, tiny_dataset, users=["u5"], out=out, engine="best")
    with pytest.raises(InputError, match="holds plain ids"):
        generate(tiny_run, tiny_dataset, users=["u5"], out=out, key=out)


def test_raw_ids_are_hidden_where_the_dataset_hides_them(tiny_run, tmp_path):
    key, wrong, out = tmp_path / "key", tmp_path / "wrong", tmp_path / "recs.parquet"
    key.write_bytes(bytes(range(32)))
    wrong.write_bytes(bytes(32))
    card = tiny_card(privacy={"ids": "hmac", "key": str(key)})
    data = prepare(card, tmp_path / "hidden", like=tiny_run)
    first = data.users["user_id"][0]
    generate(tiny_run, data, users=["u5", "stranger", first], out=out, key=key)
    listed = pl.read_parquet(out)
    hashes = [hide_id(raw, key.read_bytes()) for raw in ("u5", "stranger")]
    assert listed["user_id"].unique(maintain_order=True).to_list() == [*hashes, first]
    assert listed["route"].unique(maintain_order=True).to_list() == ["model+memory", "popularity"]
    with pytest.raises(InputError, match="1 of 1 ids are not in .*hashed ids.*or give the key"):
        generate(tiny_run, data, users=["u5"], out=out)
    with pytest.raises(InputError, match="not the key"):
        generate(tiny_run, data, users=["u5"], out=out, key=wrong)
    with pytest.raises(InputError, match="1 of 2 ids are not in .*hashed ids"):
        generate(tiny_run, data, users=["u5", first], out=out)
    with pytest.raises(InputError, match="no such file"):
        generate(tiny_run, data, users=["u5"], out=out, key=tmp_path / "lost")


def test_html_report_is_one_safe_file(measured, tmp_path):
    report, *_ = measured
    rows = [
        *({"step": s, "loss/next-item": 4 - s / 40, "tokens_per_s": 900.0} for s in range(10, 40, 10)),
        {"step": 30, "valid/loss/next-item": 3.3, "valid/unigram/next-item": 3.9, "valid/ndcg@10": 0.1},
    ]
    nasty = "<script>alert('x')</script> & \"q\" 小米"
    samples = [{"user": nasty, "history": [nasty], "more": 3, "recommendations": [
        {"title": nasty, "item_id": "1", "score": 0.25, "source": "memory", "because": [nasty]},
        {"title": "", "item_id": "id-7", "score": 0.1, "source": "model", "because": []},
    ]}]  # fmt: skip
    write_report(tmp_path / "report.html", report, rows, samples, [("Fact", "<b>")])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "小米" in page and "id-7" in page
    for word in ("http://", "https://", "src=", "@import", "url(http"):
        assert word not in page.replace('xmlns="http://www.w3.org/2000/svg"', "").replace('xmlns:xlink="http://www.w3.org/1999/xlink"', "")  # fmt: skip
    assert (
        page.count("<svg") == page.count("</svg>") >= 7
    )  # two bar charts, coverage, calibration, popularity, validation, one task
    assert f"{report['metrics']['ndcg@10']:.4f}" in page and "Counting floor" in page and "next-item" in page
    assert report["verdict"].split(".")[0] in page and "For whom it works" in page and "few events" in page
    assert "#01010" not in page and "var(--accent)" in page and "prefers-color-scheme: dark" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    write_report(tmp_path / "bare.html", report)  # without training rows or samples
    assert "How it learned" not in (tmp_path / "bare.html").read_text(encoding="utf-8")
