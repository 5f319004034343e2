"""KuaiRec's captions of short videos, in Chinese (Gao et al. 2022): the category of a caption, a caption of a category."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.tasks.problem import Problem

LEAST = 30  # videos of a category that is asked for
NONE = "UNKNOWN"
SHORTEST = 8  # characters of a caption that is to be written


def read(folder: Path, task: str) -> Problem | None:
    """The problem `classify` (caption to category) or `caption` (category to caption); None without the file."""
    path = folder / "kuairec" / "captions.csv"
    if not path.is_file():
        return None
    raw = pl.read_csv(path, infer_schema=False).with_columns(pl.all().fill_null(""))
    drawn = np.random.default_rng(0).random(raw.height)
    frame = raw.select(
        split=pl.Series(np.where(drawn < 0.8, "train", np.where(drawn < 0.9, "valid", "test"))),
        user_id=pl.col("video_id"),
        item_id=pl.col("video_id"),
        caption=pl.col("caption").str.strip_chars().str.slice(0, 200),
        cover=pl.col("manual_cover_text").replace(NONE, "").str.slice(0, 60),
        kind=pl.col("first_level_category_name").replace(NONE, ""),
        finer=pl.col("second_level_category_name").replace(NONE, ""),
        tags=pl.col("topic_tag").str.strip_chars("[]"),
    )
    frame = frame.filter(pl.col("kind") != "", (pl.col("caption") != "") | (pl.col("cover") != ""))
    frame = frame.filter(pl.len().over("kind") >= LEAST)
    kinds = tuple(sorted(frame["kind"].unique()))
    if task == "classify":
        label = frame["kind"].replace_strict(list(kinds), range(len(kinds)), return_dtype=pl.Int32)
        own = frame.drop("kind", "finer", "tags").with_columns(label=label)
        made = Problem("kuairec", "classify", "macro_f1", "kind", own, lambda: card(made, frame, "kind"), options=kinds)
        return made
    own = frame.filter(pl.col("caption").str.len_chars() >= SHORTEST).drop("tags").rename({"caption": "answer"})
    made = Problem("kuairec", "caption", "rouge_2", "caption", own, lambda: card(made, frame, "caption"))
    return made


def card(problem: Problem, frame: pl.DataFrame, name: str) -> dict[str, Any]:
    """The data card: a tag and the training videos under it are a user and what they chose; captions; this task."""
    train = frame.filter(pl.col("split") == "train")
    tags = [(tag.strip(), video) for video, told in train.select("item_id", "tags").iter_rows() for tag in re.split("[,，]", told) if tag.strip()]  # fmt: skip
    events = pl.DataFrame(tags, schema=["user", "item"], orient="row").with_row_index("order")
    texts = [" ".join(filter(None, row)) for row in train.select("caption", "cover").iter_rows()]
    return {
        "name": f"kuairec-{name}",
        "events": {"path": events, "user": "user", "item": "item", "time": "order", "time_unit": "order"},
        "items": {"path": train.select("item_id", "caption", "cover"), "id": "item_id", "title": "cover", "text": "caption"},
        "corpus": {"path": pl.DataFrame({"text": texts}), "text": "text"},
        "split": "leave-one-out",
        "tasks": {name: problem.task_card()},
    }  # fmt: skip
