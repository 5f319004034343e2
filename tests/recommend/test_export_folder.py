"""Folders of exported weights hold the parameters, whole and in parts, and give the logits of the run they come from."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from m6rec_jax.artifacts.checkpoints import load_params
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.artifacts.tensors import FILE, INDEX, by_path, write_tensors
from m6rec_jax.cli import SUCCESS, WRONG_INPUT, main
from m6rec_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import causal
from m6rec_jax.recommend.export import facts_of
from m6rec_jax.training.run import train
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401
from tests.model.test_export import forward


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory):  # noqa: F811
    config = Config(
        model=ModelConfig(layers=1, width=16, heads=2),
        optim=OptimConfig(learning_rate=0.02, warmup=1),
        data=DataConfig(length=64, rows=4, block=512),
        train=TrainConfig(steps=2, eval_every=0),
    )
    return train(config, [tiny_dataset], tmp_path_factory.mktemp("run") / "run")


def opened(run):
    record = read_run(run)
    blueprint = Blueprint(record.config.model, record.vocab, record.content_width)
    return record, blueprint, load_params(run, "latest", blueprint.shapes())[1]


def export(run, out, kind, *more):
    return main(["export", "--run", str(run), "--format", kind, "--out", str(out), *more])


def test_a_llama_folder_gives_the_logits_of_its_run(run, tmp_path, capsys):
    out = tmp_path / "llama"
    assert export(run, out, "llama") == SUCCESS
    assert "step 2 as llama, float32" in capsys.readouterr().err
    record, blueprint, params = opened(run)
    items = pl.read_parquet(out / "items.parquet")
    spelled = np.array(items["tokens"].to_list())
    tokens = np.array([2, 300, *spelled[[3, 55, 7], 0]])
    rows = np.array([-1, -1, 3, 55, 7])
    theirs = forward(json.loads((out / "config.json").read_text()), load_file(out / FILE), tokens)
    model, facts = blueprint.bind(params), facts_of(record, 0)
    hidden = model.hidden(tokens[None], rows[None], causal((1, 5), np.array([5])), facts)
    for i, s in enumerate(record.vocab.slices):
        ours = np.asarray(model.logits(hidden[0], i, facts))[:, : s.size]
        np.testing.assert_allclose(ours, theirs[:, s.offset : s.offset + s.size], atol=1e-4)
    assert (out / "tokenizer.model").read_bytes() == (run / "tokenizer.model").read_bytes()

    assert export(run, out, "llama") == WRONG_INPUT
    assert "is there already" in capsys.readouterr().err


def test_safetensors_hold_every_parameter(run, tmp_path):
    assert export(run, tmp_path / "all", "safetensors") == SUCCESS
    found, params = load_file(tmp_path / "all" / FILE), dict(by_path(jax.device_get(opened(run)[2])))
    assert found.keys() == params.keys()
    for name, x in params.items():
        np.testing.assert_array_equal(found[name], x)
    assert export(run, tmp_path / "half", "safetensors", "--dtype", "bfloat16") == SUCCESS
    sizes = [(tmp_path / name / FILE).stat().st_size for name in ("half", "all")]
    assert 0.49 < sizes[0] / sizes[1] < 0.55


def test_shards_and_their_index_hold_each_array_once(tmp_path):
    arrays = {name: np.full((8, 4), i, np.float32) for i, name in enumerate("abcde")}
    files = write_tensors(tmp_path, arrays, shard=300)
    assert len(files) == 4 and files[-1] == INDEX
    where = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    parts = {name: load_file(tmp_path / name) for name in files[:-1]}
    assert sum(map(len, parts.values())) == len(arrays)
    for name, x in arrays.items():
        np.testing.assert_array_equal(jnp.asarray(parts[where[name]][name]), x)
