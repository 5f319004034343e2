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

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.task}"

    @property
    def wording(self) -> Template:
        return load_template(TEMPLATES / f"{self.template}.yaml")

    def part(self, split: str) -> pl.DataFrame:
        """The rows of a split, in their order."""
        return self.frame.filter(pl.col("split") == split)

    def texts(self, split: str) -> list[str]:
        """Each instance as the text that the model reads, without its answer."""
        made = (render(self.wording, row) for row in self.part(split).iter_rows(named=True))
        return [" ".join(said(parts) for parts in (*(s.parts for s in one.segments), one.opening)) for one in made]

    def task_card(self) -> dict[str, Any]:
        """The `tasks:` entry of this task over its own table."""
        plain = self.frame.drop(*self.numbers)
        target = "label" if "label" in plain.columns else "answer"
        options = {"options": list(self.options)} if self.options else {}
        return {
            "path": plain,
            "template": str(TEMPLATES / f"{self.template}.yaml"),
            "target": target,
            "split": "split",
            "group": "user_id",
            "item": "item_id",
        } | options
