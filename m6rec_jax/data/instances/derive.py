"""Instances made from the dataset itself."""

from __future__ import annotations

import polars as pl

from m6rec_jax.data.card_types import CardTask
from m6rec_jax.data.instances.world import World
from m6rec_jax.data.template import Template

RECIPES: dict[str, object] = {}


def derived_rows(where: str, task: CardTask, template: Template, world: World) -> tuple[pl.DataFrame, tuple[str, ...]]:
    raise NotImplementedError
