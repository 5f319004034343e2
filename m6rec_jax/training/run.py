"""`train`: from a configuration and a dataset to a run folder, in one line of sections."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from m6rec_jax.artifacts.atomic import atomic_path, write_text
from m6rec_jax.artifacts.checkpoints import best_step, manifest, steps
from m6rec_jax.artifacts.manifest import file_digest
from m6rec_jax.artifacts.run import RUN_FILE, Run, TrainedOn, code_version, read_run, write_run
from m6rec_jax.config import Config, dump_config
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.data.loader import PlanRows, batches
from m6rec_jax.data.plan import Plan, make_pools, mixture_shares
from m6rec_jax.data.tasks import Facts
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.progress import note
from m6rec_jax.training.checkpoint import CheckpointWriter, Position, restore
from m6rec_jax.training.initial import from_run, on_host
from m6rec_jax.training.loop import Evaluator, Loop, train_loop
from m6rec_jax.training.optim import learning_rate, make_optimizer
from m6rec_jax.training.sharding import check_fit, make_mesh, place_items
from m6rec_jax.training.state import abstract_state, init_state
from m6rec_jax.training.step import make_eval_step, make_train_step
from m6rec_jax.training.validation import ValidationLoss, unigram_losses, validation_rows

COPIED = ("tokenizer.model", "items.parquet", "codes.npz", "transitions.npz")
ATTRIBUTE_SAMPLE, ATTRIBUTE_MOST = 1000, 32  # users looked at, and most tokens kept, for what is known of a user
MakeEvaluator = Callable[[Blueprint, Dataset], Evaluator]


def train(
    config: Config,
    datasets: Sequence[Path | str],
    run: Path | str,
    *,
    init_from: Path | str | None = None,
    make_evaluator: MakeEvaluator | None = None,
) -> Path:
    """Train a run to its end, or take it up where it stopped; returns its folder.

    `make_evaluator(blueprint, dataset)` gives the validation figures (among them ndcg@10, which picks the best
    checkpoint) from parameters on the host. Raises InputError before compiling when anything does not fit, Requeue
    after SIGTERM.
    """
    run = Path(run)
    if len(datasets) != 1:
        raise InputError(f"--dataset: {len(datasets)} given; one dataset a run is supported")
    dataset = open_dataset(datasets[0])

    # -- mesh ---------------------------------------------------------------------------------------------------
    mesh = make_mesh(config.mesh)
    check_fit(mesh, config)
    if config.data.rows % jax.process_count():
        raise InputError(f"data.rows={config.data.rows} does not divide over {jax.process_count()} processes")

    # -- data ---------------------------------------------------------------------------------------------------
    facts = facts_of(dataset)
    pools = make_pools(config.mixture, dataset.index, "train", config.data, facts)
    names = [pool.task.name for pool in pools]
    records = dataset.records("train")

    # -- model and optimiser ------------------------------------------------------------------------------------
    blueprint = Blueprint(config.model, dataset.vocab, dataset.content.shape[1])
    optimizer = make_optimizer(config.optim, config.train.steps)
    resumed = bool(steps(run))
    lock = _together(lambda: _claim(run, config, dataset))
    items = place_items(mesh, item_table(dataset.content, dataset.seen))

    # -- state: resumed, or from another run, or fresh ------------------------------------------------------------
    with jax.set_mesh(mesh):
        state = init_state(blueprint, optimizer, config.train.seed)
        position = Position()
        if resumed:
            state, position = restore(run, abstract_state(state)) or (state, position)
        elif init_from is not None:
            state = state._replace(params=from_run(Path(init_from), dataset, blueprint, state.params))

    rows, at = position.rows, (position.block, position.block_start)
    plan = Plan(pools, mixture_shares(config.mixture, pools), config.data, facts, config.train.seed, at)

    # -- validation ---------------------------------------------------------------------------------------------
    held_out = make_pools(config.mixture, dataset.index, "valid", config.data, facts)
    valid_rows = validation_rows(plan, held_out, dataset.records("valid"), config.train.seed)
    unigram = unigram_losses(plan, records, valid_rows)
    losses = ValidationLoss(make_eval_step(blueprint, len(pools)), valid_rows, names, config.data.rows, mesh, items)
    evaluator = make_evaluator(blueprint, dataset) if make_evaluator else None

    def validate(params: Any) -> dict[str, float]:
        with jax.set_mesh(mesh):
            figures = {f"loss/{name}": value for name, value in losses(params).items()}
        figures |= {f"unigram/{name}": value for name, value in unigram.items()}
        return figures | (evaluator(on_host(params)) if evaluator else {})

    # -- loop ---------------------------------------------------------------------------------------------------
    left = config.train.steps - int(state.step)
    source = PlanRows(plan, records, rows, left, config.data.rows, jax.process_index(), jax.process_count())
    loop = Loop(
        config=config,
        run=run,
        mesh=mesh,
        tasks=names,
        step=make_train_step(
            blueprint, optimizer, len(pools), config.train.seed, config.optim.label_smoothing, config.optim.negatives
        ),
        items=items,
        batches=batches(source, config.data.threads) if left > 0 else iter(()),
        cursor=plan.cursor,
        learning_rate=learning_rate(config.optim, config.train.steps),
        validate=validate,
        writer=CheckpointWriter(run, config.checkpoint),
    )
    train_loop(loop, state, rows)
    if jax.process_index() == 0:
        _write_card(run, dataset, blueprint)
    if lock is not None:
        lock.close()
    return run


def facts_of(dataset: Dataset) -> Facts:
    """What task builders must know of a dataset."""
    kind_weights = np.array(dataset.manifest.get("kind_weights") or [1.0], np.float32)
    known = dataset.users["attributes"] if "attributes" in dataset.users.columns else None
    if known is None or int(known.list.len().sum() or 0) == 0:
        return Facts(dataset.vocab, dataset.codes, dataset.timed, kind_weights)

    @lru_cache(maxsize=1 << 16)
    def attributes(user: int) -> np.ndarray:
        said = known[user]
        return np.array(dataset.tokenizer.encode(", ".join([] if said is None else said)), np.int32)

    longest = max(len(attributes(user)) for user in range(min(len(known), ATTRIBUTE_SAMPLE)))
    room = 1 + min(longest, ATTRIBUTE_MOST)
    return Facts(dataset.vocab, dataset.codes, dataset.timed, kind_weights, attributes, room)


def _together(claim: Callable[[], IO[str]]) -> IO[str] | None:
    """`claim` on the first process; when it refuses, all processes raise the same InputError."""
    lock, refusal = None, ""
    if jax.process_index() == 0:
        try:
            lock = claim()
        except InputError as error:
            refusal = str(error)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        said = np.frombuffer(refusal.encode()[:1024].ljust(1024), np.uint8)
        refusal = bytes(multihost_utils.broadcast_one_to_all(said)).decode(errors="ignore").strip()
    if refusal:
        raise InputError(refusal)
    return lock


def _claim(run: Path, config: Config, dataset: Dataset) -> IO[str]:
    """Make the run folder, or check that the one there was trained on this dataset with this model; returns its lock.

    Raises InputError naming what differs (only the length of training and how often it is looked at may change), or
    the process that trains this run already.
    """
    if (run / RUN_FILE).is_file():
        old = read_run(run)
        if old.tokenizer != file_digest(dataset.path / "tokenizer.model"):
            raise InputError(f"{run}: trained with another tokenizer than {dataset.path}'s; prepare with --like {run}")
        if old.datasets[0].digest != dataset.digest:
            raise InputError(
                f"{run}: trained on a dataset with digest {old.datasets[0].digest[:12]}, {dataset.path} has "
                f"{dataset.digest[:12]}; resume on the same dataset, or start a new --run with --init-from {run}"
            )
        for part in ("model", "optim", "data", "mixture"):
            was, now = getattr(old.config, part), getattr(config, part)
            for key in was.__dataclass_fields__:
                if getattr(was, key) != getattr(now, key) and (part, key) not in RESUMABLE:
                    raise InputError(
                        f"{run}: {part}.{key} was {getattr(was, key)!r} and is {getattr(now, key)!r} now; resume with "
                        f"the old value, or use a new --run with --init-from {run}"
                    )
        if old.config.train.seed != config.train.seed:
            raise InputError(f"{run}: train.seed was {old.config.train.seed}, now {config.train.seed}; use a new --run")
    elif run.is_dir() and any(run.iterdir()):
        raise InputError(f"{run}: not empty and not a run; name an empty or new folder with --run")
    run.mkdir(parents=True, exist_ok=True)
    lock = _lock(run)
    for name in COPIED:
        if not (run / name).is_file():
            with atomic_path(run / name) as path:
                shutil.copyfile(dataset.path / name, path)
    write_text(run / "config.yaml", dump_config(config))
    trained_on = TrainedOn.of(dataset.path, dataset.digest, dataset.manifest)
    tokenizer = file_digest(run / "tokenizer.model")
    write_run(Run(run, config, dataset.vocab, dataset.content.shape[1], (trained_on,), tokenizer, code_version()))
    return lock


def _lock(run: Path) -> IO[str]:
    """An open file whose lock ends with this process, however it ends: one trainer a run."""
    file = open(run / "lock", "a+", encoding="utf-8")  # noqa: SIM115  held while the run trains
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(f"{run}: {holder} is training it; wait for its end, stop it, or use another --run") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


RESUMABLE = {("data", "threads"), ("data", "rows")}


def _said_split(split: Any) -> str:
    """A split rule in words: its name, and the shares where the rule has any."""
    if not isinstance(split, dict):
        return str(split)
    shares = ", ".join(f"{name} {value:g}" for name, value in split.items() if name != "rule")
    return split["rule"] if split["rule"] == "leave-one-out" or not shares else f"{split['rule']} ({shares})"


def _write_card(run: Path, dataset: Dataset, blueprint: Blueprint) -> None:
    """`card.md`: what was trained on what, with which result."""
    step = best_step(run)
    figures = manifest(run, step)["metrics"]
    sizes, config = dataset.manifest["sizes"], read_run(run).config
    lines = [
        f"# {run.name}",
        "",
        f"A generative recommender of {blueprint.parameters():,} parameters ({config.model.layers} layers, width "
        f"{config.model.width}), trained by m6rec_jax {code_version()} on `{dataset.name}`: {sizes['users']:,} users, "
        f"{sizes['items']:,} items, {sizes['train_events']:,} training events; split {_said_split(dataset.manifest['split'])}.",
        "",
        f"Best checkpoint: step {step}. Its figures on the validation split:",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in sorted(figures.items())),
        "",
        "It recommends from behaviour; what users did not do, it does not know. Test figures: `m6rec evaluate`.",
    ]
    write_text(run / "card.md", "\n".join(lines) + "\n")
    note(
        f"{run}: best step {step}" + (f", validation ndcg@10 {figures['ndcg@10']:.4f}" if "ndcg@10" in figures else "")
    )
