"""Tuning: the task is learnt, the backbone stays as it is, and a stopped tuning ends as one that was not."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.artifacts.tuned import TENSORS, read_tuned
from m6rec_jax.config import ModelConfig
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.instances import read_instances
from m6rec_jax.errors import InputError
from m6rec_jax.model import depth, tuning
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.tuning import METHODS, TuneSpec
from m6rec_jax.recommend.metrics.options import of_options
from m6rec_jax.settings import load_config
from m6rec_jax.training.tune import saved
from m6rec_jax.training.tune.rows import TuneRows, epoch, width_for, widths_of
from m6rec_jax.training.tune.run import TuneTask, tune
from m6rec_jax.training.tune.settings import LEARNING_RATES, TuneSettings, decays, optimizer
from m6rec_jax.training.tune.step import TuneState, make_step, scores
from m6rec_jax.vocab import Vocab
from tests.fixtures import tiny_root  # noqa: F401
from tests.planted import planted  # noqa: F401
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


def test_another_rate_seed_and_length_compile_nothing(frozen, tmp_path):
    spec = TuneSpec.of(CONFIG, "adapter", 2)
    first = tune(frozen, options_task(), spec, settings("adapter"), tmp_path / "first", of_options)
    programs = make_step()._cache_size(), scores._cache_size()
    assert min(programs) > 0
    other = settings("adapter", learning_rate=0.003, seed=1, epochs=2.0)
    second = tune(frozen, options_task(), spec, other, tmp_path / "second", of_options)
    assert (make_step()._cache_size(), scores._cache_size()) == programs
    assert first.metrics != second.metrics  # and yet they are other tunings
    again = tune(frozen, options_task(), spec, replace(other, seed=2), tmp_path / "third", of_options)
    assert again.metrics != second.metrics


def test_a_step_is_as_long_as_its_rate_and_its_seed_draws_the_dropout(frozen):
    spec, rule, rows = TuneSpec.of(CONFIG, "adapter", 2), settings("adapter").rule, options_task().train
    fresh = depth.begin(spec, frozen.blueprint, frozen.params, 0)
    state = TuneState(fresh, optimizer(rule).init(fresh), jnp.int32(0))
    batch = rows.batch(np.arange(16), 16, width_for(rows.lengths.max(), widths_of(rows.lengths)))

    def stepped(rate, seed):
        asked = state, frozen.params, batch, frozen.items, jnp.float32(rate), jnp.uint32(seed)
        after, _, norm = make_step()(spec, frozen.blueprint, rule, *asked)
        return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after.tuned, fresh), float(norm)

    (short, one), (long, again), (_, other) = stepped(0.01, 0), stepped(0.02, 0), stepped(0.01, 1)
    assert one == again != other
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, atol=1e-6), short, long)
    assert max(float(abs(x).max()) for x in jax.tree.leaves(short)) > 0.005


def test_a_text_task_is_learnt(frozen, tmp_path):
    spec = TuneSpec.of(CONFIG, "lora", 0, targets=tuning.TARGETS)
    made = tune(
        frozen, texts_task(), spec, settings("lora", epochs=8.0, learning_rate=0.02), tmp_path / "out", of_options
    )
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert made.metrics["loss"] < 0.6 * first["valid/loss"]
    assert not made.options and set(made.metrics) == {"loss"}


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
def test_a_stopped_tuning_goes_on_as_if_it_had_not(frozen, tmp_path, after):
    """Stopped in a validation, the first after the start or a later one: what was saved before is gone on from."""
    spec = TuneSpec.of(CONFIG, "option-adapter", 2)
    asked = (frozen, options_task(n=80), spec, settings("option-adapter", epochs=2.0, every=3, patience=0))
    whole = tune(*asked, tmp_path / "whole", of_options)
    calls = []

    def stopping(labels, logp):
        calls.append(0)
        if len(calls) > after:
            raise Stopped
        return of_options(labels, logp)

    with pytest.raises(Stopped):
        tune(*asked, tmp_path / "stopped", stopping)
    assert (tmp_path / "stopped" / saved.FILE).is_file() == (after > 1) and not (
        tmp_path / "stopped" / TENSORS
    ).exists()
    again = tune(*asked, tmp_path / "stopped", of_options)
    assert not (tmp_path / "stopped" / saved.FILE).exists()
    assert again.metrics == whole.metrics
    assert jax.tree.all(jax.tree.map(np.array_equal, again.arrays, whole.arrays))
    rows = [[json.loads(line) for line in (tmp_path / one / "metrics.jsonl").read_text().splitlines()] for one in ("whole", "stopped")]  # fmt: skip
    assert rows[0] == rows[1]
    assert tune(*asked, tmp_path / "whole", stopping).metrics == whole.metrics  # finished: nothing is run


def test_other_settings_another_backbone_and_damage_are_refused(frozen, tmp_path):
    spec = TuneSpec.of(CONFIG, "prompt", 2)
    task, out = options_task(n=32), tmp_path / "out"
    tune(frozen, task, spec, settings("prompt", epochs=1.0), out, of_options)
    for other, says in (
        ((frozen, task, spec, settings("prompt", epochs=2.0)), "settings.epochs was 1.0 and is 2.0 now"),
        ((frozen, task, TuneSpec.of(CONFIG, "lora", 2), settings("prompt", epochs=1.0)), "spec.method was 'prompt' and is 'lora'"),
        ((backbone(CONFIG, seed=1), task, spec, settings("prompt", epochs=1.0)), "backbone.digest was"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says) as refused:
            tune(*other, out, of_options)
        assert "\n" not in str(refused.value)
    path = out / TENSORS
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match="not those that were written"):
        read_tuned(out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and no tuned task"):
        tune(frozen, task, spec, settings("prompt"), tmp_path / "full", of_options)


@pytest.mark.parametrize(
    ("options", "classes", "says"),
    [(3, 2, "2 options, and 3 are to be tuned"), (2, 5, "label [2-4] and the task has 2 options")],
)
def test_a_wrong_number_of_options_is_refused(frozen, tmp_path, options, classes, says):
    spec = TuneSpec.of(CONFIG, "option", options)
    task = options_task(options=classes)
    task = task if options == 3 else replace(task, options=("no", "yes"))
    with pytest.raises(InputError, match=says):
        tune(frozen, task, spec, settings("option"), tmp_path / "out", of_options)
    assert not (tmp_path / "out").exists()


def test_weight_decay_leaves_prompts_heads_and_biases_alone(frozen):
    for method in METHODS:
        fresh = depth.begin(TuneSpec.of(CONFIG, method, 2, layers="add=1"), frozen.blueprint, frozen.params, 0)
        pulled = {jax.tree_util.keystr(p) for p, yes in jax.tree_util.tree_leaves_with_path(decays(fresh)) if yes}
        left = {jax.tree_util.keystr(p) for p, yes in jax.tree_util.tree_leaves_with_path(decays(fresh)) if not yes}
        assert not any(
            word in path for path in pulled for word in ("prompts", "head", "bias", "scale", "norm", "tables")
        )
        assert not any(path.endswith(("_a']", "_b']", "query']", "adapter_in']", "adapter_out']")) for path in left)


def test_one_epoch_holds_each_instance_once_in_batches_of_like_length():
    lengths = np.random.default_rng(0).integers(5, 200, 1000)
    batches = epoch(lengths, 16, 3, 1)
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert [b.tolist() for b in batches] == [b.tolist() for b in epoch(lengths, 16, 3, 1)]
    assert [b.tolist() for b in batches] != [b.tolist() for b in epoch(lengths, 16, 3, 2)]
    widths = widths_of(lengths)
    padded = sum(width_for(lengths[b].max(), widths) * 16 for b in batches)
    assert len(widths) <= 4 and padded < 1.35 * lengths.sum()


@pytest.mark.parametrize(("name", "method"), [("small", "option-adapter"), ("base", "option-adapter"), ("base", "adapter"), ("base", "prompt"), ("base", "option"), ("base", "lora")])  # fmt: skip
def test_little_is_trained_and_kept(name, method):
    """At most 1.5 % of the layers' numbers alone, tables aside, and less than 2 % of their bytes; counted by shapes."""
    config = load_config([name]).model
    blueprint = Blueprint(config, Vocab(4000, (10_000,)), 64)
    spec = TuneSpec.of(config, method, 2)
    layers = sum(x.size for x in jax.tree.leaves(blueprint.shapes()["block"]))
    assert depth.trained(spec, blueprint) <= 0.015 * layers


