"""`train`: from a configuration and datasets to a run folder, in one line of sections."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from m6rec_jax.artifacts.atomic import atomic_path, write_text
from m6rec_jax.artifacts.checkpoints import best_step, manifest, steps
from m6rec_jax.artifacts.manifest import file_digest
from m6rec_jax.artifacts.run import (
    DOMAIN_FILES,
    RUN_FILE,
    Run,
    TrainedOn,
    code_version,
    read_run,
    write_run,
)
from m6rec_jax.config import Config, dump_config
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.domains import Domain, joint_pools, joint_records, joint_shares, joint_vocab, labels, open_domains
from m6rec_jax.data.loader import PlanRows, batches
from m6rec_jax.data.plan import Plan, Pool
from m6rec_jax.data.records import BadRecords
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.quantised_products import check_quantise
from m6rec_jax.objectives.contrast import Pairs, pairs_of
from m6rec_jax.progress import note
from m6rec_jax.training.beside import replacing_of
from m6rec_jax.training.checkpoint import CheckpointWriter, Position, restore
from m6rec_jax.training.distill import Teacher, teacher_of
from m6rec_jax.training.evaluators import JointEvaluator, MakeEvaluator, check_best
from m6rec_jax.training.fit import fitted
from m6rec_jax.training.goodput import Ledger, starts_of, table, totals
from m6rec_jax.training.guards import Rewind, past_holes
from m6rec_jax.training.initial import on_host, start_from
from m6rec_jax.training.loop import Loop, train_loop
from m6rec_jax.training.optim import learning_rate, make_optimizer
from m6rec_jax.training.room import check_room
from m6rec_jax.training.sharding import check_fit, make_mesh, place_items, row_part, row_shards
from m6rec_jax.training.state import abstract_state, init_state
from m6rec_jax.training.step import make_eval_step, make_train_step
from m6rec_jax.training.together import agree, started_with
from m6rec_jax.training.validation import ValidationLoss, unigram_losses, validation_rows

CLAIM = 1800.0  # seconds until the first process has copied what belongs to a run of the largest catalogues
APPEARS = 60.0  # seconds until a network file system shows what another machine has written


def train(
    config: Config,
    datasets: Sequence[Path | str],
    run: Path | str,
    *,
    weights: Sequence[float] = (),
    init_from: Path | str | None = None,
    distill_from: Path | str | None = None,
    make_evaluator: MakeEvaluator | None = None,
) -> Path:
    """Train a run on one dataset or on several (domains) to its end, or take it up; returns its folder.

    `weights`: one a dataset, its share of the target tokens relative to the others'; all 1 when left out.
    `init_from`: whose parameters a new run begins with (`initial.start_from`). `distill_from`: a run that teaches this one
    (`distill`), all along.
    `make_evaluator(blueprint, dataset, length)` gives the validation figures of a domain from that domain's parameters on
    the host; `length`: tokens of a row. `train.best` picks the best checkpoint by one of them (its mean over domains) or by a
    loss: where the evaluator has `names`, one that is not among them is refused here, else at the first validation.
    Raises InputError before compiling when anything does not fit, Requeue after SIGTERM.
    """
    run, ledger = Path(run), Ledger()
    domains = agree(lambda: open_domains(datasets, weights), lambda opened: started_with(config, opened))

    # -- mesh ---------------------------------------------------------------------------------------------------
    mesh = make_mesh(config.mesh)
    asked, config = config, fitted(config, domains, row_shards(mesh))
    if config != asked:
        note(
            f"fitted to the data: {config.data.rows} rows of {config.data.length} tokens, {config.train.steps:,} steps, "
            f"validated every {config.train.eval_every:,}"
        )
    check_fit(mesh, config)
    check_quantise(config.model.quantise)
    part, parts = row_part(mesh)

    # -- data ---------------------------------------------------------------------------------------------------
    pools = joint_pools(domains, config.mixture, "train", config.data)
    shares, names = joint_shares(domains, config.mixture, pools), labels(domains, pools)
    pairs = _pairs(config, pools)
    bad = BadRecords(config.data.bad_records)
    records = joint_records(domains, "train", bad)

    # -- model and optimiser ------------------------------------------------------------------------------------
    width, *more_widths = (domain.dataset.content.shape[1] for domain in domains)
    blueprint = Blueprint(config.model, joint_vocab(domains), width, tuple(more_widths))
    replacing = replacing_of(config, blueprint, [pool.task for pool in pools], mesh)
    # Said once for all: what follows is asked of all processes together, or of none.
    saved = agree(lambda: max(steps(run), default=0), lambda step: {f"the last step saved in {run}": str(step)})
    held_out = joint_pools(domains, config.mixture, "valid", config.data)
    evaluator = JointEvaluator(make_evaluator, blueprint, domains, config.data.length) if make_evaluator else None
    check_best(config.train.best, names, held_out, evaluator)
    optimizer = make_optimizer(config.optim, config.train.steps)
    lend = None  # asked before the run is made: with another configuration it would not be taken up
    if init_from is not None and not saved:
        lend = agree(lambda: start_from(Path(init_from), [domain.dataset for domain in domains], blueprint))
    source = None if distill_from is None else Path(distill_from)
    teacher = agree(lambda: teacher_of(run, source, [domain.dataset for domain in domains], blueprint, config, mesh))
    if saved < config.train.steps:
        beside = replacing.generator if replacing else None, teacher.lesson.blueprint if teacher else None
        check_room(blueprint, config, mesh, [domain.dataset.catalogue for domain in domains], *beside)
    lock = agree(
        lambda: _claim(run, config, domains, blueprint, teacher) if jax.process_index() == 0 else None, seconds=CLAIM
    )
    agree(lambda: _see(run))
    items = place_items(mesh, tuple(item_table(domain.dataset.content, domain.dataset.seen) for domain in domains))

    # -- state: resumed, or from another run, or fresh ------------------------------------------------------------
    with jax.set_mesh(mesh):
        state = init_state(blueprint, optimizer, config.train.seed, config.optim.average > 0, config.prune, replacing)
        position = Position()
        if saved:
            state, position = restore(run, abstract_state(state)) or (state, position)
        elif lend is not None:
            state = state.begun_with(lend(state.params))
    of_teacher = teacher.load(mesh) if teacher and saved < config.train.steps else None

    rows, at = position.rows, (position.block, position.block_start)
    plan = Plan(pools, shares, config.data, config.train.seed, at)

    # -- validation ---------------------------------------------------------------------------------------------
    def read() -> tuple[list[dict[str, np.ndarray]], dict[str, float]]:
        found = validation_rows(plan, held_out, joint_records(domains, "valid", bad), config.train.seed)
        return found, unigram_losses(plan, records, found, blueprint.vocab, names)

    valid_rows, unigram = agree(read, seconds=CLAIM)  # a disk may be damaged for one process alone
    eval_step = make_eval_step(blueprint, len(pools), _pairs(config, held_out))
    losses = ValidationLoss(eval_step, valid_rows, names, config.data.rows, mesh, items)

    def validate(params: Any) -> dict[str, float]:
        with jax.set_mesh(mesh):
            figures = {f"loss/{name}": value for name, value in losses(params).items()}
        figures |= {f"unigram/{name}": value for name, value in unigram.items()}
        return figures | (evaluator(on_host(params)) if evaluator else {})

    # -- loop ---------------------------------------------------------------------------------------------------
    def feed(position: Position, step: int, rewinds: list[Rewind]) -> Iterator[dict[str, np.ndarray]]:
        left, of = config.train.steps - step, (config.data.rows, part, parts)
        source = PlanRows(plan, records, position.rows, left, *of, partial(past_holes, rewinds=rewinds))
        return batches(source, config.data.threads) if left > 0 else iter(())

    loop = Loop(
        config=config,
        run=run,
        mesh=mesh,
        labels=names,
        step=_taught(
            of_teacher,
            make_train_step(
                blueprint,
                optimizer,
                len(pools),
                config.train.seed,
                config.optim.label_smoothing,
                config.optim.negatives,
                config.optim.average,
                config.train.explode,
                pairs,
                config.prune,
                teacher.lesson if teacher else None,
                replacing,
            ),
        ),
        items=items,
        batches=feed,
        bad=bad,
        cursor=plan.cursor,
        learning_rate=learning_rate(config.optim, config.train.steps),
        validate=validate,
        writer=CheckpointWriter(run, config.checkpoint),
        ledger=ledger,
    )
    train_loop(loop, state, rows)
    if jax.process_index() == 0:
        if starts_of(run):
            note(table(totals(run), starts_of(run)))
        _write_card(run, domains, blueprint)
    if lock is not None:
        lock.close()
    return run


def _pairs(config: Config, pools: Sequence[Pool]) -> Pairs | None:
    """What a step must know of retrieval; InputError where a task of it meets a model without vectors."""
    pairs = pairs_of(pools, config.data.length, config.data.mask_rate)
    if pairs is not None and not config.model.vectors:
        raise InputError(f"mixture.tasks.{pools[pairs.pools[0]].task.name}: a retrieval, and model.vectors=0 gives the model no vectors; set model.vectors=128, or take the task out")  # fmt: skip
    return pairs


def _taught(params: Any, step: Callable[..., Any]) -> Callable[..., Any]:
    """The step with the teacher's parameters, where there is one."""
    return step if params is None else lambda *of: step(*of, params)


