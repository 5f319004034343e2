"""What a configuration leaves to the data: row length, rows and steps, so that one configuration suits every dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from m6rec_jax.config import Config
from m6rec_jax.data.domains import Domain
from m6rec_jax.data.records import HISTORY
from m6rec_jax.data.tasks import tasks

LENGTHS = (64, 128, 256)  # attention costs grow with a row's length: no longer than the histories ask for
WHOLE = 0.95  # share of histories that a row shall hold whole; longer ones are cut into windows
LEAST_STEPS = 500  # few events need more passes, up to where they are known by heart
VALIDATIONS = 8  # in a run, or more: the best checkpoint lies near the best there was
BATCH_TOKENS = 1024  # a device: many small steps learn more from a pass than few large ones


def fitted(config: Config, domains: Sequence[Domain], row_shards: int = 1) -> Config:
    """`config` without its zeros: `data.length`, `data.rows` (`BATCH_TOKENS` for each of `row_shards`, a multiple of them
    and of `train.accumulate`)
    and, with `train.epochs`, the `train.steps` that so many passes over all histories take, `LEAST_STEPS` or more, and a
    `train.eval_every` that leaves room for `VALIDATIONS` of them.

    A configuration that leaves nothing open comes back as it is.
    """
    histories = np.concatenate([_history_tokens(domain) for domain in domains])
    length, rows, steps, every = config.data.length, config.data.rows, config.train.steps, config.train.eval_every
    if not length:
        whole = float(np.quantile(histories, WHOLE)) + 1 if len(histories) else 0  # <s> stands before a history
        length = next((room for room in LENGTHS if room >= whole), LENGTHS[-1])
    if not rows:
        unit = row_shards * config.train.accumulate
        rows = -(-max(BATCH_TOKENS // length, 1) * row_shards // unit) * unit
    if config.train.epochs:
        once = histories.sum() / (_behaviour_share(config) * rows * length)
        steps = min(steps, max(int(np.ceil(config.train.epochs * once)), LEAST_STEPS, config.optim.warmup + 1))
        every = min(every, -(-steps // VALIDATIONS))
    data, train = replace(config.data, length=length, rows=rows), replace(config.train, steps=steps, eval_every=every)
    return replace(config, data=data, train=train)


def _history_tokens(domain: Domain) -> np.ndarray:
    index = domain.dataset.index
    return index["train_tokens"][index["train_kind"] == HISTORY].astype(np.int64)


def _behaviour_share(config: Config) -> float:
    """Share of the target tokens that come from histories (all of them where no task reads any)."""
    known, shares = tasks(), config.mixture.tasks
    of_histories = sum(share for name, share in shares.items() if name in known and HISTORY in known[name].records)
    return of_histories / sum(shares.values()) or 1.0
