"""The plan: every entry once, any row from nothing but the seed, shares as asked."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec_jax.config import DataConfig, MixtureConfig
from m6rec_jax.config.data import DEFAULT_MIXTURE
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.domains import facts_of
from m6rec_jax.data.loader import PlanRows, batches, build_row
from m6rec_jax.data.plan import Plan, make_pools, mixture_shares
from m6rec_jax.data.tasks import Piece, window_starts
from m6rec_jax.errors import InputError

CONFIG = DataConfig(length=64, rows=8, block=512)
EVERY = {**DEFAULT_MIXTURE, "text-masked": 0.05}


def plan_of(path, config=CONFIG, seed=0, mixture=None):
    dataset = open_dataset(path)
    facts, mixture = facts_of(dataset), MixtureConfig(mixture or EVERY)
    pools = make_pools(mixture, dataset.index, "train", config, facts)
    return Plan(pools, mixture_shares(mixture, pools), config, seed), dataset.records("train")


@pytest.fixture(scope="module")
def tiny_plan(tiny_dataset):
    dataset = open_dataset(tiny_dataset)
    facts, mixture = facts_of(dataset), MixtureConfig(EVERY)
    pools = make_pools(mixture, dataset.index, "train", CONFIG, facts)
    return pools, mixture_shares(mixture, pools)


@pytest.fixture(params=["tiny_dataset", "tiny_levels"])
def path(request):
    return request.getfixturevalue(request.param)


def test_every_entry_of_the_plan_is_in_exactly_one_row(path):
    plan, _ = plan_of(path)
    used, number = [], 0
    while len(used) < 3 * CONFIG.block:
        used += plan.row(number).number.tolist()
        number += 1
    assert sorted(used[: 3 * CONFIG.block]) == list(range(3 * CONFIG.block))


def test_each_task_goes_through_all_its_records_before_it_repeats_one(path):
    plan, _ = plan_of(path)
    blocks = [plan.entries(b) for b in range(30)]
    for t, pool in enumerate(plan.pools):
        drawn = [pair for e in blocks for pair in zip(e.record[e.task == t], e.start[e.task == t], strict=True)]
        size = len(pool.records)
        everything = set(zip(pool.records, pool.starts, strict=True))
        assert len(drawn) > size
        for lap in range(len(drawn) // size):
            assert set(drawn[lap * size : (lap + 1) * size]) == everything, pool.task.name


def test_a_row_depends_on_seed_and_number_alone(path):
    first, records = plan_of(path)
    again, _ = plan_of(path)
    other, _ = plan_of(path, seed=1)
    a = build_row(first, records, first.row(37), first.pools)
    b = build_row(again, records, again.row(37), again.pools)  # without having laid out row 0 first
    assert all((a[name] == b[name]).all() for name in a)
    c = build_row(other, records, other.row(37), other.pools)
    assert any((a[name] != c[name]).any() for name in a)


def test_built_examples_keep_to_the_planned_lengths(path):
    plan, records = plan_of(path)
    for number in range(20):
        entries = plan.row(number)
        row = build_row(plan, records, entries, plan.pools)
        lengths = np.bincount(row["segment_ids"], minlength=len(entries.length) + 1)[1:]
        assert (lengths <= entries.length).all()
        assert (np.sort(row["order"][row["segment_ids"] == 1]) == row["order"][row["segment_ids"] == 1]).all()


def test_examples_that_are_kept_are_those_that_would_be_built(path):
    """Every row with and without examples kept from earlier rows, over more than an epoch; chance is kept out."""
    plan, records = plan_of(path)
    kept = {}
    rows = [plan.row(number) for number in range(150)]
    for entries in rows:
        built = build_row(plan, records, entries, plan.pools)
        again = build_row(plan, records, entries, plan.pools, kept)
        assert all((built[name] == again[name]).all() for name in built)
    assert {plan.pools[task].task.name for task, _, _ in kept} == {"next-item", "text-causal"}
    assert 0 < len(kept) < sum(len(entries.task) for entries in rows)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_deal_the_same_rows_and_resume_anywhere(path, processes):
    """Batches 3 and 4 of a run, read by any number of processes that start there, are those of one undisturbed process."""
    plan, records = plan_of(path)
    undisturbed = list(batches(PlanRows(plan, records, 0, 5, CONFIG.rows, 0, 1), threads=2))
    first = 3 * CONFIG.rows
    dealt = [list(batches(PlanRows(plan, records, first, 2, CONFIG.rows, p, processes), 1)) for p in range(processes)]
    for i in range(2):
        joined = np.concatenate([part[i]["tokens"] for part in dealt])
        assert (joined == undisturbed[3 + i]["tokens"]).all()


def test_shares_are_shares_of_target_tokens_and_padding_is_rare(tiny_dataset):
    plan, records = plan_of(tiny_dataset, replace(CONFIG, block=4096))
    rows = [build_row(plan, records, plan.row(i), plan.pools) for i in range(400)]
    weights = np.stack([r["loss_weights"] for r in rows])
    tasks = np.stack([r["task_ids"] for r in rows])
    wanted = mixture_shares(MixtureConfig(EVERY), plan.pools)
    found = np.array([weights[tasks == t].sum() for t in range(len(plan.pools))]) / weights.sum()
    np.testing.assert_allclose(found, wanted, atol=0.04)
    assert np.mean([r["segment_ids"] > 0 for r in rows]) >= 0.92


def test_long_histories_are_covered_by_windows_of_whole_events(tiny_levels):
    """With rows shorter than histories, the windows of a user hold every item at least once, none cut in half."""
    plan, records = plan_of(tiny_levels, replace(CONFIG, length=24), mixture={"next-item": 1.0})
    (pool,) = plan.pools
    several = [r for r in np.unique(pool.records) if (pool.records == r).sum() > 1]
    assert len(several) > 10
    for number in several:
        record = records[int(number)]
        starts = pool.starts[pool.records == number]
        made = [pool.task.build(record, Piece(pool.stretch, int(s), 0.5), plan.pools[0].facts) for s in starts]
        assert all(len(example.target) <= pool.stretch for example in made)
        covered = {int(event) for example in made for event in example.units[example.target_rows >= 0]}
        assert covered == set(np.flatnonzero(record.items >= 0))
        for example in made:
            tokens, events = example.target, example.units
            for event in set(events[example.target_rows >= 0]):
                assert (tokens[events == event] >= plan.pools[0].facts.vocab.text.end).sum() == plan.pools[
                    0
                ].facts.levels


@given(st.integers(1, 400), st.integers(8, 64), st.integers(0, 6), st.integers(0, 399))
def test_windows_hold_every_short_run_of_tokens(tokens, stretch, overlap, at):
    starts = window_starts(tokens, stretch, overlap)
    assert starts[0] == 0 and starts[-1] == max(tokens - stretch, 0)
    size = min(overlap + 1, tokens)
    at = min(at, tokens - size)
    assert any(start <= at and at + size <= start + stretch for start in starts)


@given(st.integers(0, 99), st.integers(1, 300))
def test_a_plan_taken_up_at_a_cursor_goes_on_as_it_was(tiny_plan, seed, number):
    pools, shares = tiny_plan
    whole = Plan(pools, shares, CONFIG, seed)
    wanted = whole.row(number)
    resumed = Plan(pools, shares, CONFIG, seed, at=whole.cursor(number))
    assert (resumed.row(number).number == wanted.number).all()
    assert resumed.cursor(number) == whole.cursor(number)


@given(st.integers(0, 9999), st.integers(1, 3))
def test_every_entry_once_for_every_seed(tiny_plan, seed, blocks):
    pools, shares = tiny_plan
    plan = Plan(pools, shares, CONFIG, seed)
    used, number, wanted = [], 0, blocks * CONFIG.block
    while len(used) < wanted:
        used += plan.row(number).number.tolist()
        number += 1
    assert sorted(used) == list(range(wanted))


def test_kinds_weigh_targets_and_searches_are_read_only(tiny_levels):
    plan, records = plan_of(tiny_levels, mixture={"next-item": 1.0})
    weights = np.concatenate([build_row(plan, records, plan.row(i), plan.pools)["loss_weights"] for i in range(10)])
    assert set(np.unique(np.round(weights, 3))) == {0.0, np.float32(0.3), 1.0}
    targets = np.concatenate([build_row(plan, records, plan.row(i), plan.pools)["targets"] for i in range(10)])
    assert (targets[weights > 0] >= plan.pools[0].facts.vocab.text.end).all()


def test_unknown_tasks_and_empty_mixtures_are_refused(tiny_dataset):
    with pytest.raises(InputError, match="mixture.tasks.next-film: unknown task; known: .*next-item"):
        plan_of(tiny_dataset, mixture={"next-film": 1.0})


def test_a_text_task_that_the_dataset_has_not_is_left_out_beside_others(tiny, capsys):
    config, facts = DataConfig(length=64, rows=4), facts_of(tiny)
    with_it = MixtureConfig({"describe": 0.2, "next-item": 0.6, "text-causal": 0.3})
    pools = make_pools(with_it, tiny.index, "train", config, facts)
    assert [pool.task.name for pool in pools] == ["next-item", "text-causal"]
    assert "mixture.tasks.describe: the dataset has no such task" in capsys.readouterr().err
    np.testing.assert_allclose(mixture_shares(with_it, pools), [2 / 3, 1 / 3])
