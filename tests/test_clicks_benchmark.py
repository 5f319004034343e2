"""The benchmark of real clicks: what it compares differs in one thing, its times are of what it says, its runs go end to end."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.clicks import latency, runs
from benchmarks.clicks.__main__ import measured
from benchmarks.clicks.quick import Answer, System, compared
from benchmarks.clicks.runs import Sizes, kinds
from benchmarks.tasks import movielens, tallrec
from m6rec_jax.config import ModelConfig
from m6rec_jax.decoding.late import LateScorer
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.vocab import SPECIALS, Vocab
from tests.framed import WORDS, instance
from tests.tables import films_folder

TINY = Sizes(
    ("--model.layers=3", "--model.width=16"), ("--model.layers=2", "--model.width=32", "--model.embed=8", "--distill.heads=2", "--optim.warmup=0"),
    ("--data.length=64", "--data.rows=8", "--optim.warmup=0"), 2, 24, 24, 24, (1,),
)  # fmt: skip


def test_what_is_compared_differs_in_one_setting():
    table = kinds(Sizes())
    full, sparse = table["full"], table["sparse"]
    assert (table["late 2, longer"].begins, table["late 2, longer"].steps) == ("late 2", full.steps)
    for name in ("late 2", "exits"):
        extra = set(table[name].settings) - set(full.settings)
        assert len(extra) == 1 and extra.pop().startswith(("--model.late=", "--model.exits="))
        assert replace(table[name], settings=full.settings) == full
    extra = set(sparse.settings) - set(table["dense"].settings)
    assert all(one.startswith("--prune.") for one in extra) and replace(sparse, settings=table["dense"].settings) == table["dense"]  # fmt: skip


def test_a_difference_is_of_the_same_instances():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    scores = labels + rng.normal(size=400)
    found = compared(labels, {"full": scores, "same": 2 * scores, "worse": scores + rng.normal(size=400)}, "full")
    assert found["same"]["difference"] == 0 and found["same"]["difference_ci95"] == [0, 0]
    assert found["worse"]["difference_ci95"][1] < 0 and "difference" not in found["full"]


def test_requests_in_order_of_time_find_kept_what_was_asked_before_them():
    rng, vocab = np.random.default_rng(1), Vocab(len(SPECIALS) + WORDS, (40,))
    items = jax.tree.map(jnp.asarray, item_table(rng.normal(size=(40, 4)), np.ones(40, bool)))
    blueprint = Blueprint(ModelConfig(layers=2, width=16, heads=2, ffn=32, late=1), vocab, 4)
    late, options = LateScorer(blueprint.bind(blueprint.init(0)), items), jax.random.normal(jax.random.key(7), (2, 16))
    asked = [(tokens, np.full(len(tokens), -1, np.int32)) for tokens in (instance(rng, 5) for _ in range(8))]
    call = lambda some: late.score(some, options)  # noqa: E731
    unasked = lambda _: Answer(np.zeros(0), 0)  # noqa: E731
    made = {"full": System(Path(), unasked, len), "late": System(Path(), unasked, call, late)}
    rows = {row["system"]: row for row in latency.drawn(made, asked, 4, 3)}
    assert rows["late"]["parts_kept"] == 1 and rows["full"]["of_full"] == 1 and "parts_kept" not in rows["full"]
    kept = [
        next(row["parts_kept"] for row in latency.replayed(made, before, asked, 4) if row["system"] == "late")
        for before in (asked[:1], asked[:4], asked)
    ]
    assert 0 < kept[0] < kept[1] < kept[2] == 1


@pytest.mark.slow
def test_it_runs_from_rows_to_figures(tmp_path, monkeypatch):
    problem = tallrec.read("movie", films_folder(tmp_path))
    monkeypatch.setattr(movielens, "read", lambda *_: problem)
    options = Namespace(work=tmp_path, source=None, final=True, only=["quick"], batch=[1, 4], requests=4, max_loss=[0.1], runs=["late 1", "exits"])  # fmt: skip
    data = runs.prepared(options)
    assert data == runs.prepared(options)
    rows = measured(data, options, TINY)
    of = {row["system"]: row for row in rows if "auc" in row}
    assert set(of) == {
        "full", "late 1", "exits, 0.1 allowed", "exits, none leaves",
    }  # fmt: skip
    assert {row["split"] for row in of.values()} == {"test"}
    assert of["exits, 0.1 allowed"]["layers_run"] <= of["exits, none leaves"]["layers_run"] == 3
    assert sum("batch" in row for row in rows) == 2 * (4 + 2)
    monkeypatch.setattr(runs, "train", None)  # nothing is trained again
    runs.trained(data, tmp_path, ["full", "exits"], TINY)
