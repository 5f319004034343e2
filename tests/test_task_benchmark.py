"""The benchmark of tasks: what its rows may tell, and how its differences are drawn."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from benchmarks.tasks import answers, measures, tallrec
from benchmarks.tasks.ours import recipes
from benchmarks.tasks.statistics import fold_counts
from m6rec_jax.data.card import load_card
from m6rec_jax.errors import InputError
from tests.tables import films_folder


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory):
    return tallrec.read("movie", films_folder(tmp_path_factory.mktemp("tables")))


def test_a_past_tells_nothing_of_its_answer(films):
    past = films.past
    told = [{event["item"] for event in events} for events in past["history"].to_list()]
    assert all(item not in seen for item, seen in zip(past["item_id"].to_list(), told, strict=True))
    # What was liked and what was not are asked after the very same history: a share of likes cannot tell them apart.
    shares: dict[tuple[str, str], set[float]] = {}
    for row in past.iter_rows(named=True):
        key = row["user_id"], json.dumps(row["history"])
        shares.setdefault(key, set()).add(row["user_rate"])
    assert max(map(len, shares.values())) == 1 and len(shares) < len(past)
    assert set(past["user_id"]) <= set(films.part("train")["user_id"])


def test_counts_are_of_other_users(films):
    train = films.part("train")
    asked = [(row["user_id"], row["item_id"]) for row in train.iter_rows(named=True)]
    users = np.array([int(user) for user, _ in asked])
    items = np.array([int(item) for _, item in asked])
    likes, ratings = fold_counts(users, items, np.ones(len(users)), users, items)
    for at in range(len(users)):
        others = (items == items[at]) & (users % 5 != users[at] % 5)
        assert ratings[at] == likes[at] == others.sum()


def test_a_card_holds_the_rows_with_and_without_their_histories(films):
    card = load_card(films.card())
    assert set(card.tasks) == {"like", "brief", "past", "counts"}
    tables = {name: task.path for name, task in card.tasks.items()}
    assert "history" not in tables["counts"].columns and "history" in tables["past"].columns
    assert len(tables["counts"]) == len(tables["past"]) + len(films.part("train"))
    assert not {"history", "item"} & set(tables["counts"].columns)
    # What is asked briefly is scored on the rows, in the order, of what is asked at length.
    brief = tables["brief"]
    for split in ("valid", "test"):
        own, part = brief.filter(pl.col("split") == split), films.part(split)
        assert "history" not in own.columns and own["item"].equals(part["item"]) and own["label"].equals(part["label"])
    assert not set(films.numbers) & set(tables["like"].columns)  # numbers are for trees: the model reads words


def test_learnt_rows_have_the_pasts_behind_them_only_when_asked(films):
    train = films.part("train")
    assert films.learnt(False).equals(train)
    both = films.learnt(True)
    assert both.head(len(train))["item"].equals(train["item"]) and len(both) == len(train) + len(films.past)


def test_a_difference_is_paired_and_of_all_seeds():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 300)
    noise = rng.normal(size=300)
    good, better = (measures.auc(labels, labels * k + noise) for k in (1.0, 1.1))
    own = measures.difference(([better], [good], 300))
    assert own["ci95"][0] > 0  # the same noise in both: a difference far smaller than either's own interval
    low, high = measures.interval(good, 300)
    assert own["difference"] < (high - low) / 2
    assert measures.difference(([good], [good], 300)) == {"difference": 0.0, "ci95": [0.0, 0.0]}
    bad = measures.auc(labels, -noise)
    assert measures.difference(([better, bad], [good], 300))["ci95"][0] < 0  # of two seeds one is worse
    # Over two data sets: the mean of both, and less chance in it than in one alone.
    both = measures.difference(([better], [good], 300), ([better], [good], 300))
    assert both["difference"] == pytest.approx(own["difference"])
    assert np.ptp(both["ci95"]) < 0.9 * np.ptp(own["ci95"])


def test_auc_is_the_share_of_pairs_in_order_and_ties_are_half():
    labels, scores = np.array([0, 1, 1, 0, 1]), np.array([0.1, 0.5, 0.1, 0.3, 0.3])
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    assert measures.auc(labels, scores)(np.arange(5)) == pytest.approx(np.mean(pairs))
    assert measures.auc(labels, scores)(np.array([1, 2])) == 0.5


def test_an_answer_is_kept_for_what_it_was_asked(films, tmp_path, monkeypatch):
    options, settings = Namespace(work=tmp_path, commit="c0ffee"), {"C": 0.3, "past": False}
    found = answers.run_one(films, "logreg", settings, 0, options)
    monkeypatch.setitem(answers.SYSTEMS, "logreg", None)  # nothing is run again
    again = answers.run_one(films, "logreg", settings, 0, options)
    np.testing.assert_array_equal(found.pop("test"), again.pop("test"))
    assert found == again
    fewer = replace(films, frame=films.frame.head(films.frame.height - 1))
    with pytest.raises(InputError, match="an answer to other rows, or by another recipe"):
        answers.run_one(fewer, "logreg", settings, 0, options)


def test_a_recipe_counts_in_what_was_asked(films, monkeypatch):
    before = [answers._asked(films, name, {}) for name in ("m6rec", "logreg")]
    monkeypatch.setitem(recipes.RECIPES, "book", replace(recipes.RECIPES["book"], steps=7))  # with which films begin
    assert [answers._asked(films, name, {}) == old for name, old in zip(("m6rec", "logreg"), before, strict=True)] == [False, True]  # fmt: skip
