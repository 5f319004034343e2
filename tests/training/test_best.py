"""`train.best` chooses the checkpoint: training, patience, what is kept, and runs taken up with another figure follow it."""

import json
from dataclasses import replace

import pytest

from m6rec_jax.artifacts.atomic import write_json
from m6rec_jax.artifacts.checkpoints import best_step, pick_step, steps
from m6rec_jax.artifacts.schemas import RUN
from m6rec_jax.config import MixtureConfig
from m6rec_jax.errors import InputError
from m6rec_jax.training.loop import _best_so_far
from m6rec_jax.training.run import train
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401
from tests.training.test_guards import little
from tests.training.test_run import CONFIG

FIGURES = {  # of validations 1, 2, ...
    "ndcg@10": (0.5, 0.3, 0.2, 0.1, 0.4),
    "loss/one": (3.0, 2.0, 2.5, 2.4, 2.3),
    "auc/click": (0.6, 0.7, 0.9, 0.7, 0.8),
    "log_likelihood/say": (-9.0, -8.0, -7.5, -7.0, -7.2),
}
BEST = {"ndcg@10": 1, "loss/one": 2, "auc/click": 3, "log_likelihood/say": 4}


def figures():
    rows = iter(zip(*FIGURES.values(), strict=True))
    return lambda w: dict(zip(FIGURES, next(rows), strict=True))


@pytest.mark.parametrize("name", BEST)
def test_patience_counts_from_the_best_by_the_figure_that_is_set(tmp_path, name, capsys):
    little(tmp_path / "run", validate=figures(), steps=9, eval_every=1, patience=1, best=name)
    assert steps(tmp_path / "run")[-1] == BEST[name] + 1
    value = FIGURES[name][BEST[name] - 1]
    assert f"no better {name} than {value:.4f} in 1 validations" in capsys.readouterr().err
    little(tmp_path / "run", steps=9, eval_every=1, patience=1, best=name)  # taken up: it ended there
    assert steps(tmp_path / "run")[-1] == BEST[name] + 1
    assert f"in an earlier run: no better {name} than {value:.4f}" in capsys.readouterr().err


def test_a_run_taken_up_with_another_figure_counts_all_its_validations_by_that(tmp_path):
    """By ndcg@10 patience was over after step 3; by the AUC, best in step 3, it is not."""
    validate = figures()
    little(tmp_path / "run", validate=validate, steps=9, eval_every=1, patience=2)
    assert steps(tmp_path / "run")[-1] == 3
    little(tmp_path / "run", validate=validate, steps=9, eval_every=1, patience=2, best="auc/click")
    assert steps(tmp_path / "run")[-1] == 5


def test_a_validation_that_is_no_number_is_never_the_best_of_a_run_taken_up(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    rows = [
        {"valid/loss/one": 2.0, "valid/x": 1.0},
        {"valid/loss/one": 1.0, "valid/x": float("nan")},
        {"valid/loss/one": 2.1},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": -2 + n} | row) + "\n" for n, row in enumerate(rows)))
    assert _best_so_far(run, "loss/one", 0) == (2.0, 2)
    assert _best_so_far(run, "loss/one", -2) == (2.0, 0) and _best_so_far(run, "auc/a", 0) == (None, 0)


def test_an_unknown_figure_ends_the_first_validation(tmp_path):
    with pytest.raises(
        InputError, match=r"train.best=auc/clik: .* name one of auc/click, log_likelihood/say, loss/one, ndcg@10$"
    ):
        little(tmp_path / "run", validate=figures(), steps=9, eval_every=2, best="auc/clik")
    assert steps(tmp_path / "run")[-1] == 2  # what was learnt until then is saved


@pytest.mark.parametrize("name", BEST)
def test_the_best_is_kept_beside_the_newest_and_is_what_is_loaded(tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "run.json", {"schema": RUN.name, "version": RUN.version, "config": {"train": {"best": name}}})
    little(run, validate=figures(), steps=5, eval_every=1, best=name, keep=1)
    assert steps(run) == sorted({BEST[name], 5}) and best_step(run) == pick_step(run, "best") == BEST[name]
    write_json(run / "run.json", {"schema": RUN.name, "version": RUN.version, "config": {"train": {}}})
    assert best_step(run) == (1 if name == "ndcg@10" else 5)  # of before the setting: by ndcg@10, whose 0.4 is step 5's


class Evaluator:
    """One that tells what it measures."""

    names = ("ndcg@10", "auc/click")

    def __init__(self, *_): ...


def test_an_unknown_figure_is_refused_before_anything_is_made_where_the_known_are_told(tiny_dataset, tmp_path):  # noqa: F811
    config = replace(CONFIG, mixture=MixtureConfig({"next-item": 1.0}), train=replace(CONFIG.train, best="auc/clik"))
    with pytest.raises(InputError, match=r"train.best=auc/clik: .* name one of auc/click, loss/next-item, ndcg@10$"):
        train(config, [tiny_dataset], tmp_path / "run", make_evaluator=Evaluator)
    with pytest.raises(InputError, match=r"train.best=auc/click: .* name one of loss/next-item$"):
        train(replace(config, train=replace(CONFIG.train, best="auc/click")), [tiny_dataset], tmp_path / "run")
    assert not (tmp_path / "run").exists()
