"""What a configuration leaves open is fitted to the histories, and nothing else changes."""

from dataclasses import replace

import numpy as np
import pytest

from m6rec_jax.config import Config, DataConfig, MixtureConfig, TrainConfig
from m6rec_jax.data.domains import open_domains
from m6rec_jax.data.records import HISTORY
from m6rec_jax.training.fit import LEAST_STEPS, VALIDATIONS, fitted
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401

OPEN = Config(data=DataConfig(length=0, rows=0), train=TrainConfig(steps=10_000, epochs=5.0))


@pytest.fixture(scope="module")
def domains(tiny_dataset):  # noqa: F811
    return open_domains([tiny_dataset])


def with_lengths(domains, tokens):
    """The same domain with training histories of other lengths."""
    dataset = domains[0].dataset
    kinds = np.full(len(tokens), HISTORY, np.uint8)
    changed = replace(dataset)
    object.__setattr__(changed, "index", {"train_kind": kinds, "train_tokens": np.asarray(tokens, np.int32)})
    return [replace(domains[0], dataset=changed)]


@pytest.mark.parametrize(("longest", "length"), [(20, 64), (63, 64), (64, 128), (200, 256), (5000, 256)])
def test_rows_hold_most_histories_whole(domains, longest, length):
    config = fitted(OPEN, with_lengths(domains, [longest] * 95 + [9000] * 4))
    assert (config.data.length, config.data.rows) == (length, 1024 // length)


def test_rows_divide_over_devices_and_slices(domains):
    config = fitted(replace(OPEN, train=replace(OPEN.train, accumulate=2)), with_lengths(domains, [200] * 50), 12)
    assert config.data.rows % 24 == 0 and config.data.rows >= 16


def test_steps_follow_the_histories_and_the_share_of_the_tasks_that_read_them(domains):
    many = with_lengths(domains, [60] * 10_000)
    alone = fitted(replace(OPEN, mixture=MixtureConfig({"next-item": 1.0})), many).train.steps
    assert alone == np.ceil(5 * 60 * 10_000 / 1024)
    few = with_lengths(domains, [60] * 10)
    assert fitted(OPEN, few).train.steps == LEAST_STEPS
    half = fitted(replace(OPEN, mixture=MixtureConfig({"next-item": 0.5, "text-causal": 0.5})), many).train.steps
    assert abs(half - 2 * alone) <= 1
    assert fitted(replace(OPEN, train=replace(OPEN.train, steps=300)), many).train.steps == 300


def test_validations_are_close_enough_to_catch_the_best_checkpoint(domains):
    few = fitted(OPEN, with_lengths(domains, [60] * 10)).train
    assert few.steps / few.eval_every >= VALIDATIONS - 1
    seldom = replace(OPEN, train=replace(OPEN.train, eval_every=0))
    assert fitted(seldom, with_lengths(domains, [60] * 10)).train.eval_every == 0
    many = fitted(OPEN, with_lengths(domains, [60] * 100_000)).train
    assert many.eval_every == OPEN.train.eval_every


def test_a_configuration_that_leaves_nothing_open_is_kept(domains):
    assert fitted(Config(), domains) == Config()
