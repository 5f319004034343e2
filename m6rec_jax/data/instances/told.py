"""A task's instances while a dataset is prepared: a table of fields, the same as text, its entry in the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from m6rec_jax.data.card import Card
from m6rec_jax.data.instances.layout import encode_instances, whole_length
from m6rec_jax.data.instances.read import FOLDER
from m6rec_jax.data.records import INSTANCE, encode
from m6rec_jax.data.rendering import Rendered, render_all, said
from m6rec_jax.data.splits import SPLITS
from m6rec_jax.data.template import Template
from m6rec_jax.data.text import clean_column
from m6rec_jax.data.tokenizer import Tokenizer
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.vocab import Vocab

COLUMNS = ("user_id", "item_id", "split", "label")  # of every table, before its fields
GROUP_ROWS = 10_000


@dataclass(frozen=True)
class Told:
    """The n instances of one task: `frame` (instance, COLUMNS, answer, fields), `rendered` [n], `counts` of what was
    cleaned, cut or dropped."""

    name: str
    template: Template
    options: tuple[str, ...]
    frame: pl.DataFrame
    rendered: list[Rendered]
    counts: dict[str, int]
    table: bool

    def texts(self, split: str) -> Iterator[str]:
        """Every text of a split's instances, for the tokenizer to learn from."""
        for one, where in zip(self.rendered, self.frame["split"].to_list(), strict=True):
            if where == split:
                for parts in (*(segment.parts for segment in one.segments), one.opening, one.answer):
                    yield from (part for part in parts if isinstance(part, str))

    @property
    def sizes(self) -> dict[str, int]:
        """Instances of each split."""
        counted = dict(self.frame["split"].value_counts().iter_rows())
        return {split: int(counted.get(split, 0)) for split in SPLITS}

    def entry(self, answer_tokens: float) -> dict[str, Any]:
        """What the manifest says of the task."""
        return {
            "name": self.name,
            "template": Path(self.template.origin).stem if self.template.origin.endswith((".yaml", ".yml")) else self.name,
            "language": self.template.language,
            "objective": self.template.objective,
            "metric": self.template.metric,
            "options": list(self.options),
            "sizes": self.sizes,
            "answer_tokens": round(answer_tokens, 3),
            "counts": {rule: n for rule, n in self.counts.items() if n},
            "table": self.table,
            "text": self.template.body,
        }  # fmt: skip


def tell(card: Card, name: str, template: Template, options: Sequence[str], frame: pl.DataFrame,
         counts: dict[str, int], table: bool) -> Told:  # fmt: skip
    """Clean the fields of a table, fill the template in, drop what has no answer, and check what is left.

    Raises InputError when nothing is left to train on, or when a class is seen in one split only.
    """
    where = f"{card.origin}: tasks.{name}"
    if table:  # what the other tables hold is clean already
        frame = frame.with_columns(_cleaned(frame[c], card, counts) for c in frame.columns if c not in COLUMNS)
    rendered = list(render_all(template, frame.iter_rows(named=True)))
    if template.with_options:
        right = (frame["label"] >= 0).to_numpy()
    else:
        right = np.array([any(not isinstance(p, str) or p.strip() for p in one.answer) for one in rendered], bool)
    if (without := int((~right).sum())) > 0:
        counts["without_answer"] = counts.get("without_answer", 0) + without
        frame, rendered = frame.filter(right), [one for one, kept in zip(rendered, right, strict=True) if kept]
    if "train" not in frame["split"]:
        lost = f" ({without} rows have no {'label' if template.with_options else 'answer'})" if without else ""
        raise InputError(f"{where}: no instance to train on{lost}; look at its target and how it is split, or remove the task")  # fmt: skip
    options = tuple(options)
    if template.with_options:
        _check_classes(where, frame, options)
        answers = [options[label] for label in frame["label"].to_list()]
    else:
        answers = [said(one.answer) for one in rendered]
    numbered = frame.select(
        pl.int_range(pl.len(), dtype=pl.Int64).alias("instance"),
        *COLUMNS,
        pl.Series("answer", answers, dtype=pl.String),
        *(field for field in frame.columns if field not in COLUMNS),
    )
    made = Told(name, template, options, numbered, rendered, counts, table)
    met = "".join(f", {rule} {n:,}" for rule, n in counts.items() if n)
    note(f"task {name}: {', '.join(f'{n:,} {split}' for split, n in made.sizes.items())}{met}")
    return made


