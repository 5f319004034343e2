"""A run on two domains: the same model as one on each, its own copies, figures by domain, resumed and lent by name."""

import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from m6rec_jax.artifacts.checkpoints import load_params, steps
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.config import OptimConfig, TrainConfig
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.domains import joint_pools, joint_records, joint_shares, joint_vocab, open_domains
from m6rec_jax.data.loader import build_row
from m6rec_jax.data.plan import Plan
from m6rec_jax.data.prepare import prepare
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.training.initial import start_from
from m6rec_jax.training.metrics import read_rows
from m6rec_jax.training.run import train
from m6rec_jax.training.step import slice_losses
from tests.domains import SMALL, both, films, films_tables  # noqa: F401
from tests.fixtures import tiny_card, tiny_dataset, tiny_levels, tiny_root, tiny_tables  # noqa: F401


def blueprint_of(run):
    record = read_run(run)
    return Blueprint(record.config.model, record.vocab, record.content_width, record.more_widths)


def params_of(run, step="latest"):
    return load_params(run, step, blueprint_of(run).shapes())[1]


def test_one_dataset_has_the_parameters_it_always_had(tiny_dataset):  # noqa: F811
    """Old checkpoints open: names and shapes of a run on one dataset do not know of domains."""
    data = open_dataset(tiny_dataset)
    alone = Blueprint(SMALL.model, data.vocab, data.content.shape[1])
    shapes = jax.tree.map(lambda x: x.shape, alone.shapes(), is_leaf=lambda x: hasattr(x, "shape"))
    width = data.content.shape[1]
    assert shapes["embeddings"] == {"content": (width, 16), "tables": {"text": (640, 16), "level1": (128, 16)}}
    assert set(shapes) == {"block", "embeddings", "final_norm"}


@pytest.mark.smoke
def test_each_domain_alone_has_the_losses_it_has_in_the_joint_model(tiny_dataset, films):  # noqa: F811
    """The joint model on joint rows equals, task by task, the model of one domain on that dataset's own rows."""
    datasets = [open_dataset(tiny_dataset), open_dataset(films)]
    domains = open_domains([tiny_dataset, films])
    pools = joint_pools(domains, SMALL.mixture, "train", SMALL.data)
    plan = Plan(pools, joint_shares(domains, SMALL.mixture, pools), SMALL.data, 0)
    records = joint_records(domains, "train")
    widths = [d.content.shape[1] for d in datasets]
    assert widths[0] != widths[1]
    joint = Blueprint(SMALL.model, joint_vocab(domains), widths[0], (widths[1],))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(s.dtype), joint.shapes())
    tables = tuple(item_table(d.content, d.seen) for d in datasets)
    for number in range(len(datasets)):
        entries = [plan.entries(0).take(np.array([i])) for i in range(160)]
        mine = [e for e in entries if pools[int(e.task[0])].domain == number][:24]
        first = domains[number].records["train"]
        alone_pools = [replace(p, shift=type(p.shift)()) for p in pools]
        here = [build_row(plan, records, e, pools) for e in mine]
        there = [build_row(plan, domains[number].dataset.records("train"), replace(e, record=e.record - first), alone_pools) for e in mine]  # fmt: skip
        batch = lambda rows: {name: np.stack([row[name] for row in rows]) for name in rows[0]}  # noqa: E731
        run = lambda blueprint, p, b, items: jax.jit(partial(slice_losses, blueprint, len(pools)))(p, b, items)  # noqa: E731
        together = run(joint, params, batch(here), tables)
        alone = run(joint.domain(number), joint.domain_params(params, number), batch(there), tables[number])
        assert float(alone.weight.sum()) > 100
        np.testing.assert_allclose(together.loss, alone.loss, rtol=2e-5)
        np.testing.assert_array_equal(together.weight, alone.weight)


def test_parameters_of_a_domain_go_out_and_in_again(both):  # noqa: F811
    blueprint, params = blueprint_of(both), params_of(both)
    again = params
    for number in (0, 1):
        own = blueprint.domain_params(params, number)
        shapes = jax.tree.map(
            lambda x: x.shape, blueprint.domain(number).shapes(), is_leaf=lambda x: hasattr(x, "shape")
        )
        assert jax.tree.map(lambda x: x.shape, own) == shapes
        again = blueprint.with_domain(again, number, jax.tree.map(lambda x: x + 1, own))
    embeddings = again["embeddings"]
    for name in ("level1", "domain2_level1", "domain2_level3"):
        np.testing.assert_array_equal(embeddings["tables"][name], params["embeddings"]["tables"][name] + 1)
    assert jax.tree.structure(again) == jax.tree.structure(params)


def test_losses_are_logged_by_task_and_by_domain(both):  # noqa: F811
    row = [row for row in read_rows(both) if "loss" in row][-1]
    parts = [(row[f"loss/next-item@{n}"], row[f"targets/next-item@{n}"]) for n in ("tiny", "films")]
    np.testing.assert_allclose(row["loss/next-item"], sum(a * b for a, b in parts) / sum(b for _, b in parts))
    assert abs(parts[0][0] - parts[1][0]) > 1e-3
    valid = [row for row in read_rows(both) if "valid/loss/next-item" in row][-1]
    assert {"valid/loss/next-item@films", "valid/unigram/next-item@tiny", "valid/unigram/next-item"} <= set(valid)


