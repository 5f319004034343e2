"""Groups of users, by how much is known of them and by what they went on to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from m6rec_jax.recommend.metrics.beyond import Facts


@dataclass(frozen=True)
class Group:
    """A group of users: its name, who they are in words, and which `[U]` bool."""

    name: str
    says: str
    users: np.ndarray


def user_groups(lengths: np.ndarray, targets: np.ndarray, facts: Facts) -> list[Group]:
    """Groups of U users by history length `[U]` and target row `[U]`; empty ones too, so that reports look alike.

    Few, middling and many events are thirds of the users (users with equally many stay together). A target is new when
    nobody had it in training. Head categories are the fewest that together hold half of the training events; a target
    is in the head when one of its categories is, and users whose target has no category are in neither group.
    """
    low, high = np.quantile(lengths, (1 / 3, 2 / 3), method="inverted_cdf") if len(lengths) else (0, 0)
    new = facts.users_had[targets] == 0
    made = [
        Group("few events", f"at most {low:,.0f} events of history", lengths <= low),
        Group("middling events", f"more than {low:,.0f} and at most {high:,.0f} events", (lengths > low) & (lengths <= high)),
        Group("many events", f"more than {high:,.0f} events of history", lengths > high),
        Group("new target", "nobody had the target in training", new),
        Group("known target", "somebody had the target in training", ~new),
    ]  # fmt: skip
    if facts.categories is not None:
        table = sp.csr_array(facts.categories, dtype=np.float64)
        events = table.T @ facts.users_had
        order = np.argsort(-events, kind="stable")
        head = np.zeros(len(events), bool)
        head[order[: 1 + int(np.searchsorted(np.cumsum(events[order]), events.sum() / 2))]] = True
        some, inside = (table @ np.ones(len(head)))[targets] > 0, (table @ head)[targets] > 0
        says = f"{int(head.sum())} of {len(head)} categories, which hold half of the training events"
        made += [
            Group("head category", f"target in one of the largest {says}", inside),
            Group("tail category", f"target in none of the largest {says}", some & ~inside),
        ]
    return made
