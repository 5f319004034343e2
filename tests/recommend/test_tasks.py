"""A mixture with tasks of the dataset's own learns what is planted in them; what cannot be measured is said, never NaN."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss

from m6rec_jax.cli.tables import print_report
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.instances import read_instances
from m6rec_jax.decoding.instances import InstanceScorer
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.recommend import metrics
from m6rec_jax.recommend.evaluate import evaluate
from m6rec_jax.recommend.tasks import TaskEvaluator, asked_tasks, measure, measure_tasks
from m6rec_jax.training.metrics import read_rows
from m6rec_jax.training.run import train
from tests.fixtures import tiny_root  # noqa: F401
from tests.planted import CONFIG, planted, planted_run  # noqa: F401


@pytest.fixture(scope="module")
def dataset(planted):  # noqa: F811
    return open_dataset(planted)


@pytest.fixture(scope="module")
def scorer(planted_run):  # noqa: F811
    return InstanceScorer.load(planted_run)


def test_every_task_beats_chance(dataset, scorer):
    found = measure_tasks(scorer, dataset, "test", ["click", "topic", "retrieval"])
    click, topic, retrieval = (found[name] for name in ("click", "topic", "retrieval"))
    assert click["ci95"]["auc"][0] > 0.6 and click["metrics"]["log_loss"] < 0.6  # nine of ten follow the field
    assert topic["metrics"]["accuracy"] > 0.9  # of three
    assert retrieval["catalogue"] == 24
    assert retrieval["ci95"]["recall@10"][0] > 10 / 24 + 0.1
    assert all(one["notes"] == [] for one in found.values())
    for one in found.values():
        for name, (low, high) in one["ci95"].items():
            assert low <= one["metrics"][name] <= high or one["metrics"][name] == pytest.approx(low)


def test_validation_reports_each_task(planted_run):  # noqa: F811
    last = read_rows(planted_run)[-1]
    assert last["valid/auc/click"] > 0.7
    assert last["valid/accuracy/topic"] > 0.9
    assert last["valid/recall@10/retrieval"] > 0.6
    assert last["valid/unigram/topic"] <= np.log(3) + 1e-6  # over three options, not over all rows of the slice
    assert last["valid/loss/click"] < last["valid/unigram/click"]
    assert "valid/unigram/retrieval" not in last and last["valid/loss/retrieval"] > 0


def test_a_validation_gives_what_it_names_beforehand_so_that_train_best_is_refused_before_training(planted_run, dataset):  # fmt: skip # noqa: F811
    config = CONFIG
    blueprint = Blueprint(config.model, dataset.vocab, dataset.content.shape[1])
    named = TaskEvaluator(blueprint, dataset, config.mixture.tasks, length=config.data.length).names
    last = read_rows(planted_run)[-1]
    given = {name.removeprefix("valid/") for name in last if name.startswith("valid/")}
    assert sorted(named) == sorted(name for name in given if name.split("/")[0] not in ("loss", "unigram"))
    assert {"auc/click", "log_loss/click", "macro_f1/topic", "recall@10/retrieval"} <= set(named)
    with pytest.raises(InputError, match=r"train.best=macro_f1/topik: .* name one of .*macro_f1/topic"):
        train(replace(config, train=replace(config.train, best="macro_f1/topik")), [dataset.path], planted_run / "no", make_evaluator=lambda *of: TaskEvaluator(*of[:2], config.mixture.tasks, length=of[2]))  # fmt: skip
    assert not (planted_run / "no").exists()


def test_the_report_of_evaluate_has_a_part_for_tasks(planted_run, tmp_path, capsys):  # noqa: F811
    report = evaluate(planted_run, "valid", tmp_path / "report.json", tasks="click,topic")
    assert list(json.loads((tmp_path / "report.json").read_text())["tasks"]) == ["click", "topic"]
    print_report(report)
    assert "accuracy" in capsys.readouterr().out


def test_names_of_tasks(dataset, scorer):
    assert asked_tasks(scorer, dataset, "all") == ["click", "topic", "retrieval"]
    assert asked_tasks(scorer, dataset, "none") == []
    assert asked_tasks(scorer, dataset, "topic, click") == ["topic", "click"]
    with pytest.raises(InputError, match="--tasks clicks: no task of .* which has click, topic, retrieval"):
        asked_tasks(scorer, dataset, "clicks")


def labelled(instances, labels):
    records = [replace(record, label=label) for record, label in zip(instances.records, labels, strict=True)]
    return replace(instances, records=records)


def test_one_class_has_no_auc_and_one_line_says_so(dataset, scorer):
    click = read_instances(dataset, "click", "test")
    found = measure(scorer, labelled(click, [1] * len(click)))
    assert "auc" not in found["metrics"] and "gauc" not in found["metrics"]
    assert found["metrics"]["log_loss"] > 0
    assert found["notes"] == [f"all {len(click)} instances are of one class (yes), so no AUC is defined"]
    assert np.isfinite(list(found["metrics"].values())).all()


def test_instances_without_a_label_are_left_out_and_counted(dataset, scorer):
    topic = read_instances(dataset, "topic", "test")
    half = labelled(topic, [-1 if i % 2 else label for i, label in enumerate(topic.labels.tolist())])
    found = measure(scorer, half)
    assert found["instances"] == -(-len(topic) // 2)
    assert found["notes"] == [f"{len(topic) // 2} of {len(topic)} instances have no label and are left out"]
    nothing = measure(scorer, labelled(topic, [-1] * len(topic)))
    assert (nothing["metrics"], nothing["ci95"]) == ({}, {})
    assert nothing["notes"][-1] == "no instance to measure"


def test_classes_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.ones(5), 300)
    labels = np.where(
        rng.random(300) < 0.5, chances.argmax(1), rng.integers(0, 4, 300)
    )  # nobody has class 4 but by choice
    found = metrics.classes(labels, chances)
    assert found["metrics"]["accuracy"] == pytest.approx(accuracy_score(labels, chances.argmax(1)))
    assert found["metrics"]["macro_f1"] == pytest.approx(f1_score(labels, chances.argmax(1), average="macro"))
    assert found["metrics"]["log_loss"] == pytest.approx(log_loss(labels, chances, labels=range(5)))
    for name, (low, high) in found["ci95"].items():
        assert low < found["metrics"][name] < high
    assert metrics.classes(labels[:0], chances[:0]) == {"metrics": {}, "ci95": {}}