def _claim(
    run: Path, config: Config, domains: Sequence[Domain], blueprint: Blueprint, teacher: Teacher | None
) -> IO[str]:
    """Make the run folder, or check that the one there was trained on these datasets with this model; returns its lock.

    Raises InputError naming what differs (only the length of training, how often it is looked at and `train.best` may change), or
    the process that trains this run already.
    """
    if (run / RUN_FILE).is_file():
        old = read_run(run)
        _check_datasets(old, domains)
        for part in ("model", "optim", "data", "mixture", "distill", "prune", "replaced"):
            was, now = getattr(old.config, part), getattr(config, part)
            for key in was.__dataclass_fields__:
                if getattr(was, key) != getattr(now, key) and (part, key) not in RESUMABLE:
                    raise InputError(
                        f"{run}: {part}.{key} was {getattr(was, key)!r} and is {getattr(now, key)!r} now; resume with "
                        f"the old value, or use a new --run with --init-from {run}"
                    )
        if old.config.train.seed != config.train.seed:
            raise InputError(f"{run}: train.seed was {old.config.train.seed}, now {config.train.seed}; use a new --run")
        if old.config.train.best != config.train.best:
            note(f"{run}: train.best was {old.config.train.best} and is {config.train.best} now: earlier validations count by it too, but of checkpoints only those still kept")  # fmt: skip
    elif run.is_dir() and any(run.iterdir()):
        raise InputError(f"{run}: not empty and not a run; name an empty or new folder with --run")
    run.mkdir(parents=True, exist_ok=True)
    lock = _lock(run)
    datasets = [domain.dataset for domain in domains]
    record = Run(
        run, config, blueprint.vocab, blueprint.content_width,
        tuple(TrainedOn.of(one.path, one.digest, one.manifest) for one in datasets),
        file_digest(datasets[0].path / "tokenizer.model"), code_version(),
        more_widths=blueprint.more_widths, weights=_weights(domains), teacher=teacher.taught if teacher else None,
    )  # fmt: skip
    for number, dataset in enumerate(datasets):
        folder = record.folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        for name in DOMAIN_FILES:
            if not (folder / name).is_file():
                with atomic_path(folder / name) as path:
                    shutil.copyfile(dataset.path / name, path)
    write_text(run / "config.yaml", dump_config(config))
    write_run(record)
    return lock


