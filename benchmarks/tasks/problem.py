"""What every system of the benchmark is given: rows with named fields, the template that tells them, a data card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from m6rec_jax.data.rendering import render, said
from m6rec_jax.data.template import Template, load_template

TEMPLATES = Path(__file__).parent / "templates"
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Problem:
    """One task on one dataset.

    `frame`: a row an instance: split, user_id, item_id, `label` (scoring, classify) or `answer` (text), the fields of
    the template, and the counts named in `numbers`. `metric`: what is compared. `card`: the data card, made when asked
    for: the dataset's own tables and this task. `catalogue`: of a retrieval, item_id, title and text of every item.
    `past`: of scoring, more rows like those of training: some of what a training user did, asked of other things they did.
    """

    dataset: str
    task: str
    metric: str
    template: str
    frame: pl.DataFrame
    card: Callable[[], dict[str, Any]]
    numbers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    catalogue: pl.DataFrame | None = None
    past: pl.DataFrame | None = None

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.task}"

    @property
    def wording(self) -> Template:
        return load_template(TEMPLATES / f"{self.template}.yaml")

    def part(self, split: str) -> pl.DataFrame:
        """The rows of a split, in their order."""
        return self.frame.filter(pl.col("split") == split)

    def learnt(self, past: bool) -> pl.DataFrame:
        """The rows of training, and where `past` those of training users' own pasts behind them."""
        train = self.part("train")
        return pl.concat([train, self.past], how="diagonal_relaxed") if past and self.past is not None else train

    def texts(self, split: str) -> list[str]:
        """Each instance as the text that the model reads, without its answer."""
        return self.told(self.part(split))

    def told(self, rows: pl.DataFrame) -> list[str]:
        """`texts` of any rows."""
        made = (render(self.wording, row) for row in rows.iter_rows(named=True))
        return [" ".join(said(parts) for parts in (*(s.parts for s in one.segments), one.opening)) for one in made]

    def task_card(self) -> dict[str, Any]:
        """The `tasks:` entry of this task over its own table."""
        return self._card_of(self.frame) | {"split": "split"}

    def past_card(self) -> dict[str, Any]:
        """The `tasks:` entry of `past`; whole users are held out of it."""
        assert self.past is not None
        return self._card_of(self.past.drop("split")) | {"valid": 0.05, "test": 0.05}

    def brief_card(self) -> dict[str, Any]:
        """The `tasks:` entry of this task and `past` without the events of the histories: counts in words, and what is
        asked for."""
        rows = pl.concat([self.learnt(True), self.frame.filter(pl.col("split") != "train")], how="diagonal_relaxed")
        return self._card_of(rows.drop("history")) | {"split": "split"}

    def counts_card(self) -> dict[str, Any]:
        """The `tasks:` entry of the rows of training and `past` with nothing but counts: no user is known by the titles."""
        assert self.past is not None
        return self._card_of(self.learnt(True).drop("split", "history", "item")) | {"valid": 0.05, "test": 0.05}

    def _card_of(self, frame: pl.DataFrame) -> dict[str, Any]:
        plain = frame.drop(*self.numbers)
        target = "label" if "label" in plain.columns else "answer"
        options = {"options": list(self.options)} if self.options else {}
        return (
            {
                "path": plain,
                "template": str(TEMPLATES / f"{self.template}.yaml"),
                "target": target,
                "group": "user_id",
            }
            | ({"item": "item_id"} if "item_id" in plain.columns else {})
            | options
        )