def _check_classes(where: str, frame: pl.DataFrame, options: Sequence[str]) -> None:
    """A class that training never sees cannot be learnt, and one that nothing held out has is never measured."""
    there = frame.group_by("label").agg(pl.col("split").unique()).sort("label")
    held = frame["split"].n_unique() > 1
    for label, splits in there.iter_rows():
        if held and len(splits) == 1:
            rows = int((frame["label"] == label).sum())
            raise InputError(f"{where}: class {options[label]!r}: its {rows} {'row is' if rows == 1 else 'rows are'} all in {splits[0]}; merge it with another class, take it out, or split otherwise")  # fmt: skip
    if there.height < len(options):
        missing = next(option for label, option in enumerate(options) if label not in there["label"])
        raise InputError(f"{where}.options: {len(options)} options, {there.height} classes in the data: no row is {missing!r}; write the options that there are")  # fmt: skip


def _cleaned(series: pl.Series, card: Card, counts: dict[str, int]) -> pl.Series:
    """Texts of a field without control characters, tags and the like, and cut at `clean.max_text`; numbers as they are."""
    if series.dtype == pl.String:
        return clean_column(series, card.clean.max_text, counts)
    if isinstance(series.dtype, pl.List) and isinstance(series.dtype.inner, pl.Struct):
        if not series.list.len().sum():
            return series
        flat = series.to_frame("x").with_row_index("at").explode("x").drop_nulls("x")
        parts = flat["x"].struct.unnest()
        parts = parts.with_columns(
            clean_column(parts[c], card.clean.max_title, counts) for c, t in parts.schema.items() if t == pl.String
        )
        lists = pl.DataFrame({"at": flat["at"], "x": parts.to_struct("x")}).group_by("at", maintain_order=True).agg("x")
        rows = pl.DataFrame({"at": pl.int_range(len(series), dtype=pl.UInt32, eager=True)})
        joined = rows.join(lists.with_columns(pl.col("at").cast(pl.UInt32)), on="at", how="left", maintain_order="left")
        return joined["x"].fill_null([]).alias(series.name)
    return series


@dataclass(frozen=True)
class Encoded:
    """Instances of all tasks by split: their records' bytes, tasks and lengths laid out whole; the manifest's entries."""

    records: dict[str, list[bytes]]
    tasks: dict[str, list[int]]
    lengths: dict[str, list[int]]
    entries: list[dict[str, Any]]


def encode_told(told: Sequence[Told], tokenizer: Tokenizer, vocab: Vocab, codes: np.ndarray) -> Encoded:
    """Tokens of every instance; `vocab` and `codes` [C, L] spell items."""
    made = Encoded(*({split: [] for split in SPLITS} for _ in range(3)), entries=[])
    for number, one in enumerate(told):
        records = encode_instances(one.rendered, tokenizer, vocab, codes, number, one.frame["label"].to_list())
        objective, answers = one.template.objective, []
        for record, split in zip(records, one.frame["split"].to_list(), strict=True):
            made.records[split].append(encode(record))
            made.tasks[split].append(number)
            made.lengths[split].append(whole_length(record, objective))
            if split == "train":
                answers.append(1 if one.options else len(record.answer) + 1)
        made.entries.append(one.entry(float(np.mean(answers))))
    return made


def add_instances(index: dict[str, np.ndarray], sizes: dict[str, int], split: str, instances: Encoded) -> None:
    """What index.npz and the manifest say of the instances of a split, which lie behind its other records."""
    before = len(index[f"{split}_kind"])
    tasks = instances.tasks[split]
    more = {"kind": INSTANCE, "tokens": instances.lengths[split], "events": 0}
    for name, value in more.items():
        old = index[f"{split}_{name}"]
        index[f"{split}_{name}"] = np.concatenate([old, np.broadcast_to(value, len(tasks)).astype(old.dtype)])
    index[f"{split}_task"] = np.array([-1] * before + tasks, np.int32)
    sizes[f"{split}_records"] += len(tasks)
    sizes[f"{split}_instances"] = len(tasks)


def write_told(told: Sequence[Told], folder: Path) -> None:
    """`instances/<task>.parquet` of every task."""
    if told:
        (folder / FOLDER).mkdir()
    for one in told:
        one.frame.write_parquet(folder / FOLDER / f"{one.name}.parquet", row_group_size=GROUP_ROWS)
