import numpy as np
import pytest

from m6rec_jax.data.transitions import count_transitions
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.memory import Memory, MemoryConfig, fit_gate, load_gate

C = 30


def users_events(rng, users=40):
    return [rng.integers(0, C, rng.integers(1, 15)) for _ in range(users)]


def count(sequences, catalogue=C):
    users = np.repeat(np.arange(len(sequences), dtype=np.int32), [len(s) for s in sequences])
    return count_transitions(users, np.concatenate(sequences).astype(np.int32), catalogue=catalogue)


def slow_counts(sequences, catalogue=C):
    """Transition counts by three loops: 1/gap forward, half of it backward, gaps up to 10."""
    table = np.zeros((catalogue, catalogue))
    for sequence in sequences:
        for i, a in enumerate(sequence):
            for gap, b in enumerate(sequence[i + 1 : i + 11], 1):
                table[a, b] += 1 / gap
                table[b, a] += 0.5 / gap
    return table


def slow_mass(table, history, excluded, allowed):
    degree, mass = table.sum(1), np.zeros(len(table))
    for weight, item in zip((1, 0.5, 0.25), [i for i in history if i >= 0][::-1], strict=False):
        if degree[item] > 0:
            mass += weight * table[item] / degree[item] ** 0.5
    mass[list(excluded)] = 0
    mass[~allowed] = 0
    return mass


def dense(support, catalogue=C):
    made = np.zeros((len(support.rows), catalogue))
    for u, (rows, mass) in enumerate(zip(support.rows, support.mass, strict=True)):
        made[u, rows[rows >= 0]] += mass[rows >= 0]
    return made


@pytest.fixture
def made():
    rng = np.random.default_rng(1)
    sequences = users_events(rng)
    histories = [*users_events(rng, 12), np.array([3, -1, 5, -1]), np.zeros(0, int)]
    return sequences, histories, rng.random(C) < 0.7


@pytest.mark.parametrize("learned_after", [False, True])
def test_support_equals_enumerating_the_catalogue(made, learned_after):
    sequences, histories, allowed = made
    memory = Memory(count(sequences[:1] if learned_after else sequences))
    if learned_after:  # the same counts, one event at a time
        for sequence in sequences[1:]:
            for i in range(1, len(sequence)):
                memory.observe(sequence[:i], int(sequence[i]))
    table = slow_counts(sequences)
    support = memory.support(histories, exclude=histories, allowed=allowed)
    for u, history in enumerate(histories):
        mass = slow_mass(table, history, [i for i in history if i >= 0], allowed)
        assert support.total[u] == pytest.approx(mass.sum(), rel=1e-5)
        if mass.sum():
            assert dense(support)[u] == pytest.approx(mass / mass.sum(), abs=1e-5)
        else:
            assert not support.mass[u].any() and (support.rows[u] == -1).all()
        there = support.rows[u] >= 0
        assert (np.diff(support.mass[u][there]) <= 0).all()
        assert allowed[support.rows[u][there]].all() and not np.isin(support.rows[u][there], history).any()
    targets = np.arange(len(histories)) % C
    assert support.probability(targets) == pytest.approx(dense(support)[np.arange(len(targets)), targets])


def test_width_keeps_the_heaviest_and_renormalises(made):
    sequences, histories, _ = made
    whole = Memory(count(sequences)).support(histories)
    cut = Memory(count(sequences), MemoryConfig(width=5)).support(histories)
    assert np.array_equal(cut.rows[:, :5], whole.rows[:, :5]) and (cut.rows[:, 5:] == -1).all()
    assert cut.mass.sum(1) == pytest.approx(np.where(whole.total > 0, 1.0, 0.0), abs=1e-6)


def test_an_event_is_known_at_once_and_rebuilds_nothing():
    """Its time at a million items: benchmarks/memory.py."""
    rng, big = np.random.default_rng(2), 20_000
    memory = Memory(count([rng.integers(0, big, 50) for _ in range(200)], big))
    base, history = memory._base, rng.integers(0, big, 40)
    kept = base.indptr.copy(), base.indices.copy()
    assert 7 not in memory.support([history]).rows
    memory.observe(history, 7)
    assert 7 in memory.support([history]).rows
    assert memory._base is base and all(map(np.array_equal, kept, (base.indptr, base.indices)))
    assert set(memory._grown) <= {7, *history[-memory.window :].tolist()}


def test_evidence_names_the_history_items_behind_an_item(made):
    sequences, histories, _ = made
    memory, table = Memory(count(sequences)), slow_counts(sequences)
    for history in histories:
        for item in range(C):
            shares = dict(memory.evidence(history, item))
            parts = {}
            for weight, before in zip((1, 0.5, 0.25), [int(i) for i in history if i >= 0][::-1], strict=False):
                if table[before, item]:
                    parts[before] = parts.get(before, 0) + weight * table[before, item] / table[before].sum() ** 0.5
            assert shares == pytest.approx({b: p / sum(parts.values()) for b, p in parts.items()}, rel=1e-5)


def test_gate_finds_the_better_part_where_it_is_better():
    rng = np.random.default_rng(3)
    users = 4000
    lengths, total = rng.integers(1, 100, users), rng.random(users) * 3 + 0.01
    long = lengths > 30  # the memory is right for long histories, the model for short ones
    p_model = np.where(long, 0.01, 0.2) * (0.5 + rng.random(users))
    p_memory = np.where(long, 0.2, 0.0) * (0.5 + rng.random(users))
    gate = fit_gate(p_model, p_memory, lengths, total, step=7)
    g = gate(lengths, total)
    assert g[lengths > 60].min() > 0.8 and g[lengths < 10].max() < 0.2
    assert gate.gain > 0 and gate.users == users and gate.step == 7
    likelihood = np.log((1 - g) * p_model + g * p_memory).mean()
    for constant in np.linspace(0, 0.99, 34):  # no constant mixture does as well
        assert likelihood > np.log((1 - constant) * p_model + constant * p_memory).mean()


def test_gate_is_closed_without_support_and_survives_the_disk(tmp_path):
    gate = fit_gate(np.full(50, 0.1), np.full(50, 0.1), np.arange(50), np.full(50, 0.5))
    assert gate(np.array([3, 3]), np.array([0.0, 1.0]))[0] == 0
    gate.save(tmp_path / "gate.json")
    assert load_gate(tmp_path / "gate.json") == gate
    assert fit_gate(np.zeros(4), np.zeros(4), np.ones(4), np.zeros(4))(np.ones(1), np.ones(1)) < 1e-6
    (tmp_path / "gate.json").write_text('{"schema": "evaluation"}')
    with pytest.raises(InputError, match="gate.json"):
        load_gate(tmp_path / "gate.json")
