import numpy as np
import pytest

from m6rec_jax.data.neighbours import find_neighbours
from m6rec_jax.data.transitions import count_transitions
from m6rec_jax.recommend.memory import FLOOR, Memory, MemoryConfig

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


def slow_mass(table, history, excluded, allowed, config=FLOOR):
    degree, mass = table.sum(1), np.zeros(len(table))
    for weight, item in zip(config.recency, [i for i in history if i >= 0][::-1], strict=False):
        if degree[item] > 0:
            mass += weight * table[item] / degree[item] ** config.power
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


@pytest.fixture(scope="module")
def alike():
    content = np.random.default_rng(9).standard_normal((C, 6)).astype(np.float32)
    content[4] = 0  # of one item nothing is known
    return find_neighbours(content / np.maximum(np.linalg.norm(content, axis=1, keepdims=True), 1e-6), k=5)


@pytest.mark.parametrize("learned_after", [False, True])
@pytest.mark.parametrize("config", [FLOOR, MemoryConfig(prior=3.0)])
def test_support_equals_enumerating_the_catalogue(made, alike, config, learned_after):
    sequences, histories, allowed = made
    neighbours = alike if config.prior else None
    memory = Memory(count(sequences[:1] if learned_after else sequences), config, neighbours)
    if learned_after:  # the same counts, one event at a time
        for sequence in sequences[1:]:
            for i in range(1, len(sequence)):
                memory.observe(sequence[:i], int(sequence[i]))
    table = slow_counts(sequences)
    if neighbours:
        for item, (rows, weights) in enumerate(zip(alike.rows, alike.weights, strict=True)):
            table[item, rows[rows >= 0]] += 3.0 * weights[rows >= 0]
    support = memory.support(histories, exclude=histories, allowed=allowed)
    for u, history in enumerate(histories):
        mass = slow_mass(table, history, [i for i in history if i >= 0], allowed, config)
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


def test_an_item_that_nobody_met_is_reached_through_its_neighbours(alike):
    """The catalogue's last item has no event, so counts alone can neither start from it nor lead to it."""
    new = C - 1
    rows = count([h[h != new] for h in users_events(np.random.default_rng(5))])
    near = int(alike.rows[new, 0])
    assert not Memory(rows).support([np.array([new])]).total.any()
    memory = Memory(rows, neighbours=alike)
    assert near in memory.support([np.array([new])]).rows
    asks = int(np.flatnonzero((alike.rows == new).any(1))[0])
    assert new in memory.support([np.array([asks])]).rows
    assert new not in Memory(rows).support([np.array([asks])]).rows


def test_evidence_names_the_history_items_behind_an_item(made):
    sequences, histories, _ = made
    memory, table = Memory(count(sequences), FLOOR), slow_counts(sequences)
    for history in histories:
        for item in range(C):
            shares = dict(memory.evidence(history, item))
            parts = {}
            for weight, before in zip((1, 0.5, 0.25), [int(i) for i in history if i >= 0][::-1], strict=False):
                if table[before, item]:
                    parts[before] = parts.get(before, 0) + weight * table[before, item] / table[before].sum() ** 0.5
            assert shares == pytest.approx({b: p / sum(parts.values()) for b, p in parts.items()}, rel=1e-5)