def _see(run: Path) -> None:
    """Return once the run that the first process has made is to be seen from here; InputError when it never is."""
    until = time.monotonic() + APPEARS
    while not (run / RUN_FILE).is_file():
        if time.monotonic() > until:
            raise InputError(f"{run}: process 0 has made it and it is not to be seen here; --run must lie in a folder that all machines share")  # fmt: skip
        time.sleep(0.2)


def _check_datasets(old: Run, domains: Sequence[Domain]) -> None:
    """Raise InputError, naming what differs, unless a run was trained on these datasets, in this order and weight."""
    run, names = old.path, [domain.name for domain in domains]
    way_out = f"resume on the same {'dataset' if len(domains) == len(old.datasets) == 1 else 'datasets'}, or start a new --run with --init-from {run}"
    first = domains[0].dataset
    if old.tokenizer != file_digest(first.path / "tokenizer.model"):
        raise InputError(f"{run}: trained with another tokenizer than {first.path}'s; prepare with --like {run}")
    if len(domains) != len(old.datasets) or (names != old.names and sorted(names) == sorted(old.names)):
        raise InputError(
            f"{run}: trained on {', '.join(old.names)} in this order, not on {', '.join(names)}; {way_out}"
        )
    for was, domain in zip(old.datasets, domains, strict=True):
        if was.digest != domain.dataset.digest:
            what = "a dataset" if len(domains) == 1 else f"a dataset {was.name}"
            raise InputError(f"{run}: trained on {what} with digest {was.digest[:12]}, {domain.dataset.path} has {domain.dataset.digest[:12]}; {way_out}")  # fmt: skip
    if old.weights != _weights(domains):
        said = ["=".join((name, f"{w:g}")) for name, w in zip(names, old.weights, strict=True)]
        raise InputError(f"{run}: the weights of its datasets were {', '.join(said)} and are other ones now; {way_out}")


