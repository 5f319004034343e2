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
    hit, precise = 0, 0.0
    for rank, item in enumerate(items[:k], 1):
        if item in wanted and item not in seen:
            gained += 1 / math.log2(rank + 1)
            hit += 1
            precise += hit / rank
            place = place or rank
        seen.add(item)
    best = sum(1 / math.log2(r + 1) for r in range(1, min(k, len(wanted)) + 1))
    return {
        f"ndcg@{k}": gained / best if best else 0.0,
        f"recall@{k}": hit / len(wanted) if wanted else 0.0,
        f"precision@{k}": hit / k,
        f"accuracy@{k}": hit / k,
        f"mrr@{k}": 1 / place if place else 0.0,
        f"hit_rate@{k}": float(hit > 0),
        f"f1@{k}": 2 * hit / (k + len(wanted)) if hit else 0.0,
        f"map@{k}": precise / len(wanted) if wanted else 0.0,
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
    theirs = ir.calc_aggregate(
        [ir.nDCG @ 10, ir.R @ 10, ir.P @ 10, ir.RR @ 10, ir.nDCG @ 5, ir.AP @ 10, ir.Success @ 5], wanted, run
    )
    for measure, name in ((ir.nDCG @ 10, "ndcg@10"), (ir.R @ 10, "recall@10"), (ir.P @ 10, "precision@10"),
                          (ir.RR @ 10, "mrr@10"), (ir.nDCG @ 5, "ndcg@5"), (ir.AP @ 10, "map@10"), (ir.Success @ 5, "hit_rate@5")):  # fmt: skip
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
    assert all(0 <= value <= 1 for value in got.values())
    targets = np.zeros(3, int)
    novelty = metrics.beyond_per_user(rows, facts, 2, targets)["novelty@2"]
    assert novelty == pytest.approx([2 / 3, 1 / 3, 0.0])  # bits (1 + 3)/2, 1, nothing, of 3
    one = metrics.Facts(users_had=np.array([1, 0, 1, 0]), users=1)
    assert metrics.beyond_per_user(rows, one, 2, targets)["novelty@2"].tolist() == [0, 0, 0]
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


def test_blocks_change_nothing(monkeypatch):
    rows, targets = random_lists(users=50), [np.unique(rng.integers(0, 25, rng.integers(0, 5))) for _ in range(50)]
    facts = metrics.Facts(rng.integers(0, 9, 25), 9, content=rng.normal(size=(25, 4)))
    whole = metrics.per_user(rows, targets) | metrics.beyond_per_user(rows, facts, 10, targets)
    counts, best = metrics.tally(rows, 25)
    monkeypatch.setattr("m6rec_jax.recommend.metrics.lists.BLOCK", 16)
    cut = metrics.per_user(rows, targets) | metrics.beyond_per_user(rows, facts, 10, targets)
    assert all(cut[name] == pytest.approx(whole[name], abs=1e-6) for name in whole)
    again = metrics.tally(rows, 25)
    assert np.array_equal(again[0], counts) and np.array_equal(again[1], best)
    assert np.array_equal(counts, np.bincount(rows[rows >= 0], minlength=25))
    assert best.tolist() == [min([j + 1 for row in rows.tolist() for j, i in enumerate(row) if i == item], default=11) for item in range(25)]  # fmt: skip


def test_nobody_is_asked_is_no_fault():
    rows, facts = np.zeros((0, 5), int), metrics.Facts(np.ones(3, int), 2)
    assert all(len(v) == 0 for v in metrics.per_user(rows, np.zeros(0, int)).values())
    assert metrics.beyond(rows, facts, 5)["coverage@5"] == 0 and metrics.tally(rows, 3)[0].tolist() == [0, 0, 0]


def rectools(rows, targets, users_had, users, content, k):
    """RecTools' formulas written out: MIUF (in bits), serendipity, intra-list diversity; a mean over what a list holds."""
    catalogue = len(users_had)
    by_count = sorted({c for c in users_had if c > 0}, reverse=True)
    miuf, serendipity, diversity = [], [], []
    for row, target in zip(rows, targets, strict=True):
        items = [i for i in row[:k] if i >= 0]
        miuf.append(np.mean([-math.log2(max(users_had[i], 1) / users) for i in items]) if items else 0)
        gained = []
        for rank, i in enumerate(items, 1):
            popular = (catalogue + 1 - (by_count.index(users_had[i]) + 1)) / catalogue if users_had[i] else 0
            gained.append(max((catalogue + 1 - rank) / catalogue - popular, 0) * (i in target))
        serendipity.append(np.mean(gained) if gained else 0)
        apart = []
        for x in range(len(items)):
            for y in range(x + 1, len(items)):
                a, b = content[items[x]], content[items[y]]
                if a.any() and b.any():
                    apart.append(1 - max(a @ b / np.linalg.norm(a) / np.linalg.norm(b), 0))
        diversity.append(np.mean(apart) if apart else 0)
    return np.array(miuf), np.array(serendipity), np.array(diversity)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_novelty_serendipity_and_diversity_are_rectools(k):
    rows, targets = random_lists(), [np.unique(rng.integers(0, 25, 3)) for _ in range(60)]
    users_had, content = rng.integers(0, 12, 25), rng.normal(size=(25, 5))
    content[[3, 8]] = 0
    facts = metrics.Facts(users_had, 40, content=content, recent=np.arange(25) >= 20)
    got = metrics.beyond_per_user(rows, facts, k, targets)
    miuf, serendipity, diversity = rectools(rows, targets, users_had, 40, content, k)
    assert got[f"novelty@{k}"] == pytest.approx(miuf / math.log2(40), abs=1e-6)
    assert got[f"serendipity@{k}"] == pytest.approx(serendipity, abs=1e-6) and serendipity.any()
    assert got[f"diversity@{k}"] == pytest.approx(diversity, abs=1e-6) and (k == 1 or diversity.any())
    new = [np.mean([i >= 20 for i in row[:k] if i >= 0]) if (row[:k] >= 0).any() else 0 for row in rows]
    assert got[f"recent@{k}"] == pytest.approx(new, abs=1e-6)
    assert all((v >= 0).all() and (v <= 1).all() for v in got.values())


def test_types_are_covered_like_categories():
    facts = metrics.Facts(np.ones(3, int), 2, types=metrics.category_matrix([["film"], ["book"], ["book"]]))
    assert metrics.beyond(np.array([[1, 2]]), facts, 2)["type_coverage@2"] == 0.5
    assert "category_coverage@2" not in metrics.beyond(np.array([[1, 2]]), facts, 2)


def test_satisfaction_is_what_users_said_of_hits_alone():
    rows, targets = np.array([[1, 2], [2, 1], [0, 3], [1, 0]]), np.array([1, 1, 2, 0])
    got = metrics.satisfaction(rows, targets, np.array([5.0, np.nan, 1.0, 2.0]), 2)
    assert got == {"satisfaction@2": 3.5, "satisfaction_coverage@2": 2 / 3, "satisfaction_of_targets": pytest.approx(8 / 3)}  # fmt: skip
    assert metrics.satisfaction(rows, targets, np.full(4, np.nan), 2) == {}
    assert metrics.satisfaction(rows, np.full(4, 9), np.ones(4), 2)["satisfaction@2"] is None


def test_scores_are_measured_like_scikit_learn():
    sk, calibration = pytest.importorskip("sklearn.metrics"), pytest.importorskip("sklearn.calibration")
    p = np.round(rng.random(1000) ** 2, 2)  # with ties
    y, users = rng.random(1000) < p, rng.integers(0, 60, 1000)
    assert metrics.auc(y, p) == pytest.approx(sk.roc_auc_score(y, p))
    assert metrics.log_loss(y, p) == pytest.approx(sk.log_loss(y, np.clip(p, 1e-15, 1 - 1e-15)))
    shares, chances = calibration.calibration_curve(y, p, n_bins=10, strategy="quantile")
    bins = metrics.reliability(y, p)
    assert [b["hit"] for b in bins] == pytest.approx(shares) and [b["p"] for b in bins] == pytest.approx(chances)
    assert metrics.ece(y, p) == pytest.approx(sum(b["n"] * abs(h - c) for b, h, c in zip(bins, shares, chances, strict=True)) / 1000)  # fmt: skip
    per = [(sk.roc_auc_score(y[users == u], p[users == u]), (users == u).sum()) for u in range(60) if 0 < y[users == u].mean() < 1]  # fmt: skip
    assert metrics.gauc(y, p, users) == pytest.approx(sum(a * n for a, n in per) / sum(n for _, n in per))
    assert math.isnan(metrics.auc(np.ones(3), np.arange(3)))
    known = metrics.scoring(y, p, users, draws=200)
    assert known["metrics"]["auc"] == metrics.auc(y, p) and set(known["metrics"]) == {"auc", "gauc", "log_loss", "ece"}
    low, high = known["ci95"]["auc"]
    assert low < metrics.auc(y, p) < high and 0.005 < (high - low) / 4 < 0.03  # standard error about .015
    assert set(metrics.scoring(np.ones(9), np.full(9, 0.9))["metrics"]) == {"log_loss", "ece"}


def test_holm_by_hand():
    assert metrics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert metrics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and metrics.holm([]) == []
    for p in rng.random((20, 5)):  # the step-down rule itself: reject while p_(i) <= level / (m - i)
        level, order, rejected = 0.3, np.argsort(p), set()
        for i, at in enumerate(order):
            if p[at] > level / (5 - i):
                break
            rejected.add(int(at))
        assert {i for i, q in enumerate(metrics.holm(p)) if q <= level} == rejected


def test_groups_part_the_users():
    facts = metrics.Facts(np.array([8, 4, 0, 2]), 9, metrics.category_matrix([["big"], ["big", "small"], ["small"], None]))  # fmt: skip
    lengths, targets = np.array([1, 2, 2, 5, 9, 30]), np.array([0, 1, 2, 3, 0, 2])
    groups = {g.name: g.users.tolist() for g in metrics.user_groups(lengths, targets, facts)}
    assert groups["few events"] == [True, True, True, False, False, False]
    assert groups["middling events"] == [False, False, False, True, False, False]
    assert groups["many events"] == [False, False, False, False, True, True]
    assert groups["new target"] == [False, False, True, False, False, True]
    assert groups["head category"] == [True, True, False, False, True, False]  # 12 of 16 events are big
    assert groups["tail category"] == [False, False, True, False, False, True]  # item 3 has no category: neither
    assert "head category" not in {g.name for g in metrics.user_groups(lengths, targets, metrics.Facts(np.ones(4), 9))}
