"""One tiny dataset for every room: 60 users, 56 items (Chinese and emoji titles among them), a few hundred events."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.data.prepare import prepare

USERS, ITEMS = 60, 56
HOUR = 3600
_THINGS = (
    "red shoes",
    "blue lipstick",
    "小米手机",
    "coffee ☕ mug",
    "garden hose",
    "棉质T恤 👕",
    "piano book",
    "wool hat 🎩",
)
_STYLES = ("classic", "light", "新款", "pro", "mini", "vintage", "kids")
_GROUPS = ("clothing", "beauty", "电子产品", "kitchen", "garden", "music")


def tiny_tables(seed: int = 0, kinds: bool = False) -> dict[str, pl.DataFrame]:
    """Raw tables as a user would have them: events (u, i, t[, k, q]), items, users, docs.

    Users walk through the catalogue in steps of 1 to 3, so there is something to learn. With `kinds` events are view,
    buy or search, and a search has a text and no item.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(USERS):
        length = 1 + user % 2 if user < 4 else int(rng.integers(4, 13))
        items = (rng.integers(ITEMS) + np.cumsum(rng.integers(1, 4, length))) % ITEMS
        times = (
            1_600_000_000 + int(rng.integers(40 * 24)) * HOUR + np.cumsum(rng.choice([60, 3 * HOUR, 50 * HOUR], length))
        )
        rows += [(f"u{user}", f"item-{item}", int(t)) for item, t in zip(items, times, strict=True)]
    events = pl.DataFrame(rows, schema=["u", "i", "t"], orient="row")
    if kinds:
        kind = rng.choice(["view", "buy", "search"], events.height, p=[0.5, 0.35, 0.15])
        search = pl.Series(kind) == "search"
        query = pl.Series(rng.choice(_THINGS, events.height))
        events = events.with_columns(
            k=pl.Series(kind),
            q=pl.select(pl.when(search).then(query)).to_series(),
            i=pl.when(search).then(None).otherwise(pl.col("i")),
        )
    number = np.arange(ITEMS)
    items = pl.DataFrame(
        {
            "id": [f"item-{n}" for n in number],
            "title": [f"{_STYLES[n % 7]} {_THINGS[n % 8]} {n}" for n in number],
            "group": [_GROUPS[n // 10] for n in number],
            "brand": [f"brand {n % 5}" for n in number],
            "price": [None if n % 11 == 3 else float(1 + n * 7 % 50) for n in number],
            "about": [
                "" if n % 3 else f"A {_STYLES[n % 7]} thing, number {n}, good for {_GROUPS[n % 6]}." for n in number
            ],
        }
    )
    users = pl.DataFrame({"id": [f"u{n}" for n in range(USERS)], "age": [20 + n % 40 for n in range(USERS)]})
    docs = pl.DataFrame(
        {"body": [f"{_THINGS[n % 8]} are sold in the {_GROUPS[n % 6]} shop on day {n}." for n in range(24)]}
    )
    return {"events": events, "items": items, "users": users, "docs": docs}


def tiny_card(tables: dict[str, pl.DataFrame] | None = None, **changes: Any) -> dict[str, Any]:
    """A card over `tiny_tables`; `changes` replace its sections."""
    tables = tables or tiny_tables()
    card: dict[str, Any] = {
        "name": "tiny",
        "events": {"path": tables["events"], "user": "u", "item": "i", "time": "t"},
        "items": {"path": tables["items"], "id": "id", "title": "title", "categories": "group", "attributes": ["brand"],
                  "numbers": ["price"], "text": ["about"]},
        "users": {"path": tables["users"], "id": "id", "attributes": ["age"]},
        "corpus": {"path": tables["docs"], "text": ["body"]},
        "split": "leave-one-out",
    }  # fmt: skip
    if "k" in tables["events"].columns:
        card["events"] |= {"kind": "k", "text": "q"}
        card["kinds"] = {"view": 0.3, "buy": 1.0, "search": 0}
    return card | changes


@cache
def _prepared(root: Path, name: str, levels: int, kinds: bool) -> Path:
    card = tiny_card(tiny_tables(kinds=kinds))
    return prepare(card, root / name, levels=levels, codebook=16, vocab_size=640).path


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


@pytest.fixture(scope="session")
def tiny_dataset(tiny_root: Path) -> Path:
    """Folder of the tiny dataset: one level, timed, one kind, leave-one-out. Never write into it."""
    return _prepared(tiny_root, "plain", 1, False)


@pytest.fixture(scope="session")
def tiny_levels(tiny_root: Path) -> Path:
    """The tiny dataset with three code levels of 16 and with kinds: views, buys and searches."""
    return _prepared(tiny_root, "levels", 3, True)


@pytest.fixture(scope="session")
def tiny(tiny_dataset: Path) -> Dataset:
    """`tiny_dataset`, opened."""
    return open_dataset(tiny_dataset)
