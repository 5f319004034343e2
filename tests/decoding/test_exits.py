"""Early exit: at a threshold of 1 it is the full model, rows keep their places, and what leaves is not computed further."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.config import ModelConfig
from m6rec_jax.data.packing import pack_row
from m6rec_jax.decoding import exits as room
from m6rec_jax.decoding.exits import Exits, ExitScorer, auc, calibrate, sure
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import View
from m6rec_jax.vocab import SPECIALS, Vocab
from tests.framed import WORDS, instance, sequence

CONFIG = ModelConfig(layers=4, width=16, heads=2, ffn=32, exits=True)
VOCAB = Vocab(len(SPECIALS) + WORDS, (40,))
ITEMS = item_table(np.zeros((40, 4)), np.ones(40, bool))
OPTIONS = 0.3 * jax.random.normal(jax.random.key(7), (3, 16))
EVERY = (1, 2, 3)


@pytest.fixture(scope="module")
def made():
    blueprint = Blueprint(CONFIG, VOCAB, 4)
    return ExitScorer(blueprint.bind(blueprint.init(0)), ITEMS)


@pytest.fixture(scope="module")
def instances():
    rng = np.random.default_rng(1)
    found = [instance(rng, int(n)) for n in rng.integers(1, 12, 21)]
    return [(tokens, np.full(len(tokens), -1, np.int32)) for tokens in found]


@pytest.fixture(scope="module")
def layers(instances):
    """Logits `[N, n, C]` of every layer, from whole rows as in training."""
    blueprint = Blueprint(CONFIG, VOCAB, 4)
    rows = [pack_row([(sequence(tokens), 0) for tokens, _ in instances[at : at + 7]], 512) for at in (0, 7, 14)]
    row = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
    view = View(row["positions"], row["k_start"], row["k_end"])
    model = blueprint.bind(blueprint.init(0))
    states, _ = model.routed(row["tokens"], row["item_rows"], view, ITEMS, every=True)
    np.testing.assert_allclose(states[-1], model.hidden(row["tokens"], row["item_rows"], view, ITEMS), atol=1e-6)
    return np.asarray(states)[:, np.asarray(row["loss_weights"]) > 0] @ np.asarray(OPTIONS).T


def test_every_layer_answers_as_it_was_trained_to(made, instances, layers):
    np.testing.assert_allclose(made.every(instances, OPTIONS), layers, atol=1e-5)


def test_at_a_threshold_of_one_nothing_leaves(made, instances, layers):
    confident = np.full((2, 3), [1e4, 0, 0], np.float32)
    assert (sure(confident) <= 1).all()
    for exits in (Exits(EVERY, (1.0, 1.0, 1.0)), Exits((), ())):
        found = made.score(instances, OPTIONS, exits)
        np.testing.assert_allclose(found.scores, layers[-1], atol=1e-5)
        assert (found.layers == 4).all()
    assert made.score([], OPTIONS, Exits((), ())).scores.shape == (0, 3)


def test_rows_leave_where_they_are_sure_and_keep_their_places(made, instances, layers):
    certain = sure(layers)
    at = tuple(float(np.quantile(certain[i], q)) + 1e-5 for i, q in enumerate((0.8, 0.5, 0.3)))
    leaves = np.vstack([certain[:3] > np.array(at)[:, None], np.ones(len(instances), bool)]).argmax(0)
    assert set(leaves) == {0, 1, 2, 3}
    found = made.score(instances, OPTIONS, Exits(EVERY, at))
    np.testing.assert_array_equal(found.layers, leaves + 1)
    np.testing.assert_allclose(found.scores, layers[leaves, np.arange(len(instances))], atol=1e-5)
    some = made.score(instances, OPTIONS, Exits((2,), at[1:2]))
    assert set(some.layers) == {2, 4}


def test_what_has_left_is_not_computed_further(made, instances, layers, monkeypatch):
    """Counted in rows that enter a layer, as programs are given them, spare rows included: 32 for 21 instances."""
    work = []
    start, went = room._start, room._go_on

    def counted_start(*of):
        work.append(len(of[3]) * (of[-1] + 1))
        return start(*of)

    def counted_on(*of):
        work.append(len(of[3]) * (of[-1] + 1 - of[-2]))
        return went(*of)

    monkeypatch.setattr(room, "_start", counted_start)
    monkeypatch.setattr(room, "_go_on", counted_on)
    certain, spent = np.sort(sure(layers[1])), []
    for threshold in (1.0, certain[11], certain[4], certain[2], 0.0):  # of 21 rows stay: all, 12, 5, 3, none
        work.clear()
        made.score(instances, OPTIONS, Exits((2,), (float(threshold) + (1e-6 if 0 < threshold < 1 else 0),)))
        spent.append(sum(work))
    assert spent == [32 * 4, 32 * 2 + 12 * 3, 32 * 2 + 5 * 3, 32 * 2 + 3 * 3, 32 * 2]


def planted(n=4000, seed=0):
    """Scores of four layers, each nearer to the truth than the one before, and none surer than it may be."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n) * 2
    labels = (rng.random(n) < 1 / (1 + np.exp(-truth))).astype(np.int64)
    margins = np.stack([(truth + rng.normal(size=n) * s) * 4 / (4 + s * s) for s in (2.0, 1.0, 0.4, 0.0)])
    return np.stack([0 * margins, margins], -1).astype(np.float32), labels