def test_the_run_keeps_what_is_each_domains_own(both, tiny_dataset, films):  # noqa: F811
    record = read_run(both)
    assert record.names == ["tiny", "films"] and record.weights == (1.0, 1.0)
    for number, path in enumerate((tiny_dataset, films)):
        for name in ("items.parquet", "codes.npz", "transitions.npz", "tokenizer.model"):
            assert (record.folder(number) / name).read_bytes() == (path / name).read_bytes()
    assert "domains/films/codes.npz" in json.loads((both / "run.json").read_text())["files"]
    assert "films" in (both / "card.md").read_text() and "tiny" in (both / "card.md").read_text()


def test_the_best_step_is_that_of_the_mean_over_domains(tiny_dataset, films, tmp_path):  # noqa: F811
    config = replace(SMALL, train=replace(SMALL.train, steps=4, eval_every=2))
    scores = {"tiny": iter((0.5, 0.1)), "films": iter((0.1, 0.7))}
    seen = []

    def make(blueprint, dataset, length):
        seen.append((dataset.name, len(blueprint.vocab.levels), blueprint.content_width == dataset.content.shape[1]))
        return lambda params: {"ndcg@10": next(scores[dataset.name])}

    run = train(config, [tiny_dataset, films], tmp_path / "run", make_evaluator=make)
    assert seen == [("tiny", 1, True), ("films", 3, True)]
    rows = [row for row in read_rows(run) if "valid/ndcg@10" in row]
    assert [(r["valid/ndcg@10"], r["valid/ndcg@10@tiny"], r["valid/ndcg@10@films"]) for r in rows] == [
        (pytest.approx(0.3), 0.5, 0.1), (pytest.approx(0.4), 0.1, 0.7),
    ]  # fmt: skip


def test_a_figure_of_no_domain_is_refused_with_those_of_each(tiny_dataset, films, tmp_path):  # noqa: F811
    def make(blueprint, dataset, length):
        return SimpleNamespace(names=("ndcg@10",))

    config = replace(SMALL, train=replace(SMALL.train, best="ndcg@10@shoes"))
    with pytest.raises(
        InputError, match=r"train.best=ndcg@10@shoes: .*loss/next-item@films.* ndcg@10, ndcg@10@films, ndcg@10@tiny$"
    ):
        train(config, [tiny_dataset, films], tmp_path / "run", make_evaluator=make)


def test_resume_refuses_other_datasets_by_name_and_other_weights(both, tiny_dataset, films, tmp_path):  # noqa: F811
    run = shutil.copytree(both, tmp_path / "run")
    tables = films_tables()
    tables["events"] = tables["events"][:-1]
    card = tiny_card(tables, name="films")
    card["events"] |= {"time_unit": "order"}
    changed = prepare(card, tmp_path / "changed", like=tiny_dataset, borrow="tokenizer", levels=3, codebook=8, content_width=24)  # fmt: skip
    with pytest.raises(InputError, match=f"a dataset films with digest .*{changed.path} has .*--init-from"):
        train(SMALL, [tiny_dataset, changed.path], run)
    with pytest.raises(InputError, match="trained on tiny, films in this order, not on films, tiny"):
        train(SMALL, [films, tiny_dataset], run)
    with pytest.raises(InputError, match="trained on tiny, films in this order, not on tiny;"):
        train(SMALL, [tiny_dataset], run)
    with pytest.raises(InputError, match="weights of its datasets were tiny=1, films=1"):
        train(SMALL, [tiny_dataset, films], run, weights=[1, 0.5])
    train(SMALL, [tiny_dataset, films], run)
    assert steps(run) == steps(both)


def given(path, *datasets):
    """Parameters that a run on these datasets begins with under `--init-from path`, and its blueprint."""
    opened = [open_dataset(path) for path in datasets]
    width, *more = (data.content.shape[1] for data in opened)
    blueprint = Blueprint(SMALL.model, joint_vocab(open_domains(datasets)), width, tuple(more))
    return start_from(path, opened, blueprint)(blueprint.init(0)), blueprint


def test_a_run_on_both_lends_to_each_and_one_lends_to_both(both, tiny_dataset, films, tmp_path):  # noqa: F811
    old, blueprint = params_of(both, "best"), blueprint_of(both)
    equal = np.testing.assert_array_equal
    for number, path in enumerate((tiny_dataset, films)):
        jax.tree.map(equal, given(both, path)[0], blueprint.domain_params(old, number))
    short = replace(SMALL, train=TrainConfig(steps=2, eval_every=0), optim=OptimConfig(learning_rate=1e-9, warmup=1))
    run = train(short, [films], tmp_path / "films", init_from=both)
    alone = params_of(run)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), alone, blueprint.domain_params(old, 1))
    new, joint = given(run, tiny_dataset, films)
    fresh = joint.init(0)
    jax.tree.map(equal, joint.domain_params(new, 1), alone)
    equal(new["embeddings"]["tables"]["level1"], fresh["embeddings"]["tables"]["level1"])
    equal(new["embeddings"]["content"], fresh["embeddings"]["content"])


def test_items_of_a_domain_of_another_name_are_found_by_id_and_title(both, tiny_dataset, tmp_path):  # noqa: F811
    """A shop of another name with the items of the first domain, but for one that has only its number in common."""
    tables = tiny_tables()
    items = tables["items"].reverse()
    items[0, "title"] = "something else"
    card = tiny_card(tables | {"items": items}, name="other")
    other = prepare(card, tmp_path / "other", like=tiny_dataset, borrow="tokenizer")
    lent = given(both, other.path)[0]["embeddings"]["tables"]["level1"]
    old, tiny = params_of(both, "best")["embeddings"]["tables"]["level1"], open_dataset(tiny_dataset)
    for item in tiny.item_ids:
        same = np.array_equal(lent[other.row_of(item)], old[tiny.row_of(item)])
        assert same == (item != items["id"][0]), item
