"""A run opened for recommending: its engine, its gate, and whether a dataset speaks its ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

from m6rec_jax.artifacts.checkpoints import load_params, steps
from m6rec_jax.artifacts.manifest import file_digest
from m6rec_jax.artifacts.run import Run, read_run
from m6rec_jax.data.arrays import read_arrays
from m6rec_jax.data.codes import Codebooks
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.data.neighbours import Neighbours
from m6rec_jax.data.tokenizer import Tokenizer
from m6rec_jax.data.transitions import load_transitions
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.progress import note
from m6rec_jax.recommend.baselines import ItemKNN, Popularity
from m6rec_jax.recommend.gate import GATE_FILE, Gate, load_gate
from m6rec_jax.recommend.histories import interactions
from m6rec_jax.recommend.memory import Memory


def dataset_of(run: Path | str, dataset: Dataset | Path | str | None = None) -> Dataset:
    """The dataset named (by its folder, or by the name of one that the run was trained on), else the one the run was
    trained on, the first of several, from where it lay then."""
    if isinstance(dataset, Dataset):
        return dataset
    record = read_run(run)
    if dataset is None:
        tell_first(record)
    elif Path(dataset).exists() or str(dataset) not in record.names:
        return open_dataset(dataset)
    trained = record.datasets[0 if dataset is None else record.names.index(str(dataset))]
    if not Path(trained.path).is_dir():
        raise InputError(f"{trained.path}: the dataset of {run} is no longer there; name it with --dataset")
    return open_dataset(trained.path)


def tell_first(record: Run) -> None:
    """Say that of several domains the first is taken."""
    if len(record.names) > 1:
        first, *others = record.names
        note(
            f"{record.path}: trained on {', '.join(record.names)}; this is {first}, --dataset names {' or '.join(others)}"
        )


def domain_of(record: Run, data: Dataset) -> int:
    """Which domain of a run a dataset belongs to: that of its digest, else of its name, else whose items it has most of.

    Raises InputError when the run has several and none of them is it.
    """
    known = record.datasets
    for same in (lambda one: one.digest == data.digest, lambda one: one.name == data.name):
        if (found := next((i for i, one in enumerate(known) if same(one)), None)) is not None:
            return found
    shared = [int(data.items["item_id"].is_in(_item_ids(record.folder(i)).implode()).sum()) for i in range(len(known))]
    if len(known) > 1 and not max(shared):
        raise InputError(f"{data.path}: {record.path} was trained on {', '.join(record.names)}, and this is none of them: neither its name nor an item of it is known; prepare it with --like {record.path}")  # fmt: skip
    return int(np.argmax(shared))


def _item_ids(folder: Path) -> pl.Series:
    return pl.read_parquet(folder / "items.parquet", columns=["item_id"])["item_id"]


def open_engine(record: Run, step: int | str, data: Dataset | None, facts: Mapping[str, Any], domain: int = 0,
                weights: str = "full") -> tuple[Engine | None, int]:  # fmt: skip
    """The decoding engine over a run's parameters for one of its domains, and their step; (None, -1) when nothing was
    saved yet."""
    if not steps(record.path):
        return None, -1
    # Whatever devices it was trained on, these attend with what they have.
    whole = Blueprint(
        replace(record.config.model, attention="auto"), record.vocab, record.content_width, record.more_widths
    )
    at, params = load_params(record.path, step, whole.shapes())
    blueprint, params = whole.domain(domain), whole.domain_params(params, domain)
    if data is not None:  # a catalogue that grew into spare rows has other sizes than the run's, over the same tables
        blueprint = replace(blueprint, vocab=data.vocab.domain(0))
    if data is None:
        stored = read_arrays(record.folder(domain) / "codes.npz", "codes", "content")
        codes, content = stored["codes"], stored["content"]
    else:
        codes, content = data.codes, data.content
    # Seen in this model's training: an item that came later has an untrained id part, however many events it has now.
    trained = pl.read_parquet(record.folder(domain) / "items.parquet", columns=["seen"])["seen"].to_numpy()
    seen = np.zeros(len(codes), bool)
    seen[: len(trained)] = trained[: len(codes)]
    made = Engine(
        blueprint.bind(params), codes, content, seen,
        timed=bool(facts["timed"]), n_kinds=len(facts["kinds"]), length=record.config.data.length,
        tokenizer=Tokenizer.load(record.folder(domain) / "tokenizer.model"),
        devices=jax.local_devices(),
        weights=weights,
    )  # fmt: skip
    return made, at


def own_memory(folder: Path) -> Memory:
    """The memory over the counts and neighbours that a run carries with itself."""
    arrays = read_arrays(folder / "codes.npz")
    alike = Neighbours.from_arrays(arrays) if "neighbours" in arrays else None
    return Memory(load_transitions(folder / "transitions.npz"), neighbours=alike)


def gate_of(record: Run, step: int, domain: int = 0) -> Gate | None:
    """The run's gate for a domain where there is one and it was fitted beside the parameters of this step."""
    path = record.folder(domain) / GATE_FILE
    if not path.is_file():
        return None
    gate = load_gate(path)
    if gate is None:
        note(f"{path}: of an earlier version, fitted again by the next evaluate")
        return None
    if gate.step == step:
        return gate
    note(f"{path}: fitted beside step {gate.step}, not used beside step {step}")
    return None


def check_fits(record: Run, data: Dataset, domain: int = 0) -> None:
    """Raise InputError unless the dataset speaks the ids of a run's domain: its tokenizer, features and code levels, and
    the same meaning of each code: its items in its rows (one level), its codebooks (several)."""
    way_out = f"prepare it with --like {record.folder(domain)}"
    if data.vocab.text.size != record.vocab.text.size or file_digest(data.path / "tokenizer.model") != record.tokenizer:
        raise InputError(f"{data.path}: its tokenizer is not that of {record.path}; {way_out}")
    ours, theirs, folder = record.vocab.domain(domain).levels, data.vocab.levels, record.folder(domain)
    width = (record.content_width, *record.more_widths)[domain]
    if [s.padded for s in theirs] != [s.padded for s in ours]:
        sizes = [s.size for s in theirs], [s.size for s in ours]
        raise InputError(f"{data.path}: code levels {sizes[0]} do not fit the run's {sizes[1]}; {way_out}")
    if data.content.shape[1] != width:
        raise InputError(f"{data.path}: item features of width {data.content.shape[1]}, the run was trained with {width}; {way_out}")  # fmt: skip
    if len(ours) == 1:
        known = _item_ids(folder)
        if not data.items["item_id"][: len(known)].equals(known):
            raise InputError(f"{data.path}: its catalogue does not begin with the {len(known):,} items of {record.path} in their order, so rows mean other items; {way_out}")  # fmt: skip
    elif _books(data.path) != _books(folder):
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
