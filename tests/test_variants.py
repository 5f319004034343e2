"""Variants of the model that the ablation table tries: trained like the model, gone when their turn is over."""

import numpy as np
import pytest

from benchmarks.variants import VARIANTS, variant
from m6rec_jax.artifacts.checkpoints import load_params
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.config import Config, DataConfig, MixtureConfig, ModelConfig, OptimConfig, TrainConfig
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.model import load
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import Transformer
from m6rec_jax.recommend.recommender import Recommender
from m6rec_jax.training.run import train
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401

CONFIG = Config(
    model=ModelConfig(layers=1, width=16),
    optim=OptimConfig(learning_rate=0.02, warmup=1),
    data=DataConfig(length=64, rows=4, block=512),
    mixture=MixtureConfig({"next-item": 1.0}),
    train=TrainConfig(steps=3, log_every=1, eval_every=0),
)
NEW = {"short causal convolution": ("embeddings", "taps"), "MLP head": ("head_out",)}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_learns_its_own_part_and_recommends(name, tiny_dataset, tmp_path):  # noqa: F811
    with variant(name):
        run = train(CONFIG, [tiny_dataset], tmp_path / "run")
        record = read_run(run)
        blueprint = Blueprint(record.config.model, record.vocab, record.content_width)
        learned, fresh = load_params(run, 3, blueprint.shapes())[1], blueprint.init(CONFIG.train.seed)
        for part in NEW[name]:
            learned, fresh = learned[part], fresh[part]
        assert np.abs(np.asarray(learned) - np.asarray(fresh)).max() > 1e-4
        data = open_dataset(tiny_dataset)
        found = Recommender.load(run, dataset=data, engine="model").recommend(data.item_ids[:3], 5, engine="model")
        assert len({one.item_id for one in found}) == 5
    assert load.Transformer is Transformer