def test_an_artefact_is_small(frozen, tmp_path):
    """Its bytes are those of its numbers and a header of a few hundred."""
    spec = TuneSpec.of(CONFIG, "option-adapter", 2)
    tune(frozen, options_task(n=32), spec, settings("option-adapter", epochs=1.0), tmp_path / "out", of_options)
    size = (tmp_path / "out" / TENSORS).stat().st_size
    assert size <= 4 * depth.trained(spec, frozen.blueprint) + 1000


def test_a_task_of_a_dataset_is_made_of_its_instances_each_within_the_room(planted):  # noqa: F811
    data = open_dataset(planted)
    train, valid = (read_instances(data, "topic", split) for split in ("train", "valid"))
    rows = np.ones((3, 8), np.float32)
    task = TuneTask.of(data, train, valid, 10, rows, dropout=0.1)
    assert (task.name, task.options) == ("topic", tuple(train.about["options"])) and task.rows is rows
    assert len(task.train) == len(train) > len(task.valid) == len(valid) > 0
    assert max(task.train.lengths.max(), task.valid.lengths.max()) <= 10 < TuneRows.of(train, 64).lengths.max()
    np.testing.assert_array_equal(task.train.labels, train.labels)
    assert task.about == {
        "template": train.about["template"], "language": train.about["language"], "objective": "classify",
        "metric": train.about["metric"], "dataset": data.name, "digest": data.digest, "length": 10, "dropout": 0.1,
    }  # fmt: skip
    retrieval = [read_instances(data, "retrieval", split) for split in ("train", "valid")]
    with pytest.raises(InputError, match="task retrieval: a retrieval has no options and no answer"):
        TuneTask.of(data, *retrieval, 12, None)
