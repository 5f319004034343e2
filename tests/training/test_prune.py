"""Pruned weights: as many as were asked for, the smallest, zero for good, and a resumed run goes on with the same ones."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from m6rec_jax.artifacts.checkpoints import load_params, step_folder, steps
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, PruneConfig, TrainConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.training.metrics import read_rows
from m6rec_jax.training.prune import advanced, fresh, masked, pruned, share_at
from m6rec_jax.training.run import train
from m6rec_jax.vocab import Vocab
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401

PRUNE = PruneConfig(sparsity=0.8, begin=2, end=10, every=2, tables=True)
CONFIG = Config(
    model=ModelConfig(layers=2, shared_layers=True, width=16, embed=8, heads=2),
    optim=OptimConfig(learning_rate=0.02, warmup=2, average=0.5),
    data=DataConfig(length=64, rows=4, block=512),
    checkpoint=CheckpointConfig(every=6, keep=4),
    train=TrainConfig(steps=12, log_every=2, eval_every=0),
    prune=PRUNE,
)
NOT_PRUNED = ("norm", "content")


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory):  # noqa: F811
    return train(CONFIG, [tiny_dataset], tmp_path_factory.mktemp("prune") / "whole")


def params_of(run, step):
    record = read_run(run)
    return load_params(run, step, Blueprint(record.config.model, record.vocab, record.content_width).shapes())[1]


def test_the_share_grows_as_a_cubic_and_ends_at_the_target():
    """Zhu and Gupta 2017, equation 1, from 0."""
    wanted = [1 - (1 - min(max(n - 2, 0) // 2 * 2 / 8, 1)) ** 3 for n in range(14)]
    np.testing.assert_allclose([share_at(PRUNE, jnp.int32(n)) for n in range(14)], wanted, rtol=1e-6)
    assert share_at(PruneConfig(sparsity=0.5, begin=0, end=7, every=3), jnp.int32(7)) == 1


def test_the_smallest_of_each_matrix_go_exactly_as_many_as_asked_for():
    blueprint = Blueprint(replace(CONFIG.model, shared_layers=False, experts=3), Vocab(200, (40,)), 5)
    params = blueprint.init(0)
    params["block"]["gate" if "gate" in params["block"] else "expert_gate"] *= jnp.array([1.0, 9.0])[
        :, None, None, None
    ]
    params["embeddings"]["projection"] = jnp.ones((8, 16))  # of equals as many go
    masks = advanced(PRUNE, fresh(PRUNE, params), params, jnp.int32(10))
    assert masks.kept.keys() == pruned(PRUNE, params).keys()
    for name, kept in masks.kept.items():
        x = pruned(PRUNE, params)[name]
        matrices = x.shape[0] * x.shape[1] if "expert" in name else x.shape[0] if name.startswith("block") else 1
        for values, mask in zip(np.abs(x).reshape(matrices, -1), np.asarray(kept).reshape(matrices, -1), strict=True):
            assert (~mask).sum() == round(0.8 * mask.size), name
            assert values[~mask].max() <= values[mask].min(), name


def test_trained_weights_end_at_the_target_and_what_is_served_too(run):
    params, state = params_of(run, 12), ocp.load_checkpointables(step_folder(run, 12), {"optimizer": None})["optimizer"]
    for tree in (params, state["trained"]):
        for name, x in pruned(PRUNE, tree).items():
            assert (np.asarray(x) == 0).sum() == round(0.8 * x.size), name
            np.testing.assert_array_equal(np.asarray(x) != 0, np.asarray(state["masks"]["kept"][name]))
    assert all((np.asarray(x) != 0).all() for n, x in params["block"].items() if n.endswith("norm"))
    assert (np.asarray(params["embeddings"]["content"]) != 0).all()


def test_what_was_pruned_stays_zero_while_more_goes(run):
    early, late = (pruned(PRUNE, params_of(run, step)) for step in (6, 12))
    for name, x in early.items():
        gone = np.asarray(x) == 0
        assert gone.sum() == int(round(0.8 * x.size) * (1 - 0.5**3)), name  # half-way between 2 and 10
        assert (np.asarray(late[name])[gone] == 0).all(), name


def test_each_logged_row_says_the_sparsity(run):
    said = {row["step"]: row["sparsity"] for row in read_rows(run) if "sparsity" in row}
    np.testing.assert_allclose([said[n] for n in (2, 4, 6, 8, 10, 12)], 0.8 * (1 - (1 - np.array([0, 0.25, 0.5, 0.75, 1, 1])) ** 3), rtol=1e-6)  # fmt: skip


def test_a_resumed_run_prunes_the_same_weights_to_the_bit(run, tiny_dataset, tmp_path):  # noqa: F811
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(step_folder(again, 12))
    assert steps(again) == [6]
    train(CONFIG, [tiny_dataset], again)
    states = [ocp.load_checkpointables(step_folder(r, 12), {"params": None, "optimizer": None}) for r in (run, again)]
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(InputError, match=r"prune.sparsity was 0.8 and is 0.7 now"):
        train(replace(CONFIG, prune=replace(PRUNE, sparsity=0.7)), [tiny_dataset], again)


def test_a_run_that_begins_with_a_pruned_one_keeps_its_zeros(run, tiny_dataset, tmp_path):  # noqa: F811
    config = replace(
        CONFIG, prune=replace(PRUNE, begin=0, end=0), train=TrainConfig(steps=2, eval_every=0),
        optim=replace(CONFIG.optim, warmup=1),
    )  # fmt: skip
    tuned = train(config, [tiny_dataset], tmp_path / "tuned", init_from=run)
    before, after = (pruned(PRUNE, tree) for tree in (params_of(run, 12), params_of(tuned, 2)))
    for name, x in after.items():
        np.testing.assert_array_equal(np.asarray(x) == 0, np.asarray(before[name]) == 0)
        assert not np.array_equal(x, before[name]), name


def test_gradients_and_parameters_are_cut_alike_and_the_rest_is_left():
    params = Blueprint(CONFIG.model, Vocab(200, (40,)), 5).init(1)
    kept = advanced(PRUNE, fresh(PRUNE, params), params, jnp.int32(10)).kept
    cut = masked(kept, params)
    assert jax.tree.structure(cut) == jax.tree.structure(params)
    assert sum(int((x == 0).sum()) for x in jax.tree.leaves(cut)) == sum(round(0.8 * m.size) for m in kept.values()) + 16 * 3  # fmt: skip
    plain = replace(PRUNE, tables=False)
    assert all(name.startswith("block.") for name in pruned(plain, params))
    assert fresh(PruneConfig(), params) is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PruneConfig(sparsity=1.0), "prune.sparsity=1.0: must be at least 0 and below 1"),
        (lambda: PruneConfig(begin=9, end=8), "prune.begin=9: must be at most prune.end=8"),
        (lambda: replace(CONFIG, prune=replace(PRUNE, end=13)), "prune.end=13 is beyond train.steps=12"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()
