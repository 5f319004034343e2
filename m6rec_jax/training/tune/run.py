"""`tune`: from a backbone and the instances of a task to an artefact, in one line of sections."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
import yaml

from m6rec_jax.artifacts.atomic import remove, write_text
from m6rec_jax.artifacts.best import better
from m6rec_jax.artifacts.manifest import MANIFEST
from m6rec_jax.artifacts.run import code_version
from m6rec_jax.artifacts.schemas import TUNED
from m6rec_jax.artifacts.tuned import TENSORS, Artefact, backbone_digests, read_tuned, write_tuned
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.instances import Instances
from m6rec_jax.errors import InputError
from m6rec_jax.model import depth, tuning
from m6rec_jax.model.depth import Backbone
from m6rec_jax.model.tuning import Tuned, TuneSpec
from m6rec_jax.progress import note, stage
from m6rec_jax.signals import Signals
from m6rec_jax.training.metrics import MetricsLog
from m6rec_jax.training.tune.rows import TuneRows, epoch, in_order, width_for, widths_of
from m6rec_jax.training.tune.saved import FILE, Best, restore, save
from m6rec_jax.training.tune.settings import TuneSettings, learning_rate, optimizer
from m6rec_jax.training.tune.step import TuneState, make_step, scores

LOG_EVERY = 20
# (labels [n], log-probabilities of the options [n, C]) -> figures by name.
Measure = Callable[[np.ndarray, np.ndarray], dict[str, float]]
CHOOSES = ("auc", "accuracy")  # the first of these figures that there is picks the best; of a text task the loss


@dataclass(frozen=True)
class TuneTask:
    """A task by `name`, its `options` by name (none: it writes text), and its instances; `about`: more that is kept of it.

    `rows`: of classifier rows `[C, D]` that the backbone has learnt for these options already; None: none.
    """

    name: str
    options: tuple[str, ...]
    train: TuneRows
    valid: TuneRows
    about: dict[str, Any]
    rows: np.ndarray | None = None

    @classmethod
    def of(cls, data: Dataset, train: Instances, valid: Instances, room: int, rows: np.ndarray | None, **more: Any) -> TuneTask:  # fmt: skip
        """A task of a dataset's own, its instances each in at most `room` tokens; `more` is kept of it too.

        Raises InputError for a retrieval.
        """
        about = {key: train.about[key] for key in ("template", "language", "objective", "metric")}
        about |= {"dataset": data.name, "digest": data.digest, "length": room} | more
        made = TuneRows.of(train, room), TuneRows.of(valid, room)
        return cls(train.about["name"], tuple(train.about["options"]), *made, about, rows)


def tune(
    backbone: Backbone,
    task: TuneTask,
    spec: TuneSpec,
    settings: TuneSettings,
    out: Path | str,
    measure: Measure,
) -> Artefact:
    """Train what `spec` names, to the end or until validation stops improving, and write the artefact of the best step.

    The same call goes on where an earlier one stopped, and ends as if it had not. Raises InputError before anything is
    compiled when something does not fit or `out` holds another tuning, Requeue after SIGTERM and KeyboardInterrupt after
    Ctrl-C, once all is saved.
    """
    folder = Path(out)
    if len(task.options) != spec.options:
        raise InputError(f"task {task.name}: {len(task.options)} options, and {spec.options} are to be tuned; make them equal")  # fmt: skip
    task.train.check(spec.options, "train")
    task.valid.check(spec.options, "valid")
    held = backbone_digests(backbone.params)
    said = _described(backbone, task, spec, settings, held)
    if _claim(folder, said):
        note(f"{folder}: tuned already; nothing is left to do")
        return read_tuned(folder)

    # -- what is trained ----------------------------------------------------------------------------------------
    blueprint, instances = backbone.blueprint, len(task.train)
    steps, every = settings.steps(instances), settings.validated_every(instances)
    fresh = depth.begin(spec, blueprint, backbone.params, settings.seed, _rows(task))
    state = TuneState(fresh, jax.jit(optimizer(settings.rule).init)(fresh), jnp.int32(0))
    found = restore(folder, state)
    count, of = depth.trained(spec, blueprint), blueprint.parameters()
    note(f"{folder}: {spec.method}, {count:,} numbers trained beside {of:,} ({count / of:.2%}), {instances:,} instances, at most {steps:,} steps")  # fmt: skip

    # -- validation ---------------------------------------------------------------------------------------------
    widths = widths_of(np.concatenate([task.train.lengths, task.valid.lengths]))

    def validate(tuned: Tuned) -> dict[str, float]:
        loss, weight = 0.0, 0.0
        logp = np.zeros((len(task.valid), spec.options), np.float32)
        lengths = task.valid.lengths
        for chosen in in_order(lengths, settings.rows):
            batch = task.valid.batch(chosen, settings.rows, width_for(lengths[chosen].max(), widths))
            one, over, told = scores(spec, blueprint, tuned, backbone.params, batch, backbone.items)
            loss, weight = loss + float(one), weight + float(over)
            logp[chosen] = np.asarray(told)[: len(chosen)]
        figures = {"loss": loss / max(weight, 1.0)}
        return figures | (measure(task.valid.labels, logp) if spec.options else {})

    # -- loop ---------------------------------------------------------------------------------------------------
    step, rate, seed = make_step(), learning_rate(settings, steps), jnp.uint32(settings.seed)
    lengths, number, batches = task.train.lengths, -1, []  # the epoch that is under way
    log, stop = (
        MetricsLog(folder, -1 if found is None else int(found[0].step)),
        Signals("stopping after this step; saving"),
    )
    if found is None:
        best = Best(0, validate(fresh), jax.tree.map(jnp.copy, fresh), 0)  # the state may be donated
        log.write({"step": 0} | _named(best.figures))
    else:
        state, best = found
    done = int(state.step)
    try:
        with stop, stage("tune", steps, "steps", done=done) as bar:
            while done < steps and not _patience_is_over(best, settings):
                at, place = divmod(done, -(-instances // settings.rows))
                if at != number:
                    number, batches = at, epoch(lengths, settings.rows, settings.seed, at)
                chosen = batches[place]
                batch = task.train.batch(chosen, settings.rows, width_for(lengths[chosen].max(), widths))
                state, loss, norm = step(spec, blueprint, settings.rule, state, backbone.params, batch, backbone.items, rate(done), seed)  # fmt: skip
                done += 1
                bar.advance(1)
                if done % LOG_EVERY == 0 or done == steps:
                    row = {"loss": float(loss), "grad_norm": float(norm), "learning_rate": float(rate(done - 1))}
                    bar.advance(0, loss=row["loss"], **_shown(best))
                    log.write({"step": done} | row)
                if done % every == 0 or done == steps:
                    figures = validate(state.tuned)
                    best = _better(best, done, figures, state.tuned)
                    log.write({"step": done} | _named(figures))
                    save(folder, state, best)
                if stop.number:
                    save(folder, state, best)
                    stop.leave(f"{folder}: step {done} is saved")
    finally:
        log.close()

    # -- artefact -----------------------------------------------------------------------------------------------
    arrays = tuning.as_arrays(jax.device_get(best.tuned))
    body = said | {"backbone": said["backbone"] | {"arrays": held}, "metrics": best.figures, "step": best.step}
    body |= {"trained": count, "parameters": of, "code": code_version()}
    _write_card(folder, body)
    write_tuned(folder, body, arrays)
    remove(folder / FILE)
    key, value = _figure(best.figures)
    note(f"{folder}: best step {best.step}, validation {key} {value:.4f}; {(folder / TENSORS).stat().st_size:,} bytes")
    return read_tuned(folder)


def _rows(task: TuneTask) -> jax.Array | None:
    return None if task.rows is None else jnp.asarray(task.rows)


def _figure(figures: Mapping[str, float]) -> tuple[str, float]:
    """The figure that picks the best."""
    name = next((name for name in CHOOSES if name in figures), "loss")
    return name, figures[name]


def _better(best: Best, step: int, figures: dict[str, float], tuned: Tuned) -> Best:
    """The best validation with one more in it; a later one must be better to take its place."""
    (name, new), old = _figure(figures), _figure(best.figures)[1]
    if not better(name, new, old):
        return best._replace(since=best.since + 1)
    return Best(step, figures, jax.tree.map(jnp.copy, tuned), 0)


def _patience_is_over(best: Best, settings: TuneSettings) -> bool:
    return bool(settings.patience and best.since >= settings.patience)


def _named(figures: Mapping[str, float]) -> dict[str, float]:
    return {f"valid/{name}": value for name, value in figures.items()}


def _shown(best: Best) -> dict[str, Any]:
    name, value = _figure(best.figures)
    return {f"best {name}": value}


def _described(
    backbone: Backbone, task: TuneTask, spec: TuneSpec, settings: TuneSettings, held: Mapping[str, str]
) -> dict[str, Any]:
    """All that decides the outcome, as config.yaml has it."""
    digest = xxhash.xxh3_128_hexdigest(json.dumps(held, sort_keys=True).encode())
    return {
        "task": {"name": task.name, "options": list(task.options), **task.about},
        "spec": spec.as_dict(),
        "settings": settings.as_dict(),
        "backbone": {**backbone.source, "digest": digest},
        "artefact": {"version": TUNED.version},  # how a prompt is read is part of it
    }


def _claim(folder: Path, said: dict[str, Any]) -> bool:
    """Make the folder, or check that what it holds is this very tuning; True when that is finished.

    Raises InputError naming what differs.
    """
    config = folder / "config.yaml"
    if config.is_file():
        old = yaml.safe_load(config.read_text(encoding="utf-8"))
        for part, values in said.items():
            before = old.get(part, {}) if isinstance(old, dict) else {}
            for key in {**values, **before}:
                if (was := before.get(key)) != (now := values.get(key)) and (part, key) not in _MAY_DIFFER:
                    raise InputError(f"{folder}: {part}.{key} was {was!r} and is {now!r} now; go on with the old value, or name a new --out")  # fmt: skip
        return (folder / MANIFEST).is_file()
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty and no tuned task; name an empty or new folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(config, yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=120))
    return False


_MAY_DIFFER = {("backbone", "run")}  # a run may have moved; its digest says that it is the same


def _write_card(folder: Path, body: Mapping[str, Any]) -> None:
    """`card.md`: what was tuned, on what, with which result."""
    spec, task, source = body["spec"], body["task"], body["backbone"]
    options = f"{len(task['options'])} options ({', '.join(task['options'])})" if task["options"] else "it writes text"
    lines = [
        f"# {task['name']}",
        "",
        f"Tuned by m6rec_jax {body['code']} with method {spec['method']} beside the frozen backbone of {source.get('run', 'a run')}, step "
        f"{source.get('step', '?')}: {body['trained']:,} numbers of {body['parameters']:,} ({body['trained'] / body['parameters']:.2%}). The task: {options}.",
        "",
        f"Best step: {body['step']}. Its figures on the validation split:",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in sorted(body["metrics"].items())),
        "",
        "It works with that backbone alone; another one is refused.",
    ]
    write_text(folder / "card.md", "\n".join(lines) + "\n")
