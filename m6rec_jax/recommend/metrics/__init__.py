"""Measures of ranked lists and of scores, and intervals and tests over users.

Conventions (EVALUATION.md). A list is a row of `rows [U,k]`: catalogue rows, best first, -1 where the system returned
nothing. Rank is the position in that list, counted from 1; a target outside it scores 0. An item that stands in a list
twice counts once, at its first place. Every mean is over all users, those with an empty list included. Targets are one
catalogue row a user `[U]`, or one array a user when several items count.

Memory. Users go to the device in blocks of `BLOCK`; there is never a users x items matrix. On the device: a block's
lists `[B,k]` and targets `[B,W]`, the vectors of its items `[B,k,D]`, and tables by catalogue row (content `[C,D]`, a few
columns and two counters `[C]`). On the host: the lists, and one float32 a user and measure.
"""

from m6rec_jax.data.inequality import gini
from m6rec_jax.recommend.metrics.accuracy import per_user
from m6rec_jax.recommend.metrics.beyond import (
    Facts,
    beyond,
    beyond_per_user,
    category_matrix,
    popularity_lift,
    satisfaction,
    tally,
    valid_id_rate,
)
from m6rec_jax.recommend.metrics.classes import classes
from m6rec_jax.recommend.metrics.groups import Group, user_groups
from m6rec_jax.recommend.metrics.lists import BLOCK, Targets, flatten, hits, member, ranks, repeated
from m6rec_jax.recommend.metrics.scoring import auc, ece, gauc, log_loss, reliability, scoring
from m6rec_jax.recommend.metrics.significance import bootstrap_ci, holm, paired, paired_randomisation

__all__ = [
    "BLOCK",
    "Facts",
    "Group",
    "Targets",
    "auc",
    "beyond",
    "beyond_per_user",
    "bootstrap_ci",
    "category_matrix",
    "classes",
    "ece",
    "flatten",
    "gauc",
    "gini",
    "hits",
    "holm",
    "log_loss",
    "member",
    "paired",
    "paired_randomisation",
    "per_user",
    "popularity_lift",
    "ranks",
    "reliability",
    "repeated",
    "satisfaction",
    "scoring",
    "tally",
    "user_groups",
    "valid_id_rate",
]
