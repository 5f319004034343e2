"""A run on two domains, asked for each: its own items only, its own gate, found by digest, name or items."""

import json
import shutil

import numpy as np
import polars as pl
import pytest

from m6rec_jax.artifacts.run import read_run
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.prepare import prepare
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.evaluate import evaluate
from m6rec_jax.recommend.gate import load_gate
from m6rec_jax.recommend.generate import generate
from m6rec_jax.recommend.histories import held_out
from m6rec_jax.recommend.opening import domain_of
from m6rec_jax.recommend.recommender import Recommender
from tests.domains import both, films, films_tables  # noqa: F401
from tests.fixtures import tiny_card, tiny_tables


@pytest.fixture(scope="module")
def run(both, tmp_path_factory):  # noqa: F811
    return shutil.copytree(both, tmp_path_factory.mktemp("runs") / "both")


def test_each_domain_is_measured_on_its_own_items_with_its_own_gate(run, tiny_dataset, films, capsys):  # noqa: F811
    reports = [evaluate(run, "test", dataset=path) for path in (tiny_dataset, films)]
    assert [r["dataset"]["name"] for r in reports] == ["tiny", "films"] and [r["catalogue"] for r in reports] == [
        56,
        40,
    ]
    assert all(
        r["metrics"]["valid_id_rate"] == 1.0 and r["routes"].keys() <= {"model+memory", "popularity"} for r in reports
    )
    gates = [load_gate(folder / "gate.json") for folder in (run, run / "domains" / "films")]
    assert [g.dataset for g in gates] == [open_dataset(path).digest for path in (tiny_dataset, films)]
    assert "gate of the memory fitted" in capsys.readouterr().err
    assert [r["looks"] for r in reports] == [1, 1]  # of another domain's targets nothing was seen
    assert [json.loads(x)["domain"] for x in (run / "looks.jsonl").read_text().splitlines()] == ["tiny", "films"]
    evaluate(run, "valid", dataset="films")
    assert "gate" not in capsys.readouterr().err  # it has one
    evaluate(run, "valid")
    assert "trained on tiny, films; this is tiny, --dataset names films" in capsys.readouterr().err


def test_a_domain_answers_as_the_model_that_training_saw(run, films):  # noqa: F811
    """The run's own copies, by name, give the lists that the dataset gives."""
    data = open_dataset(films)
    asked = held_out(data, "test")
    lists = [Recommender.load(run, dataset=one).recommend_histories(asked, 5, memory=False) for one in (films, "films")]
    assert np.array_equal(lists[0].rows, lists[1].rows) and lists[0].rows.max() < data.catalogue
    found = Recommender.load(run, dataset="films").recommend(data.item_ids[:3], k=4)
    assert all(one.item_id.startswith("film-") for one in found) and len(found) == 4
    assert all(one.item_id.startswith("item-") for one in Recommender.load(run).recommend(["item-1", "item-2"], k=4))


def test_lists_of_a_domain_hold_its_items(run, films, tmp_path):  # noqa: F811
    for number, name in enumerate((films, "films")):
        generate(run, name, limit=5, k=3, out=tmp_path / f"{number}.parquet")
    one, other = (pl.read_parquet(tmp_path / f"{n}.parquet") for n in (0, 1))
    assert one.equals(other) and one.height == 15 and one["item_id"].str.starts_with("film-").all()


def test_a_dataset_finds_its_domain_by_name_or_items_or_is_refused(run, tiny_dataset, films, tmp_path):  # noqa: F811
    record, tables = read_run(run), films_tables()
    card = tiny_card(tables | {"events": tables["events"][:-2]}, name="films")
    card["events"] |= {"time_unit": "order"}
    fewer = prepare(card, tmp_path / "fewer", like=run)  # the run lends what it keeps for the domain of this name
    assert fewer.digest != open_dataset(films).digest and fewer.levels == 3 and domain_of(record, fewer) == 1
    assert Recommender.load(run, dataset=fewer).engine is not None
    renamed = prepare(card | {"name": "movies"}, tmp_path / "renamed", like=run / "domains" / "films")
    assert domain_of(record, renamed) == 1 and (renamed.codes == open_dataset(films).codes).all()
    tables = tiny_tables()
    strange = tables | {"items": tables["items"].with_columns(id="x" + pl.col("id")), "events": tables["events"].with_columns(i="x" + pl.col("i"))}  # fmt: skip
    stranger = prepare(tiny_card(strange, name="stranger"), tmp_path / "stranger", like=tiny_dataset)
    with pytest.raises(InputError, match="was trained on tiny, films, and this is none of them"):
        evaluate(run, "test", dataset=stranger)
