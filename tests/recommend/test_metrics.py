import math

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec_jax.recommend import metrics

rng = np.random.default_rng(0)


def random_lists(users=60, catalogue=25, k=10, holes=True):
    rows = np.stack([rng.permutation(catalogue)[:k] for _ in range(users)]).astype(np.int32)
    if holes:  # some systems return less than k
        for u in range(0, users, 7):
            rows[u, rng.integers(0, k) :] = -1
    return rows


def slow_measures(items, wanted, k):
    """One user's list by the book: loops, sets and logarithms."""
    wanted, gained, place, seen = set(wanted), 0.0, 0, set()
    hit = 0
    for rank, item in enumerate(items[:k], 1):
        if item in wanted and item not in seen:
            gained += 1 / math.log2(rank + 1)
            hit += 1
            place = place or rank
        seen.add(item)
    best = sum(1 / math.log2(r + 1) for r in range(1, min(k, len(wanted)) + 1))
    return {
        f"ndcg@{k}": gained / best if best else 0.0,
        f"recall@{k}": hit / len(wanted) if wanted else 0.0,
        f"precision@{k}": hit / k,
        f"accuracy@{k}": hit / k,
        f"mrr@{k}": 1 / place if place else 0.0,
    }


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(-1, 9), min_size=6, max_size=6), st.lists(st.integers(0, 9), max_size=4)), min_size=1, max_size=8))  # fmt: skip
def test_measures_equal_the_slow_reference_for_any_lists(users):
    rows = np.array([items for items, _ in users])
    targets = [np.array(t, int) for _, t in users]
    fast = metrics.per_user(rows, targets, ks=(1, 3, 6, 10))
    for u, (items, wanted) in enumerate(users):
        for k in (1, 3, 6, 10):
            for name, value in slow_measures([i if i >= 0 else None for i in items], wanted, k).items():
                assert fast[name][u] == pytest.approx(value), (name, items, wanted)


def test_one_target_is_a_set_of_one():
    rows, targets = random_lists(), rng.integers(0, 25, 60)
    one, sets = metrics.per_user(rows, targets), metrics.per_user(rows, [np.array([t]) for t in targets])
    assert all(np.array_equal(one[name], sets[name]) for name in one)
    ranks = metrics.ranks(rows, targets)
    assert np.allclose(one["ndcg@10"], np.where(ranks > 0, 1 / np.log2(ranks + 1.0 + (ranks == 0)), 0))


def test_measures_agree_with_ir_measures():
    ir = pytest.importorskip("ir_measures")
    rows, targets = random_lists(), [np.unique(rng.integers(0, 25, 3)) for _ in range(60)]
    run = {str(u): {str(i): float(-r) for r, i in enumerate(row) if i >= 0} for u, row in enumerate(rows)}
    wanted = {str(u): {str(i): 1 for i in t} for u, t in enumerate(targets)}
    ours = metrics.per_user(rows, targets)
    theirs = ir.calc_aggregate([ir.nDCG @ 10, ir.R @ 10, ir.P @ 10, ir.RR @ 10, ir.nDCG @ 5], wanted, run)
    for measure, name in ((ir.nDCG @ 10, "ndcg@10"), (ir.R @ 10, "recall@10"), (ir.P @ 10, "precision@10"),
                          (ir.RR @ 10, "mrr@10"), (ir.nDCG @ 5, "ndcg@5")):  # fmt: skip
        assert ours[name].mean() == pytest.approx(theirs[measure], abs=1e-6)


def test_ndcg_agrees_with_scikit_learn():
    sk = pytest.importorskip("sklearn.metrics")
    rows = random_lists(holes=False, k=25)
    targets = [np.unique(rng.integers(0, 25, 3)) for _ in range(60)]
    truth, score = np.zeros((60, 25)), np.zeros((60, 25))
    for u in range(60):
        truth[u, targets[u]] = 1
        score[u, rows[u]] = np.arange(25, 0, -1)
    assert metrics.per_user(rows, targets)["ndcg@10"].mean() == pytest.approx(sk.ndcg_score(truth, score, k=10))


def test_gini_is_the_mean_absolute_difference():
    counts = rng.integers(0, 9, 40)
    slow = np.abs(counts[:, None] - counts[None]).sum() / (2 * len(counts) ** 2 * counts.mean())
    assert metrics.gini(counts) == pytest.approx(slow)
    assert metrics.gini(np.full(9, 3)) == pytest.approx(0)
    assert metrics.gini(np.eye(100)[0]) == pytest.approx(0.99)


