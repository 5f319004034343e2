"""Tuning: the task is learnt, the backbone stays as it is, and a stopped tuning ends as one that was not."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from m6rec_jax.artifacts.tuned import TENSORS, backbone_digests, read_tuned
from m6rec_jax.config import ModelConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model import depth, tuning
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.tuning import METHODS, TuneSpec
from m6rec_jax.recommend.metrics.options import of_options
from m6rec_jax.training.tune.rows import TuneRows, epoch, width_for, widths_of
from m6rec_jax.training.tune.run import Backbone, TuneTask, tune
from m6rec_jax.training.tune.settings import LEARNING_RATES, TuneSettings, decays
from m6rec_jax.training.tune.step import TuneState, losses, make_step
from m6rec_jax.vocab import Vocab
from tests.tuning import backbone, options_task, texts_task

CONFIG = ModelConfig(layers=2, width=32, heads=2, ffn=48, dropout=0.1, embed_dropout=0.0)


@pytest.fixture(scope="module")
def frozen():
    return backbone(CONFIG)


def settings(method, **more):
    return TuneSettings(**({"learning_rate": LEARNING_RATES[method], "epochs": 3.0, "rows": 16} | more))


@pytest.mark.parametrize("method", METHODS)
def test_the_task_is_learnt_and_the_backbone_left_alone(frozen, method, tmp_path):
    before = jax.device_get(frozen.params)
    spec = TuneSpec.of(CONFIG, method, 2)
    made = tune(frozen, options_task(), spec, settings(method, epochs=6.0), tmp_path / "out", of_options)
    assert made.metrics["auc"] > 0.8
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.device_get(frozen.params)))
    trained = tuning.from_arrays(spec, CONFIG, made.arrays)
    fresh = depth.begin(spec, frozen.blueprint, frozen.params, 0)
    assert jax.tree.structure(trained) == jax.tree.structure(fresh)
    assert depth.trained(spec, frozen.blueprint) == sum(x.size for x in jax.tree.leaves(trained))
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), trained, fresh)
    assert all(jax.tree.leaves(moved._replace(backbone={})))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {"valid/auc", "loss"} <= {name for row in rows for name in row}
    assert method in (tmp_path / "out" / "card.md").read_text()
