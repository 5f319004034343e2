"""A run opened for recommending: its engine, its gate, and whether a dataset speaks its ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from m6rec_jax.artifacts.checkpoints import load_params, steps
from m6rec_jax.artifacts.manifest import file_digest
from m6rec_jax.artifacts.run import Run
from m6rec_jax.data.arrays import read_arrays
from m6rec_jax.data.codes import Codebooks
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.progress import note
from m6rec_jax.recommend.baselines import ItemKNN, Popularity
from m6rec_jax.recommend.histories import interactions
from m6rec_jax.recommend.memory import GATE_FILE, Gate, load_gate


def open_engine(record: Run, step: int | str, data: Dataset | None, facts: Mapping[str, Any]) -> tuple[Engine | None, int]:  # fmt: skip
    """The decoding engine over a run's parameters, and their step; (None, -1) when nothing was saved yet."""
    if not steps(record.path):
        return None, -1
    # A catalogue that grew into spare rows has other sizes than the run's, over the same tables.
    blueprint = Blueprint(record.config.model, record.vocab if data is None else data.vocab, record.content_width)
    at, params = load_params(record.path, step, blueprint.shapes())
    if data is None:
        stored = read_arrays(record.path / "codes.npz", "codes", "content")
        codes, content = stored["codes"], stored["content"]
    else:
        codes, content = data.codes, data.content
    # Seen in this model's training: an item that came later has an untrained id part, however many events it has now.
    trained = pl.read_parquet(record.path / "items.parquet", columns=["seen"])["seen"].to_numpy()
    seen = np.zeros(len(codes), bool)
    seen[: len(trained)] = trained[: len(codes)]
    made = Engine(
        blueprint.bind(params), codes, content, seen,
        timed=bool(facts["timed"]), n_kinds=len(facts["kinds"]), length=record.config.data.length,
    )  # fmt: skip
    return made, at


def gate_of(record: Run, step: int) -> Gate | None:
    """The run's gate where there is one and it was fitted beside the parameters of this step."""
    path = record.path / GATE_FILE
    if not path.is_file():
        return None
    gate = load_gate(path)
    if gate.step == step:
        return gate
    note(f"{path}: fitted beside step {gate.step}, not used beside step {step}")
    return None


def check_fits(record: Run, data: Dataset) -> None:
    """Raise InputError unless the dataset speaks the run's ids: its tokenizer, features and code levels, and the same
    meaning of each code: its items in its rows (one level), its codebooks (several)."""
    way_out = f"prepare it with --like {record.path}"
    if data.vocab.text.size != record.vocab.text.size or file_digest(data.path / "tokenizer.model") != record.tokenizer:
        raise InputError(f"{data.path}: its tokenizer is not that of {record.path}; {way_out}")
    ours, theirs = record.vocab.levels, data.vocab.levels
    if [s.padded for s in theirs] != [s.padded for s in ours]:
        sizes = [s.size for s in theirs], [s.size for s in ours]
        raise InputError(f"{data.path}: code levels {sizes[0]} do not fit the run's {sizes[1]}; {way_out}")
    if data.content.shape[1] != record.content_width:
        raise InputError(f"{data.path}: item features of width {data.content.shape[1]}, the run was trained with {record.content_width}; {way_out}")  # fmt: skip
    if len(ours) == 1:
        known = pl.read_parquet(record.path / "items.parquet", columns=["item_id"])["item_id"]
        if not data.items["item_id"][: len(known)].equals(known):
            raise InputError(f"{data.path}: its catalogue does not begin with the {len(known):,} items of {record.path} in their order, so rows mean other items; {way_out}")  # fmt: skip
    elif _books(data.path) != _books(record.path):
        raise InputError(f"{data.path}: its codebooks are not those of {record.path}, so codes mean other things; {way_out}")  # fmt: skip


def _books(folder: Path) -> dict[str, bytes]:
    """The bytes of the codebooks in a dataset or a run."""
    return {name: array.tobytes() for name, array in Codebooks.from_arrays(read_arrays(folder / "codes.npz")).arrays().items()}  # fmt: skip


def open_item_knn(data: Dataset, items: pl.DataFrame) -> ItemKNN | None:
    """Item-kNN over the dataset's training events, where the library is installed."""
    try:
        return ItemKNN(interactions(data), Popularity.of(items))
    except InputError:
        return None