def test_beyond_accuracy_by_hand():
    rows = np.array([[0, 1], [0, -1], [-1, -1]])
    histories = [np.array([2]), np.array([3, 3]), np.array([2])]
    categories = metrics.category_matrix([["a"], ["a", "b"], ["c"], None])
    facts = metrics.Facts(users_had=np.array([4, 1, 2, 0]), users=8, categories=categories)
    got = metrics.beyond(rows, facts, 2)
    assert got["coverage@2"] == 2 / 4
    assert got["category_coverage@2"] == pytest.approx(2 / 3)
    assert got["fill@2"] == 3 / 6
    assert metrics.novelty(rows, facts) == pytest.approx([2 / 3, 1 / 3, 0.0])  # bits (1 + 3)/2, 1, nothing, of 3
    assert got["novelty@2"] == pytest.approx(1 / 3) and all(0 <= value <= 1 for value in got.values())
    one = metrics.Facts(users_had=np.array([1, 0, 1, 0]), users=1)
    assert metrics.novelty(rows, one).tolist() == [0, 0, 0]
    # lists: (4+1)/2 and 4; histories: 2 and 0; the third user has no list and is left out of both
    assert metrics.popularity_lift(rows, histories, facts) == pytest.approx((2.5 + 4) / (2 + 0) - 1)
    assert metrics.category_matrix([None, []]) is None


def test_valid_id_rate_counts_every_kind_of_fault():
    rows = np.array([[0, 1, 1, 9, -1, 4, 3]])  # 1 repeated, 9 outside, 4 not allowed, 3 in the history
    allowed = np.array([True, True, True, True, False])
    rate = metrics.valid_id_rate(rows, [np.array([3])], 5, repeat=False, allowed=allowed)
    assert rate == pytest.approx(2 / 6)
    assert metrics.valid_id_rate(rows, [np.array([3])], 5, repeat=True, allowed=allowed) == pytest.approx(3 / 6)
    assert metrics.valid_id_rate(np.array([[-1]]), [np.zeros(0, int)], 5, repeat=False) == 1.0


def test_bootstrap_interval_covers_like_the_normal_one():
    values = rng.random(4000) < 0.2
    vectors = {"hit": values.astype(float), "same": values.astype(float)}
    low, high = metrics.bootstrap_ci(vectors, seed=3, draws=2000)["hit"]
    half = 1.96 * values.std() / math.sqrt(4000)
    assert low == pytest.approx(values.mean() - half, abs=half / 8)
    assert high == pytest.approx(values.mean() + half, abs=half / 8)
    again = metrics.bootstrap_ci(vectors, seed=3, draws=2000)
    assert again["hit"] == (low, high) == again["same"]
    assert metrics.bootstrap_ci(vectors, seed=4, draws=2000)["hit"] != (low, high)


def test_randomisation_finds_what_is_there_and_nothing_else():
    a = rng.random(800)
    assert metrics.paired_randomisation(a, a) == 1.0
    assert metrics.paired_randomisation(a + 0.3 + 0.1 * rng.random(800), a) == pytest.approx(1 / 10_001)
    noise = [metrics.paired_randomisation(rng.random(200), rng.random(200), seed=s, draws=500) for s in range(40)]
    assert 0.3 < np.mean(noise) < 0.7  # uniform under the null
    # exact for few users: 3 differences of one sign, 2 of 8 flips reach as far
    p = metrics.paired_randomisation(np.array([1.0, 2.0, 3.0]), np.zeros(3), draws=20_000)
    assert p == pytest.approx(2 / 8, abs=0.02)


def test_member_and_repeated_against_loops():
    rows = rng.integers(-1, 6, (50, 8))
    groups = [rng.integers(0, 6, rng.integers(0, 4)) for _ in range(50)]
    assert np.array_equal(metrics.member(rows, groups), [[i in set(g) for i in row] for row, g in zip(rows, groups, strict=True)])  # fmt: skip
    assert np.array_equal(metrics.repeated(rows), [[i >= 0 and i in row[:j] for j, i in enumerate(row)] for row in rows.tolist()])  # fmt: skip


def test_category_matrix_is_sparse_and_right():
    made = metrics.category_matrix([["x"], [], ["y", "x"]])
    assert sp.issparse(made) and made.toarray().tolist() == [[True, False], [False, False], [True, True]]
