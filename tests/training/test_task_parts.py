"""What a run lends of tasks: rows of options that mean the same, vectors of the same width; all else begins anew."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from m6rec_jax.artifacts.checkpoints import load_params
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.prepare import prepare
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.training.initial import start_from
from m6rec_jax.training.run import train
from tests.fixtures import tiny_card, tiny_root  # noqa: F401
from tests.planted import CONFIG, planted, planted_run  # noqa: F401


def blueprint_of(dataset, **changes):
    return Blueprint(replace(CONFIG.model, **changes), dataset.vocab, dataset.content.shape[1])


def begun(run, dataset, blueprint):
    """Fresh parameters, and those that a run gives in their place."""
    fresh = blueprint.init(1)
    made = start_from(run, [dataset], blueprint)(fresh)
    assert jax.tree.structure(made) == jax.tree.structure(blueprint.shapes())
    return jax.device_get(fresh), jax.device_get(made)


@pytest.fixture(scope="module")
def lender(planted_run):  # noqa: F811
    record = read_run(planted_run)
    blueprint = Blueprint(record.config.model, record.vocab, record.content_width)
    return load_params(planted_run, "best", blueprint.shapes())[1]


def test_tasks_of_the_same_name_and_options_lend_their_rows(planted, planted_run, lender):  # noqa: F811
    dataset = open_dataset(planted)
    _, made = begun(planted_run, dataset, blueprint_of(dataset))
    for part in ("block", "vectors"):
        jax.tree.map(np.testing.assert_array_equal, made[part], lender[part])
    np.testing.assert_array_equal(
        made["embeddings"]["tables"]["options"][:5], lender["embeddings"]["tables"]["options"][:5]
    )
    tasks = [task | ({"options": ["a", "b", "c"]} if task["name"] == "topic" else {}) for task in dataset.tasks]
    other = replace(dataset, manifest=dataset.manifest | {"tasks": tasks})
    fresh, made = begun(planted_run, other, blueprint_of(other, vectors=8))
    table, was, new = (x["embeddings"]["tables"]["options"] for x in (made, lender, fresh))
    np.testing.assert_array_equal(table[:2], was[:2])
    np.testing.assert_array_equal(table[2:], new[2:])
    jax.tree.map(np.testing.assert_array_equal, made["vectors"], fresh["vectors"])  # of another width


def test_a_model_without_options_and_vectors_takes_the_rest(planted, planted_run, lender):  # noqa: F811
    dataset = open_dataset(planted)
    plain = replace(dataset, vocab=dataset.vocab.domain(0), manifest=dataset.manifest | {"tasks": []})
    _, made = begun(planted_run, plain, blueprint_of(plain, vectors=0))
    of = lambda params: params["embeddings"]["tables"]["level1"][: dataset.catalogue]  # noqa: E731
    np.testing.assert_array_equal(of(made), of(lender))
    jax.tree.map(np.testing.assert_array_equal, made["block"], lender["block"])


def test_a_run_without_options_lends_all_it_has(planted, tmp_path):  # noqa: F811
    """Its items by id and its layers; options and vectors begin anew."""
    like = prepare(tiny_card(name="plain"), tmp_path / "plain", like=planted).path
    config = replace(
        CONFIG,
        model=replace(CONFIG.model, vectors=0),
        mixture=replace(CONFIG.mixture, tasks={"next-item": 1.0}),
        train=replace(CONFIG.train, steps=6, eval_every=0),
        optim=replace(CONFIG.optim, warmup=2),
    )
    run = train(config, [like], tmp_path / "run")
    assert read_run(run).vocab.options == ()
    _, was = load_params(run, "best", blueprint_of(open_dataset(like), vectors=0).shapes())
    dataset = open_dataset(planted)
    fresh, made = begun(run, dataset, blueprint_of(dataset))
    jax.tree.map(np.testing.assert_array_equal, made["block"], was["block"])
    tables = made["embeddings"]["tables"]
    np.testing.assert_array_equal(tables["text"], was["embeddings"]["tables"]["text"])
    np.testing.assert_array_equal(tables["options"], fresh["embeddings"]["tables"]["options"])
    jax.tree.map(np.testing.assert_array_equal, made["vectors"], fresh["vectors"])


def test_a_retrieval_needs_vectors(planted, tmp_path):  # noqa: F811
    config = replace(CONFIG, model=replace(CONFIG.model, vectors=0))
    with pytest.raises(InputError, match="mixture.tasks.retrieval: .*set model.vectors=128") as error:
        train(config, [planted], tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
