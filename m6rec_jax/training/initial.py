"""Parameters to begin with: of another run, text weights as they are and items matched by id (DESIGN section 9), or of a
model of another program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

from m6rec_jax.artifacts.checkpoints import load_params
from m6rec_jax.artifacts.manifest import file_digest
from m6rec_jax.artifacts.run import RUN_FILE, Run, read_run
from m6rec_jax.data.arrays import read_arrays
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.progress import note
from m6rec_jax.training.foreign import from_folder
from m6rec_jax.vocab import OPTIONS


def start_from(path: Path, datasets: Sequence[Dataset], blueprint: Blueprint) -> Callable[[Any], Any]:
    """What gives fresh parameters those of `path`: of a run, or of a Llama's folder (`foreign`).

    Raises InputError, before anything is made or compiled, when `path` is neither, or does not fit.
    """
    if (path / RUN_FILE).is_file():
        give = _from_run(path, datasets, blueprint)
    elif not path.is_dir():
        raise InputError(f"--init-from {path}: no such folder; name a run, or a folder with config.json and model.safetensors")  # fmt: skip
    elif not (path / "config.json").is_file():
        raise InputError(f"--init-from {path}: no {RUN_FILE} and no config.json in it, so neither a run nor a model of another program; name such a folder")  # fmt: skip
    else:
        give = from_folder(path, datasets, blueprint)

    def begin(fresh: Any) -> Any:
        given = give(on_host(fresh["embeddings"]))
        params = {name: given[name] if name in given else on_host(part) for name, part in fresh.items()}
        return jax.tree.map(lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding), params, fresh)

    return begin


def _from_run(run: Path, datasets: Sequence[Dataset], blueprint: Blueprint) -> Callable[[Any], Any]:
    """What makes of fresh embeddings, all on the host, parameters with everything that a run can lend: layers, text
    table, and to each dataset (domain of `blueprint`) rows of items both know, code tables of the same codebooks, the
    projection of the same features.

    Raises InputError when the tokenizers or the layers differ.
    """
    lender = read_run(run)
    if lender.tokenizer != file_digest(datasets[0].path / "tokenizer.model"):
        raise InputError(f"--init-from {run}: another tokenizer than {datasets[0].path}'s; prepare the dataset with --like {run}")  # fmt: skip
    of_experts = ("expert_width", "shared_experts") if blueprint.config.experts else ("ffn_width",)
    for name in ("layers", "shared_layers", "width", "embed", "heads", "n_kv", "experts", *of_experts, "content"):
        old, new = getattr(lender.config.model, name), getattr(blueprint.config, name)
        if old != new:
            raise InputError(
                f"--init-from {run}: its model.{name} is {old}, this configuration's {new}; make them equal"
            )

    def give(fresh: dict[str, Any]) -> dict[str, Any]:
        old_blueprint = Blueprint(lender.config.model, lender.vocab, lender.content_width, lender.more_widths)
        step, old = load_params(run, "best", old_blueprint.shapes())
        old = jax.device_get(old)
        offers = [old_blueprint.domain_params(old, i)["embeddings"] for i in range(old_blueprint.vocab.domains)]
        params, said = {"embeddings": fresh}, []
        for number, dataset in enumerate(datasets):
            own = blueprint.domain_params(params, number)["embeddings"]
            embeddings, matched = _lent(lender, offers, dataset, own)
            params = blueprint.with_domain(params, number, {**old, "embeddings": embeddings})
            said.append(
                f"{matched:,} of {dataset.catalogue:,} items by id"
                + (f" in {dataset.name}" if len(datasets) > 1 else "")
            )
        if blueprint.vocab.options:
            theirs = old["embeddings"]["tables"].get(OPTIONS, ())
            params["embeddings"]["tables"][OPTIONS], tasks = _lent_options(lender, theirs, datasets, fresh)
            said.append(f"options of {tasks} of {len(blueprint.vocab.options)} tasks")
        if lender.config.model.vectors != blueprint.config.vectors:
            params.pop("vectors", None)
        note(f"--init-from {run}: step {step}; layers and text as they are, {', '.join(said)}")
        return params

    return give


def _lent(
    lender: Run, offers: Sequence[Mapping[str, Any]], dataset: Dataset, own: dict[str, Any]
) -> tuple[dict[str, Any], int]:
    """`own` embeddings of a dataset with what the domains of a run offer, and how many items were found by id.

    The domain of the dataset's name lends by id alone. Where none has it, all of them do, and title and id must agree:
    two shops may number their items alike.
    """
    named = [i for i, name in enumerate(lender.names) if name == dataset.name]
    ours = read_arrays(dataset.path / "codes.npz")
    made = {**own, "tables": {**own["tables"], "text": offers[0]["tables"]["text"]}}
    made |= {name: offers[0][name] for name in ("projection",) if name in own}
    found: set[int] = set()
    most = 0  # features of one encoder may be read in several ways: that of the largest catalogue is lent
    for number in named or range(len(offers)):
        offer, theirs = offers[number], read_arrays(lender.folder(number) / "codes.npz")
        if "content" in own and _same(ours, theirs, "encoder_") and len(theirs["codes"]) > most:
            made["content"], most = offer["content"], len(theirs["codes"])
        if dataset.levels > 1:
            if _same(ours, theirs, "codebook_"):
                made["tables"] = {**offer["tables"], "text": made["tables"]["text"]}
        elif len(lender.vocab.domain(number).levels) == 1:
            rows, old_rows = _shared_items(
                lender.folder(number), dataset, ["item_id"] if named else ["item_id", "title"]
            )
            some = ~np.isin(rows, list(found))
            table = np.array(made["tables"]["level1"])
            table[rows[some]] = offer["tables"]["level1"][old_rows[some]]
            made["tables"]["level1"] = table
            found.update(rows.tolist())
    return made, len(found)


def _lent_options(lender: Run, theirs: Any, datasets: Sequence[Dataset], fresh: Mapping[str, Any]) -> tuple[Any, int]:
    """The fresh option rows with those that the run has for a task of the same name and options in a dataset of the same
    name, and how many tasks that are."""
    known = _option_rows([(one.name, one.summary) for one in lender.datasets])
    table, found = np.array(fresh["tables"][OPTIONS]), 0
    for task, rows in _option_rows([(one.name, one.manifest) for one in datasets]).items():
        if task in known:
            table[rows] = theirs[known[task]]
            found += 1
    return table, found


def _option_rows(trained: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[tuple[str, ...], slice]:
    """Where the rows of each task with options lie, by its dataset's name, its own and its options."""
    rows, at = {}, 0
    for name, manifest in trained:
        for task in manifest.get("tasks", ()):
            if task["options"]:
                rows[(name, task["name"], *task["options"])] = slice(at, at + len(task["options"]))
                at += len(task["options"])
    return rows


def on_host(params: Any) -> Any:
    """Whole parameters as NumPy arrays on every process."""
    if jax.process_count() == 1:
        return jax.device_get(params)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(params, tiled=True)


def _same(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], part: str) -> bool:
    """Whether two datasets have the same arrays under names that begin with `part`."""
    names = [name for name in {**ours, **theirs} if name.startswith(part)]
    return all(n in ours and n in theirs and np.array_equal(ours[n], theirs[n]) for n in names)


def _shared_items(folder: Path, dataset: Dataset, agree: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Catalogue rows, here and in a domain's folder, of the items that agree in these columns."""
    theirs = pl.read_parquet(folder / "items.parquet", columns=agree).with_row_index("old")
    both = dataset.items.select(agree).with_row_index("new").join(theirs, on=agree)
    return both["new"].to_numpy(), both["old"].to_numpy()
