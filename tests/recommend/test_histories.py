import numpy as np
import pytest

from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.records import HISTORY
from m6rec_jax.recommend.histories import everything, held_out, interactions


@pytest.fixture(params=["tiny_dataset", "tiny_levels"])
def dataset(request):
    return open_dataset(request.getfixturevalue(request.param))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_nothing_at_or_after_the_target_is_in_a_history(dataset, split):
    asked = held_out(dataset, split)
    records = {r.row: r for r in dataset.records(split) if r.kind == HISTORY}
    assert len(asked) == len(records) > 0
    for i, user in enumerate(asked.users):
        record, n = records[user], len(asked.items[i])
        assert record.targets >= 1 and n == len(record.items) - record.targets
        assert asked.targets[i] == record.items[n] and asked.target_times[i] == record.times[n]
        assert np.array_equal(asked.items[i], record.items[:n]) and len(asked.times[i]) == len(asked.kinds[i]) == n
        assert all(p < n and asked.items[i][p] == -1 for p in asked.queries[i])


def test_interactions_are_training_events_only(dataset):
    counts = interactions(dataset)
    assert counts.shape == (dataset.users.height, dataset.catalogue)
    assert np.array_equal(np.asarray(counts.sum(0)).ravel(), dataset.items["events"].to_numpy())
    train = {r.row: r.items for r in dataset.records("train") if r.kind == HISTORY}
    for user in range(dataset.users.height):
        items = train.get(user, np.zeros(0, int))
        assert counts[user].sum() == (items >= 0).sum()


def test_everything_holds_each_user_once_with_all_events(dataset):
    whole, last = everything(dataset), held_out(dataset, "test")
    assert np.array_equal(whole.users, np.unique(whole.users))
    at = {u: i for i, u in enumerate(whole.users)}
    for i, user in enumerate(last.users):
        items = whole.items[at[user]]
        assert items[len(last.items[i])] == last.targets[i]
    back = whole.take([2, 0])
    assert back.users.tolist() == [whole.users[2], whole.users[0]] and np.array_equal(back.items[1], whole.items[0])
