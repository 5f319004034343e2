"""Which events train, which validate, which test.

Works on arrays of events sorted by (user, time, source row). A *target* is an event that may be predicted (an item,
of a kind with weight above 0); the others are input only and are never what a held-out record asks for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from m6rec_jax.data.card import Split
from m6rec_jax.errors import InputError

TRAIN, VALID, TEST = 0, 1, 2
SPLITS = ("train", "valid", "test")
LEAST_EVENTS = 3


def split_events(users: np.ndarray, times: np.ndarray, is_target: np.ndarray, rule: Split) -> np.ndarray:
    """TRAIN, VALID or TEST for each event `[n]` uint8; along a user the labels never fall.

    `leave-one-out` holds out each user's last two targets, `ratio` a share of each user's, `global-time` a share of all
    by time. Users under three targets only train (global-time knows no such limit).
    Raises InputError when global-time leaves nothing to train or nothing to hold out.
    """
    if rule.rule == "global-time":
        return _global_time(times, is_target, rule)
    order = np.cumsum(is_target)  # 1-based number of each target among all
    first = np.flatnonzero(np.diff(users, prepend=-1)) if len(users) else np.zeros(0, np.int64)
    lengths = np.diff(np.append(first, len(users)))
    before = np.repeat((order - is_target)[first], lengths)
    total = np.repeat(np.add.reduceat(is_target.astype(np.int64), first), lengths) if len(users) else order
    rank = order - before  # targets of this user up to and including this event
    if rule.rule == "leave-one-out":
        n_test = n_valid = (total >= LEAST_EVENTS).astype(np.int64)
    else:
        enough = total >= LEAST_EVENTS
        n_test = np.where(enough, np.maximum(np.rint(total * rule.test), 1), 0)
        n_valid = np.where(enough, np.maximum(np.rint(total * rule.valid), 1), 0)
        # Rounding up may leave a short history nothing to train on; its held-out part is cut back to one each.
        crowded = enough & (n_test + n_valid >= total)
        n_test, n_valid = np.where(crowded, 1, n_test), np.where(crowded, 1, n_valid)
    # An input-only event belongs to the target that it follows: it may inform what comes after, never before.
    label = (rank > total - n_test - n_valid).astype(np.uint8) + (rank > total - n_test)
    return label.astype(np.uint8)


def _global_time(times: np.ndarray, is_target: np.ndarray, rule: Split) -> np.ndarray:
    known = np.sort(times[is_target])
    if not len(known):
        return np.zeros(len(times), np.uint8)
    cuts = known[cut_places(len(known), rule)]
    label = label_by_cuts(times, cuts)
    check_cuts(cuts, np.bincount(label[is_target], minlength=3), rule)
    return label


def cut_places(n: int, rule: Split) -> list[int]:
    """Which of the `n` sorted times of targets begin valid and test under global-time."""
    return [int(n * (1 - rule.valid - rule.test)), int(n * (1 - rule.test))]


def label_by_cuts(times: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """The label of each time `[n]` uint8, given the two at which valid and test begin."""
    return np.searchsorted(cuts, times, side="right").astype(np.uint8)


def check_cuts(cuts: np.ndarray, targets: np.ndarray, rule: Split) -> None:
    """Raise InputError when a part has none of the `targets` [3]."""
    if not targets.all():
        raise InputError(
            f"split.rule: global-time with valid {rule.valid} and test {rule.test} cuts at times {cuts[0]} and {cuts[1]}, "
            "which leaves a part without events; choose split: leave-one-out, or other shares"
        )


@dataclass(frozen=True)
class Held:
    """The held-out records of one split: `events` [m] (indices into the sorted events, record after record),
    `starts` [r + 1] (where each record begins in `events`), `targets` [r] (how many at its end are to be predicted)."""

    events: np.ndarray
    starts: np.ndarray
    targets: np.ndarray


def records_of(label: np.ndarray, users: np.ndarray, is_target: np.ndarray, split: int) -> Held:
    """Which events make up each user's record of `split`.

    Train: the user's training events, no targets. Valid and test: all events of the splits before it, input-only ones
    included, then the targets of that split without the input-only events among or after them; users without an event
    in a split before or without a target have no record.
    """
    if split == TRAIN:
        use, ask = label == TRAIN, np.zeros(len(label), bool)
    else:
        ask = (label == split) & is_target
        use = (label < split) | ask
    n_users = int(users.max()) + 1 if len(users) else 0
    targets = np.bincount(users[ask], minlength=n_users)
    lengths = np.bincount(users[use], minlength=n_users)
    keep = lengths > 0 if split == TRAIN else (targets > 0) & (lengths > targets)
    events = np.flatnonzero(use & keep[users]) if n_users else np.zeros(0, np.int64)
    return Held(events, np.concatenate([[0], np.cumsum(lengths[keep])]), targets[keep])
