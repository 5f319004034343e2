"""Two tiny domains with one tokenizer: `tiny` (timed, one level) and `films` (an order only, three levels, other ids)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import polars as pl
import pytest

from m6rec_jax.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from m6rec_jax.data.prepare import prepare
from m6rec_jax.training.run import train
from tests.fixtures import tiny_card, tiny_tables

SMALL = Config(
    model=ModelConfig(layers=1, width=16, heads=2),
    optim=OptimConfig(learning_rate=0.02, warmup=2),
    data=DataConfig(length=64, rows=4, block=512),
    checkpoint=CheckpointConfig(every=5, keep=2),
    train=TrainConfig(steps=10, log_every=5, eval_every=0),
)


def films_tables(seed: int = 3) -> dict[str, pl.DataFrame]:
    """Other users' walks through 40 of the tiny items, renamed, in an order without times."""
    tables = tiny_tables(seed)
    events = tables["events"].with_columns(i="film-" + pl.col("i"), t=pl.int_range(pl.len()))
    items = tables["items"].with_columns(id="film-" + pl.col("id"), title="film " + pl.col("title"))[:40]
    return tables | {"events": events.filter(pl.col("i").is_in(items["id"].implode())), "items": items}


@cache
def prepared_films(root: Path, like: Path) -> Path:
    tables = films_tables()
    card = tiny_card(tables, name="films")
    card["events"] |= {"time_unit": "order"}
    made = prepare(card, root / "films", like=like, borrow="tokenizer", levels=3, codebook=8, content_width=24)
    return made.path


@pytest.fixture(scope="session")
def films(tiny_root: Path, tiny_dataset: Path) -> Path:
    """Folder of the second domain: three levels, no times, content of another width, the tokenizer of `tiny`."""
    return prepared_films(tiny_root, tiny_dataset)


@cache
def trained_both(root: Path, first: Path, second: Path) -> Path:
    return train(SMALL, [first, second], root / "both")


@pytest.fixture(scope="session")
def both(tiny_root: Path, tiny_dataset: Path, films: Path) -> Path:
    """A run of 10 steps on both. Tests may let it have its gates, nothing else."""
    return trained_both(tiny_root, tiny_dataset, films)