def test_thresholds_keep_the_metric_and_run_fewer_layers_the_more_may_be_lost():
    scores, labels = planted()
    best = auc(labels, scores[-1])
    run = []
    for allowed in (0.0, 0.002, 0.01, 1.0):
        exits = calibrate(scores, labels, allowed)
        leaves = np.full(len(labels), 3)
        for layer, threshold in list(zip(exits.layers, exits.thresholds, strict=True))[::-1]:
            leaves[sure(scores[layer - 1]) > threshold] = layer - 1
        lost = best - auc(labels, scores[leaves, np.arange(len(labels))])
        assert lost <= allowed + 1e-12
        assert exits.lost == pytest.approx(max(lost, 0))
        assert exits.layers_run == pytest.approx(np.mean(leaves + 1))
        run.append(exits.layers_run)
    assert run == sorted(run, reverse=True)
    assert run[1] < 3.5
    assert run[-1] == 1
    right = lambda labels, scores: float((scores.argmax(-1) == labels).mean())  # noqa: E731
    assert calibrate(scores, labels, 0.01, right, "accuracy").metric == "accuracy"


def test_the_area_counts_ties_half():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(2)
    labels, scores = rng.integers(0, 2, 500), rng.integers(0, 9, (500, 2)).astype(np.float32)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores[:, 1] - scores[:, 0]))
    with pytest.raises(InputError, match="every label is the same"):
        auc(np.ones(4, int), scores[:4])


def test_thresholds_are_kept_beside_a_run(tmp_path):
    exits = Exits((1, 3), (0.9, 0.75), "auc", 0.002, 0.0013, 2.25)
    exits.save(tmp_path)
    assert Exits.load(tmp_path) == exits
    (tmp_path / "exits.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="damaged"):
        Exits.load(tmp_path)
    with pytest.raises(InputError, match="calibrate early exit"):
        Exits.load(tmp_path / "other")


def test_what_does_not_fit_the_model_is_refused(made, instances):
    with pytest.raises(InputError, match="layer 4 is not below the last of 4"):
        made.score(instances, OPTIONS, Exits((4,), (0.9,)))
    with pytest.raises(InputError, match="2 layers, 1 thresholds"):
        Exits((1, 2), (0.9,))
    with pytest.raises(InputError, match="in order"):
        Exits((2, 1), (0.9, 0.9))
    plain = Blueprint(replace(CONFIG, exits=False), VOCAB, 4)
    with pytest.raises(InputError, match="model.exits=false"):
        ExitScorer(plain.bind(plain.init(0)), ITEMS)