def _weights(domains: Sequence[Domain]) -> tuple[float, ...]:
    """Their weights; a dataset alone has none."""
    return tuple(float(domain.weight) for domain in domains) if len(domains) > 1 else ()


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


RESUMABLE = {("data", "threads"), ("data", "bad_records"), ("data", "rows"), ("model", "attention"), ("model", "microbatches")}  # fmt: skip


def _said_split(split: Any) -> str:
    """A split rule in words: its name, and the shares where the rule has any."""
    if not isinstance(split, dict):
        return str(split)
    shares = ", ".join(f"{name} {value:g}" for name, value in split.items() if name != "rule")
    return split["rule"] if split["rule"] == "leave-one-out" or not shares else f"{split['rule']} ({shares})"


def _said_dataset(dataset: Dataset) -> str:
    sizes = dataset.manifest["sizes"]
    return (
        f"`{dataset.name}`: {sizes['users']:,} users, {sizes['items']:,} items, {sizes['train_events']:,} training "
        f"events; split {_said_split(dataset.manifest['split'])}"
    )


def _write_card(run: Path, domains: Sequence[Domain], blueprint: Blueprint) -> None:
    """`card.md`: what was trained on what, with which result."""
    step = best_step(run)
    figures = manifest(run, step)["metrics"]
    config = read_run(run).config
    chosen = config.train.best
    said = "; and on ".join(_said_dataset(domain.dataset) for domain in domains)
    lines = [
        f"# {run.name}",
        "",
        f"A generative recommender of {blueprint.parameters():,} parameters ({config.model.layers} layers, width "
        f"{config.model.width}), trained by m6rec_jax {code_version()} on {said}.",
        "",
        f"Best checkpoint by {chosen}: step {step}. Its figures on the validation split:",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in sorted(figures.items())),
        "",
        "It recommends from behaviour; what users did not do, it does not know. Test figures: `m6rec evaluate`.",
    ]
    write_text(run / "card.md", "\n".join(lines) + "\n")
    note(f"{run}: best step {step}" + (f", validation {chosen} {figures[chosen]:.4f}" if chosen in figures else ""))
