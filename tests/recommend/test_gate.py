from dataclasses import replace

import numpy as np
import pytest

from m6rec_jax.errors import InputError
from m6rec_jax.recommend.gate import MOVES, Gate, likeliest_gate, load_gate, move_gate, tempered_gate


def test_gate_finds_the_better_part_where_it_is_better():
    rng = np.random.default_rng(3)
    users = 4000
    lengths, total = rng.integers(1, 100, users), rng.random(users) * 3 + 0.01
    long = lengths > 30  # the memory is right for long histories, the model for short ones
    p_model = np.where(long, 0.01, 0.2) * (0.5 + rng.random(users))
    p_memory = np.where(long, 0.2, 0.0) * (0.5 + rng.random(users))
    gate = likeliest_gate(p_model, p_memory, lengths, total, step=7)
    g = gate(lengths, total)
    assert g[lengths > 60].min() > 0.8 and g[lengths < 10].max() < 0.2
    assert gate.gain > 0 and gate.users == users and gate.step == 7
    likelihood = np.log((1 - g) * p_model + g * p_memory).mean()
    for constant in np.linspace(0, 0.99, 34):  # no constant mixture does as well
        assert likelihood > np.log((1 - constant) * p_model + constant * p_memory).mean()


def test_gate_is_closed_without_support_and_survives_the_disk(tmp_path):
    gate = likeliest_gate(np.full(50, 0.1), np.full(50, 0.1), np.arange(50), np.full(50, 0.5))
    assert gate(np.array([3, 3]), np.array([0.0, 1.0]))[0] == 0
    gate.save(tmp_path / "gate.json")
    assert load_gate(tmp_path / "gate.json") == gate
    assert likeliest_gate(np.zeros(4), np.zeros(4), np.ones(4), np.zeros(4))(np.ones(1), np.ones(1)) < 1e-6
    (tmp_path / "gate.json").write_text('{"schema": "evaluation"}')
    with pytest.raises(InputError, match="gate.json"):
        load_gate(tmp_path / "gate.json")
    (tmp_path / "gate.json").write_text('{"schema": "gate", "version": 3, "bias": 0.1, "length": 0, "mass": 0}')
    assert load_gate(tmp_path / "gate.json") is None  # of an earlier version: fitted again
    (tmp_path / "gate.json").write_text('{"schema": "gate", "version": 99}')
    with pytest.raises(InputError, match="gate 99 in place of gate"):
        load_gate(tmp_path / "gate.json")


def test_a_model_surer_than_it_is_right_is_cooled_down_beside_the_memory():
    """Logits three times too large: the temperature found is 3, and 1 where they are right."""
    rng, users, heats = np.random.default_rng(6), 4000, (1.0, 2.0, 3.0, 4.0)
    logits = rng.normal(size=(users, 20))
    truth = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    target = (truth.cumsum(1) < rng.random((users, 1))).sum(1)
    memory, sizes = np.full(users, 0.05), (np.full(users, 5.0), np.ones(users))
    for sure, found in ((3.0, 3.0), (1.0, 1.0)):
        shown = [logits * sure / heat for heat in heats]
        logp = np.stack([(x - np.logaddexp.reduce(x, axis=1)[:, None])[np.arange(users), target] for x in shown], 1)
        gate = tempered_gate(logp, heats, memory, *sizes)
        assert gate.temperature == found and gate.users == users
        g, p = gate(*sizes), np.exp(logp[:, heats.index(found)])
        assert gate.gain == pytest.approx(np.log((1 - g) * p + g * memory).mean() - logp[:, 0].mean(), abs=1e-6)
    silent = tempered_gate(logp, heats, np.zeros(users), sizes[0], np.zeros(users))
    assert silent.temperature == 1.0 and silent(*sizes).max() < 1e-6


def test_a_memory_that_only_misleads_is_shut_out():
    model, memory, is_target = ranked_by_both(np.random.default_rng(7))
    wrong = np.where(is_target, 0, memory) + 1e-12
    sizes = np.full(len(model), 5.0), np.ones(len(model))
    moved = move_gate(Gate(2.0, 0.0, 0.0), np.log(model), np.log(wrong), is_target, *sizes)
    assert moved(*sizes).max() < 1e-6
    assert move_gate(Gate(9.0, 3.0, 0.0), np.log(model), np.log(wrong), is_target, *sizes)(*sizes).max() < 1e-6


def ranked_by_both(rng, users=400, n=30):
    """Candidates whose target the memory puts first where it knows it, though it knows it seldom."""
    target = rng.integers(0, n, users)
    model = rng.random((users, n)) ** 4
    memory = np.where(rng.random((users, n)) < 0.2, 0.2 * rng.random((users, n)), 0)
    knows = rng.random(users) < 0.3
    memory[np.arange(users), target] = np.where(knows, 1.0, 0.0)
    shares = [part / part.sum(1, keepdims=True) for part in (model, memory + 1e-12)]
    return *shares, np.arange(n) == target[:, None]


def ndcg(scores, is_target, k=10):
    place = (scores > np.where(is_target, scores, -np.inf).max(1, keepdims=True)).sum(1)
    return np.where(place < k, 1 / np.log2(place + 2), 0)


def moved_by_ranking(users, lower=0.0):
    """(the gate that ranking moved, the likeliest gate, NDCG of each user after each move)."""
    model, memory, is_target = ranked_by_both(np.random.default_rng(4), users)
    lengths, total = np.full(len(model), 5.0), np.ones(len(model))
    likely = likeliest_gate((model * is_target).sum(1), (memory * is_target).sum(1), lengths, total)
    likely = replace(likely, bias=likely.bias - lower)
    moved = move_gate(likely, np.log(model), np.log(memory), is_target, lengths, total)
    height = lambda gate: float(gate(lengths, total)[0])  # noqa: E731
    of = {bias: ndcg((1 - g) * model + g * memory, is_target) for bias in MOVES
          for g in [height(Gate(likely.bias + bias, likely.length, likely.mass))]}  # fmt: skip
    return moved, likely, of


@pytest.mark.parametrize("users", [40, 400, 4000])
def test_the_gate_is_moved_as_little_as_ranking_allows(users):
    moved, likely, of = moved_by_ranking(users)
    best = max(of.values(), key=np.mean)
    fits = {move for move, got in of.items() if (best - got).mean() <= (best - got).std() / len(got) ** 0.5 + 1e-12}
    assert moved.moved == min(fits, key=abs)
    assert moved.bias == likely.bias + moved.moved and (moved.length, moved.mass) == (likely.length, likely.mass)


def test_a_gate_that_hears_too_little_of_the_memory_is_moved_up():
    moved, _, of = moved_by_ranking(400, lower=6.0)
    assert moved.moved > 1 and of[moved.moved].mean() > of[0.0].mean() + 0.05


def test_a_gate_that_ranking_does_not_mind_stays_where_likelihood_put_it():
    model, _, is_target = ranked_by_both(np.random.default_rng(5))
    gate = Gate(0.3, 0.0, 0.0)
    sizes = np.ones(len(model)), np.ones(len(model))
    assert move_gate(gate, np.log(model), np.log(model), is_target, *sizes) == gate  # both parts say the same
    silent = np.full_like(model, -np.inf)
    assert move_gate(gate, np.log(model), silent, is_target, *sizes) == gate
    assert move_gate(gate, silent, silent, np.zeros_like(is_target), *sizes) == gate
    assert move_gate(gate, model[:0], model[:0], is_target[:0], *(size[:0] for size in sizes)) == gate
