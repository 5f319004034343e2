"""Runs with replaced-token detection: what is trained, logged, saved and taken up again, and what the rest sees of it."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from m6rec_jax.artifacts.checkpoints import step_folder, steps
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.config import (  # fmt: skip
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    MixtureConfig,
    ModelConfig,
    OptimConfig,
    ReplacedConfig,
    TrainConfig,
)
from m6rec_jax.data.domains import joint_pools, joint_vocab, open_domains
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.training.beside import replacing_of
from m6rec_jax.training.metrics import read_rows
from m6rec_jax.training.run import train
from m6rec_jax.training.sharding import make_mesh
from tests.fixtures import tiny_dataset, tiny_levels, tiny_root  # noqa: F401
from tests.training.test_prune import params_of

TASKS = {"next-item": 0.6, "behaviour-replaced": 0.3, "text-replaced": 0.1}
CONFIG = Config(
    model=ModelConfig(layers=1, width=16, heads=2),
    optim=OptimConfig(learning_rate=0.02, warmup=2),
    data=DataConfig(length=64, rows=8, block=512),
    mixture=MixtureConfig(TASKS),
    checkpoint=CheckpointConfig(every=20, keep=4),
    train=TrainConfig(steps=60, log_every=10, eval_every=0, accumulate=2),
    replaced=ReplacedConfig(weight=50.0, reward=0.5, augment=0.3),
)


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory):  # noqa: F811
    return train(CONFIG, [tiny_dataset], tmp_path_factory.mktemp("replaced") / "whole")


def test_both_learn_and_the_log_says_how_well(run):
    rows = [row for row in read_rows(run) if "detection/auc" in row]
    first, last = rows[0], rows[-1]
    assert last["generator/loss"] < first["generator/loss"] - 0.2
    assert last["detection/auc"] > max(0.55, first["detection/auc"])
    assert last["loss/behaviour-replaced"] < first["loss/behaviour-replaced"]
    assert last["loss/next-item"] < first["loss/next-item"]
    assert all(0 < row["detection/replaced"] < 0.3 and row["detection/original"] < 0 for row in rows)
    shown = {name for row in read_rows(run) for name in row if name.startswith("valid/loss")}
    assert shown == {"valid/loss/next-item"}


def test_what_is_served_has_no_generator_and_what_is_taken_up_has_it(run):
    record, params = read_run(run), params_of(run, 60)
    plain = Blueprint(record.config.model, record.vocab, record.content_width).shapes()
    assert jax.tree.structure(params) == jax.tree.structure(plain)
    held = ocp.load_checkpointables(step_folder(run, 60), {"optimizer": None})["optimizer"]["beside"]
    assert set(held["params"]) == set(held["moments"]) == {"generator", "head"}
    assert float(np.abs(held["params"]["head"]["gain"]).sum()) > 0 and float(held["baseline"]) != pytest.approx(np.log(0.5))  # fmt: skip


def test_a_run_resumes_to_the_bit_and_not_with_other_settings(run, tiny_dataset, tmp_path):  # noqa: F811
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(step_folder(again, 60))
    assert steps(again) == [20, 40]
    with pytest.raises(InputError, match=r"replaced.reward was 0.5 and is 0.0 now"):
        train(replace(CONFIG, replaced=ReplacedConfig(weight=50.0, augment=0.3)), [tiny_dataset], again)
    train(CONFIG, [tiny_dataset], again)
    states = [ocp.load_checkpointables(step_folder(r, 60), {"params": None, "optimizer": None}) for r in (run, again)]
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_share_of_nothing_leaves_the_rest_as_it_is_to_the_bit(tiny_dataset, tmp_path):  # noqa: F811
    short = replace(CONFIG, train=replace(CONFIG.train, steps=4), replaced=ReplacedConfig())
    mixtures = {"next-item": 0.6}, {"next-item": 0.6, "behaviour-replaced": 0.0, "text-replaced": 0.0}
    runs = [
        train(replace(short, mixture=MixtureConfig(tasks)), [tiny_dataset], tmp_path / str(number))
        for number, tasks in enumerate(mixtures)
    ]
    for one, other in zip(*(jax.tree.leaves(params_of(r, 4)) for r in runs), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("mixture", "settings", "says"),
    [
        ({"next-item": 1.0}, {"reward": 1.0}, "replaced.reward=1.0: no task of the mixture is of replaced-token detection"),
        ({"next-item": 1.0}, {"augment": 0.2}, "replaced.augment=0.2: no task of the mixture .* or replaced.augment=0"),
        ({"behaviour-replaced": 1.0, "text-causal": 1.0}, {"augment": 0.2}, "reads histories left to right"),
        (TASKS, {"width": 7}, "replaced.width=7: the generator has model.heads=2"),
    ],
)  # fmt: skip
def test_settings_that_ask_for_what_is_not_there_are_refused(tiny_dataset, mixture, settings, says):  # noqa: F811
    refused(tiny_dataset, mixture, ReplacedConfig(**settings), says)


def test_histories_of_spelled_items_are_not_rewritten(tiny_levels):  # noqa: F811
    refused(tiny_levels, TASKS, ReplacedConfig(augment=0.2), "spelled by several codes.*prepare with --levels 1")


def refused(dataset, mixture, settings, says):
    config = replace(CONFIG, mixture=MixtureConfig(mixture), replaced=settings)
    domains = open_domains([dataset])
    blueprint = Blueprint(config.model, joint_vocab(domains), domains[0].dataset.content.shape[1])
    pools = joint_pools(domains, config.mixture, "train", config.data)
    with pytest.raises(InputError, match=says) as error:
        replacing_of(config, blueprint, [pool.task for pool in pools], make_mesh(MeshConfig()))
    assert "\n" not in str(error.value)
