"""A run opened as a frozen backbone, and tuned tasks served over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from m6rec_jax.artifacts.checkpoints import load_params
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.artifacts.tuned import read_tuned
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.decoding.tuned import TunedServer
from m6rec_jax.model.depth import Backbone
from m6rec_jax.model.items import item_table, widened
from m6rec_jax.model.load import Blueprint
from m6rec_jax.recommend.opening import check_fits, dataset_of, domain_of
from m6rec_jax.vocab import OPTIONS


def open_backbone(run: Path | str, data: Dataset, step: int | str = "best") -> Backbone:
    """The parameters of a step, of the domain that the dataset belongs to, beside the dataset's catalogue.

    Raises InputError when the run has no checkpoint, or the dataset does not speak its ids.
    """
    record = read_run(run)
    domain = domain_of(record, data)
    check_fits(record, data, domain)
    # Whatever devices it was trained on, these attend with what they have.
    config = replace(record.config.model, attention="auto")
    blueprint = Blueprint(config, record.vocab, record.content_width, record.more_widths)
    at, params = load_params(run, step, blueprint.shapes())
    if record.vocab.domains > 1:
        params, blueprint = blueprint.domain_params(params, domain), blueprint.domain(domain)
    # Seen in the run's training: an item that came later has an untrained id part.
    trained = pl.read_parquet(record.folder(domain) / "items.parquet", columns=["seen"])["seen"].to_numpy()
    seen = np.zeros(data.catalogue, bool)
    seen[: len(trained)] = trained[: data.catalogue]
    return Backbone(blueprint, params, item_table(data.content, seen), {"run": str(run), "step": at})


def learnt_rows(backbone: Backbone, run: Path | str, data: Dataset, option_task: int) -> np.ndarray | None:
    """The classifier rows `[C, D]` that a run has learnt in pretraining for a task of the dataset it was trained on (by
    its number among tasks with options); None when it has none."""
    vocab, trained = backbone.blueprint.vocab, read_run(run).datasets
    if option_task < 0 or not vocab.options or [one.digest for one in trained] != [data.digest]:
        return None
    first = sum(vocab.options[:option_task])
    embeddings = backbone.params["embeddings"]
    return np.asarray(widened(embeddings, embeddings["tables"][OPTIONS][first : first + vocab.options[option_task]]))


def open_tuned(
    run: Path | str, folders: Sequence[Path | str], dataset: Dataset | Path | str | None = None, *,
    step: int | str = "best",
) -> TunedServer:  # fmt: skip
    """A server of tuned tasks (folders that `m6rec tune` wrote) over a run's parameters.

    Raises InputError when one was tuned on other parameters, or for other options than the dataset's task has.
    """
    data = dataset_of(run, dataset)
    server = TunedServer(open_backbone(run, data, step))
    known = {entry["name"]: entry["options"] for entry in data.tasks}
    artefacts = [read_tuned(folder) for folder in folders]
    for artefact in artefacts:
        if artefact.name in known:
            artefact.check_options(known[artefact.name])
    server.add(*artefacts)
    return server
