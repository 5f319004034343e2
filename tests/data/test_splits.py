"""What is held out, what it may see, and that time never runs backwards."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec_jax.data.card import Split
from m6rec_jax.data.splits import LEAST_EVENTS, TEST, TRAIN, VALID, records_of, split_events
from m6rec_jax.errors import InputError

LOO, RATIO, GLOBAL = Split("leave-one-out"), Split("ratio", 0.2, 0.2), Split("global-time", 0.2, 0.2)


@st.composite
def events(draw):
    lengths = draw(st.lists(st.integers(1, 12), max_size=8))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    times = np.array([draw(st.integers(0, 50)) for _ in owner], np.int64)
    times = times[np.lexsort((times, owner))] if len(owner) else times
    target = np.array([draw(st.booleans()) or draw(st.booleans()) for _ in owner], bool)
    return owner, times, target


@given(events(), st.sampled_from([LOO, RATIO]))
def test_per_user_rules(made, rule):
    owner, times, target = made
    label = split_events(owner, times, target, rule)
    for user in np.unique(owner):
        mine, asked = label[owner == user], target[owner == user]
        assert (np.diff(mine.astype(int)) >= 0).all()
        n = asked.sum()
        if n < LEAST_EVENTS:
            assert (mine[asked] == TRAIN).all()
            continue
        held = [(mine[asked] == part).sum() for part in (TRAIN, VALID, TEST)]
        if rule is LOO:
            assert held == [n - 2, 1, 1]
        assert min(held) >= 1 and held[1] == held[2]


@given(events(), st.sampled_from([LOO, RATIO, GLOBAL]))
def test_a_record_ends_with_its_targets_and_sees_only_what_came_before(made, rule):
    owner, times, target = made
    try:
        label = split_events(owner, times, target, rule)
    except InputError:
        assert rule is GLOBAL
        return
    for split in (TRAIN, VALID, TEST):
        held = records_of(label, owner, target, split)
        for start, end, wanted in zip(held.starts, held.starts[1:], held.targets, strict=False):
            at = held.events[start:end]
            assert len(set(owner[at])) == 1 and (np.diff(at) > 0).all()
            history, asked = at[: len(at) - wanted], at[len(at) - wanted :]
            assert target[asked].all() and (label[asked] == split).all()
            everything = np.flatnonzero((owner == owner[at[0]]) & (label < max(split, 1)))
            assert history.tolist() == everything.tolist()
            if split != TRAIN:
                assert wanted >= 1 and len(history) >= 1
                assert times[history].max() <= times[asked].min()
        users = owner[held.events[held.starts[:-1]]] if len(held.targets) else []
        assert (np.diff(users) > 0).all()


@given(events())
def test_global_time_cuts_everybody_at_the_same_moments(made):
    owner, times, target = made
    try:
        label = split_events(owner, times, target, GLOBAL)
    except InputError:
        return
    for earlier, later in ((TRAIN, VALID), (VALID, TEST)):
        if (label == earlier).any() and (label >= later).any():
            assert times[label == earlier].max() < times[label >= later].min()


def test_an_input_only_event_belongs_to_the_target_it_follows():
    owner = np.zeros(9, int)
    target = np.array([1, 1, 0, 1, 0, 1, 0, 1, 0], bool)
    label = split_events(owner, np.arange(9), target, LOO)
    assert label.tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2]
    test = records_of(label, owner, target, TEST)
    assert test.events.tolist() == [0, 1, 2, 3, 4, 5, 6, 7] and test.targets.tolist() == [1]
    valid = records_of(label, owner, target, VALID)
    assert valid.events.tolist() == [0, 1, 2, 3, 4, 5]


def test_one_instant_cannot_be_cut_by_time():
    owner = np.repeat(np.arange(5), 4)
    with pytest.raises(InputError, match=r"split\.rule: global-time.*leave-one-out"):
        split_events(owner, np.full(20, 77), np.ones(20, bool), GLOBAL)
