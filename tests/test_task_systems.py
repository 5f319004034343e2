"""The benchmark's own systems, from the rows of a problem to answers, with runs of two steps."""

from __future__ import annotations

import json
from argparse import Namespace

import numpy as np
import pytest

from benchmarks.tasks import beauty, kuairec, redial, tallrec
from benchmarks.tasks.ours import backbone, direct, lists, recipes, tuned
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.instances import read_instances
from m6rec_jax.data.prepare import prepare
from m6rec_jax.data.tasks import tasks
from m6rec_jax.decoding.instances import InstanceScorer
from m6rec_jax.errors import InputError
from tests.tables import captions_folder, films_folder, talks_folder

TINY = ("--model.layers=1", "--model.width=32", "--data.length=64", "--data.rows=8", "--optim.warmup=0")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return tallrec.read("movie", films_folder(tmp_path_factory.mktemp("tables")))


def test_a_backbone_is_trained_once_and_answers_and_is_tuned_for_every_row(films, tmp_path, monkeypatch):
    mixture = {"counts": 0.5, "brief": 0.5}
    monkeypatch.setitem(recipes.RECIPES, "movie", recipes.Recipe(mixture, 2, "", TINY, "brief"))
    monkeypatch.setattr(tuned, "STEPS", 4)
    options = Namespace(work=tmp_path, seeds=[0], quick=False)
    found = direct.answers(films, *direct.settings(films), 0, options)
    monkeypatch.setattr(backbone, "train", None)  # from here on nothing may be pretrained
    again = tuned.tuned("option-adapter")(films, {"rate": 1.0}, 0, options)
    for split in ("valid", "test"):
        for made in (found, again):
            assert made[split].shape == (len(films.part(split)), 2)
            np.testing.assert_allclose(made[split].sum(1), 1, atol=1e-5)
    # Both are of the task that the recipe asks, and not of another of the card's.
    data, run = backbone.backbone(films, options)
    told = InstanceScorer.load(run, "latest").chances(read_instances(data, "brief", "test"))
    np.testing.assert_array_equal(found["test"], told)
    kept = json.loads((tmp_path / "tuned" / films.name / "option-adapter-1-0" / "manifest.json").read_text())
    assert kept["task"]["name"] == "brief"
    moved = np.abs(direct.answers(films, {}, 0, options)["test"] - found["test"]).max()
    assert moved == 0 < np.abs(again["test"] - found["test"]).max()
    # A run of another recipe is not taken for one of this.
    other = recipes.Recipe(mixture, 2, "", (*TINY, "--optim.learning_rate=0.001"), "brief")
    monkeypatch.setitem(recipes.RECIPES, "movie", other)
    with pytest.raises(InputError, match="trained with other settings"):
        backbone.backbone(films, options)


def test_lists_of_every_way_hold_what_is_new_to_their_user(tmp_path, monkeypatch):
    rng, folder = np.random.default_rng(0), tmp_path / "tables"
    (folder / "beauty").mkdir(parents=True)
    told = [{"id": i, "asin": f"a{i}", "title": f"Thing {i} of kind {i % 7}", "attributes": [f"kind {i % 7}"]} for i in range(150)]  # fmt: skip
    (folder / "beauty" / "items.jsonl").write_text("\n".join(map(json.dumps, told)), encoding="utf-8")
    lines = [f"{user} {' '.join(map(str, rng.permutation(150)[:6]))}" for user in range(80)]
    (folder / "beauty" / "sequences.txt").write_text("\n".join(lines), encoding="utf-8")
    problem = beauty.read(folder)
    settings = (*TINY, "--model.vectors=16")
    monkeypatch.setitem(recipes.RECIPES, "beauty", recipes.Recipe({"next": 0.5, "describe": 0.5}, 2, "", settings))
    options = Namespace(work=tmp_path, seeds=[0], quick=False)
    part = problem.part("test")
    row_of = {one: i for i, one in enumerate(problem.catalogue["item_id"].to_list())}
    found = [answers(problem, {}, 0, options)["test"] for answers in (direct.answers, lists.decoded, lists.described)]
    for one in found:
        assert one.shape == (len(part), 100)
        for rows, events in zip(one, part["history"].to_list(), strict=True):
            assert len(set(rows.tolist())) == 100
            assert not {row_of[event["item"]] for event in events} & set(rows.tolist())
    assert len({one.tobytes() for one in found}) == 3  # three ways, and each its own lists
    unseen = {row_of[item] for item in part["item_id"].to_list()}
    assert all(unseen & set(one.ravel().tolist()) for one in found)
    had = [{row_of[event["item"]] for event in events} for events in part["history"].to_list()[:2]]
    for one in found:  # and each user's own: what is popular would be the same for both but for what they had
        assert len({tuple(row for row in rows.tolist() if row not in had[0] | had[1])[:50] for rows in one[:2]}) == 2


@pytest.mark.parametrize("name", ["redial", "kuairec-classify", "kuairec-caption"])
def test_a_recipe_mixes_what_its_own_card_is_prepared_to(name, tmp_path):
    """Classes and captions of one data set are two problems with a recipe each."""
    made = {
        "redial": lambda: redial.read(talks_folder(tmp_path)),
        "kuairec-classify": lambda: kuairec.read(captions_folder(tmp_path), "classify"),
        "kuairec-caption": lambda: kuairec.read(captions_folder(tmp_path), "caption"),
    }
    problem = made[name]()
    data = prepare(problem.card(), tmp_path / "data", levels=1, vocab_size=480)
    mixture = recipes.recipe_of(problem).mixture
    assert recipes.asked(problem) in mixture
    for split in ("train", "test"):
        assert len(read_instances(open_dataset(data.path), recipes.asked(problem), split))
    assert set(mixture) <= {*tasks(), recipes.asked(problem)}
