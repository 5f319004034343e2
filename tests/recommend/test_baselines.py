import numpy as np
import pytest
import scipy.sparse as sp

from m6rec_jax.data.transitions import count_transitions
from m6rec_jax.recommend.baselines import CountingFloor, ItemKNN, Popularity

C = 40


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(0)
    liking = 1 / np.arange(1, C + 1)
    sequences = [rng.choice(C, rng.integers(2, 20), p=liking / liking.sum()) for _ in range(700)]
    users = np.repeat(np.arange(len(sequences), dtype=np.int32), [len(s) for s in sequences])
    items = np.concatenate(sequences).astype(np.int32)
    return sequences, users, items


@pytest.fixture(scope="module")
def rankers(made):
    sequences, users, items = made
    popularity = Popularity(np.bincount(items, minlength=C))
    interactions = sp.csr_matrix((np.ones(len(items)), (users, items)), (len(sequences), C))
    floor = CountingFloor.of(count_transitions(users, items, catalogue=C), popularity)
    return {"popularity": popularity, "item_knn": ItemKNN(interactions, popularity), "counting_floor": floor}


@pytest.mark.parametrize("name", ["popularity", "item_knn", "counting_floor"])
def test_lists_are_full_distinct_and_new_to_the_user(made, rankers, name):
    histories = [*made[0], np.zeros(0, int), np.arange(C - 3)]
    rows = rankers[name].rank(histories, 10)
    for history, row in zip(histories, rows, strict=True):
        listed = row[row >= 0]
        assert len(set(listed.tolist())) == len(listed) == min(10, C - len(set(history.tolist())))
        assert not set(listed.tolist()) & set(history.tolist())
    assert np.isin(rankers[name].rank(histories, 10, repeat=True)[: len(made[0])], range(C)).all()
    assert rankers[name].rank([], 10).shape == (0, 10)


def test_popularity_is_by_events_then_by_row():
    popularity = Popularity(np.array([1, 5, 5, 0, 9]))
    assert popularity.rank([np.array([4]), np.array([1])], 3).tolist() == [[1, 2, 0], [4, 2, 0]]
    assert popularity.rank([np.array([4])], 3, repeat=True).tolist() == [[4, 1, 2]]
    allowed = np.array([True, True, False, True, False])
    assert popularity.fill(np.array([[3, -1, -1]]), [np.array([0])], allowed=allowed).tolist() == [[3, 1, -1]]


def test_item_knn_equals_dense_cosine_of_tfidf(made, rankers):
    sequences, users, items = made
    counts = np.zeros((C, len(sequences)))
    np.add.at(counts, (items, users), 1)
    # implicit: users are the documents' words; sqrt(tf) x (log N - log1p(df)), rows then scaled to length 1
    idf = np.log(C) - np.log1p((counts > 0).sum(0))
    weighted = np.sqrt(counts) * idf
    weighted /= np.linalg.norm(weighted, axis=1, keepdims=True)
    similarity = weighted @ weighted.T
    rows = rankers["item_knn"].rank(sequences, 5)
    for history, row in list(zip(sequences, rows, strict=True))[:50]:
        score = similarity[history].sum(0)
        score[history] = -np.inf
        assert score[row] == pytest.approx(np.sort(score)[::-1][:5])


def test_floor_equals_the_dense_formula(made, rankers):
    sequences, *_ = made
    table = np.zeros((C, C))
    for sequence in sequences:
        for i, a in enumerate(sequence):
            for gap, b in enumerate(sequence[i + 1 : i + 11], 1):
                table[a, b] += 1 / gap
                table[b, a] += 0.5 / gap
    rows = rankers["counting_floor"].rank(sequences, 5)
    for history, row in list(zip(sequences, rows, strict=True))[:100]:
        score = sum(w * table[i] / table[i].sum() ** 0.5 for w, i in zip((1, 0.5, 0.25), history[::-1], strict=False))
        score[history] = -np.inf
        assert score[row] == pytest.approx(np.sort(score)[::-1][:5], rel=1e-5)
