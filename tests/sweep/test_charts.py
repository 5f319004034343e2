"""The pictures of a sweep: drawn where there is something to draw."""

import optuna
import pytest

from m6rec_jax.sweep.charts import _height, draw_importance, draw_lines
from m6rec_jax.sweep.journal import distributions
from m6rec_jax.sweep.report import rows
from m6rec_jax.sweep.space import Choice, Range

METRIC = "ndcg@10"
AXES = [Range("optim.learning_rate", 1e-4, 1e-2, log=True), Choice("model.layers", (1, 2, 4)), Range("model.width", 8, 64, step=8, whole=True)]  # fmt: skip


def test_charts_need_trials(tmp_path):
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(0))
    lines, importance = tmp_path / "lines.png", tmp_path / "importance.png"
    study.ask()  # its settings were never drawn
    assert not draw_lines(lines, rows(study, AXES, METRIC), AXES, METRIC)
    for _ in range(20):
        trial = study.ask(distributions(AXES))
        trial.report(0.1, 1)
        study.tell(trial, trial.params["model.width"] / 64)
    assert draw_lines(lines, rows(study, AXES, METRIC), AXES, METRIC) and draw_importance(
        importance, study, rows(study, AXES, METRIC), METRIC
    )
    assert lines.read_bytes()[:4] == importance.read_bytes()[:4] == b"\x89PNG"
    only = optuna.create_study(direction="maximize")
    only.tell(only.ask(distributions(AXES)), 0.5)
    assert draw_lines(lines, rows(only, AXES, METRIC), AXES, METRIC) and not draw_importance(
        importance, only, rows(only, AXES, METRIC), METRIC
    )


@pytest.mark.parametrize(
    ("axis", "value", "height"),
    [(AXES[0], 1e-4, 0), (AXES[0], 1e-3, 0.5), (AXES[0], 1e-2, 1), (AXES[1], 2, 0.5), (AXES[1], 4, 1), (AXES[2], 36, 0.5), (Choice("a.b", (3,)), 3, 0.5)],
)  # fmt: skip
def test_where_a_value_stands_on_its_scale(axis, value, height):
    assert _height(axis, value) == pytest.approx(height)
