"""What a sweep remembers: `sweep.json` (what is searched, over which configuration) and Optuna's journal of its trials."""

from __future__ import annotations

import fcntl
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m6rec_jax.artifacts.atomic import write_json
from m6rec_jax.artifacts.best import smaller_is_better
from m6rec_jax.config import Config
from m6rec_jax.errors import InputError
from m6rec_jax.sweep.space import Axis, Choice, Value, text

FILE, JOURNAL, LOCK = "sweep.json", "journal.log", "sweep.lock"
PRUNERS = ("median", "hyperband", "none")


def optuna() -> Any:
    """The package, quiet; InputError with the way out when it is not installed."""
    try:
        import optuna as package
    except ImportError:
        raise InputError("m6rec sweep needs the package optuna: pip install 'm6rec-jax[sweep]'") from None
    package.logging.set_verbosity(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"optuna\.")
    return package


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder for this process; InputError while another one works in it. A killed process lets go of it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"--out {out}: another sweep is at work in it; wait for it, stop it, or name another folder") from None  # fmt: skip
        yield


def remember(out: Path, config: Config, axes: Sequence[Axis], datasets: Sequence[str]) -> None:
    """Write `sweep.json`, or compare with it: trials of one sweep differ in what is searched and in nothing else.

    Raises InputError naming the first setting that differs.
    """
    body = {
        "config": config.as_dict(),
        "space": {axis.key: axis.as_dict() for axis in axes},
        "datasets": [str(Path(name).absolute()) for name in datasets],
    }
    file = out / FILE
    if not file.is_file():
        write_json(file, body)
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not readable as JSON ({error}); take it from a copy, or name another --out") from None  # fmt: skip
    if isinstance(before, dict) and isinstance(
        before.get("config"), dict
    ):  # a sweep of before a setting was without it
        before["config"] = _filled(before["config"])
    for name, was, now in _differing(before, json.loads(json.dumps(body))):
        raise InputError(f"--out {out}: was begun with {name} {was} and is {now} now; give the same again, or name another folder")  # fmt: skip


def _filled(config: dict[str, Any]) -> dict[str, Any]:
    """A config as it was written, with what this code sets by itself where it says nothing."""
    known = json.loads(json.dumps(Config().as_dict()))
    return {
        part: known[part] | values if isinstance(known.get(part), dict) else values for part, values in config.items()
    }


def _differing(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(was, dict) and isinstance(now, dict) and name.count(".") < 2:
        for key in dict.fromkeys([*was, *now]):
            yield from _differing(was.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif was != now:
        shown = ["nothing" if value is None else text(value) for value in (was, now)]
        yield name, shown[0], shown[1]


def open_study(out: Path, seed: int, pruner: str, jobs: int, metric: str) -> Any:
    """The study of the journal in `out`, made if missing: of trials whose figure is `metric`. The caller holds the lock of
    the folder."""
    package = optuna()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    file = out / JOURNAL
    mend(file)
    backend = JournalFileBackend(str(file))
    try:
        study = package.create_study(
            storage=JournalStorage(backend), study_name="sweep", load_if_exists=True,
            direction="minimize" if smaller_is_better(metric) else "maximize",
        )  # fmt: skip
    except (ValueError, KeyError) as error:
        raise InputError(f"{file}: damaged ({error}); take it from a copy, or name another --out") from None
    # Taken up again with the same seed, a sampler would draw the same first settings once more.
    seed = (seed + len(study.trials)) % 2**32
    study.sampler = package.samplers.TPESampler(seed=seed, constant_liar=jobs > 1)
    study.pruner = {
        "median": lambda: package.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
        "hyperband": lambda: package.pruners.HyperbandPruner(min_resource=1, max_resource="auto", reduction_factor=3),
        "none": package.pruners.NopPruner,
    }[pruner]()
    return study


def mend(journal: Path) -> None:
    """Cut off a last line that a crash left half written, and drop the lock of whoever wrote it: else the next line
    would be glued to it, and the journal unreadable from there on."""
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if not journal.is_file():
        return
    whole = journal.read_bytes()
    if not whole.endswith(b"\n") and whole:
        with open(journal, "r+b") as file:
            file.truncate(whole.rfind(b"\n") + 1)


def distributions(axes: Sequence[Axis]) -> dict[str, Any]:
    """Optuna's distribution of each setting, by key."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def made(axis: Axis) -> Any:
        if isinstance(axis, Choice):
            return CategoricalDistribution([_choice(value) for value in axis.values])
        if axis.whole:
            return IntDistribution(int(axis.low), int(axis.high), axis.log, int(axis.step or 1))
        return FloatDistribution(axis.low, axis.high, axis.log, axis.step)

    return {axis.key: made(axis) for axis in axes}


def settings_of(params: Mapping[str, Any], axes: Sequence[Axis]) -> dict[str, Value]:
    """The settings that the parameters of a trial stand for. Steps are rounded: 0.1 + 2 x 0.1 is to be 0.3."""
    made: dict[str, Value] = {}
    for axis in axes:
        drawn = params[axis.key]
        if isinstance(axis, Choice):
            made[axis.key] = next(value for value in axis.values if _choice(value) == drawn)
        else:
            made[axis.key] = float(f"{drawn:.12g}") if axis.step and not axis.whole else drawn
    return made


def _choice(value: Value) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else text(value)
