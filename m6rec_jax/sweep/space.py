"""The space of a sweep: which settings are searched, over what. Read from YAML, and checked whole before anything starts.

optim.learning_rate: {low: 1e-4, high: 3e-3, log: true}
model.layers: {values: [2, 4]}
model.width: {low: 64, high: 256, step: 64}
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from m6rec_jax.config import Config
from m6rec_jax.errors import InputError
from m6rec_jax.settings import SECTIONS, Parser, add_config_options, shipped

MOST_CHECKED = 4096  # combinations tried against the configuration; of a larger space so many, drawn at random
RANGE = ("low", "high", "log", "step")
Value = Any  # of a setting: number, text, true or false, or names with numbers


@dataclass(frozen=True)
class Choice:
    """A setting that takes one of `values`."""

    key: str
    values: tuple[Value, ...]

    def tried(self) -> tuple[Value, ...]:
        """The values that the configuration must take."""
        return self.values

    def as_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included: whole or not, evenly or by its logarithm, in steps or not."""

    key: str
    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def tried(self) -> tuple[Value, ...]:
        """Every whole number where they are few; else both ends."""
        if not self.whole or self.log or (self.high - self.low) // int(self.step or 1) >= 64:
            return (self.low, self.high)
        return tuple(range(int(self.low), int(self.high) + 1, int(self.step or 1)))

    def as_dict(self) -> dict[str, Any]:
        extra = {"log": True} if self.log else {"step": self.step} if self.step else {}
        return {"low": self.low, "high": self.high, **extra}


Axis = Choice | Range


def find_space(name: str) -> Path:
    """The file at `name`, or the shipped space of that name (configs/sweep)."""
    path, known = Path(name), shipped("sweep")
    if path.is_file():
        return path
    if name in known:
        return known[name]
    raise InputError(f"--space {name}: no such file; the shipped spaces are {', '.join(known)}")


def read_space(path: Path, base: Config) -> list[Axis]:
    """The axes of a space that is laid over `base`.

    Raises InputError, one line with file, key and value, for an unknown key, an empty range, a value of the wrong kind,
    and a combination that the configuration refuses.
    """
    import yaml

    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(body, dict) or not body:
        raise InputError(f"{path}: names no setting; write one a line, such as optim.learning_rate: {{low: 1e-4, high: 3e-3, log: true}}")  # fmt: skip
    parser = Parser(prog="config")
    add_config_options(parser)
    axes = [_axis(path, parser, str(key), said) for key, said in body.items()]
    _check_together(path, base, axes)
    return axes


def with_values(base: Config, values: Mapping[str, Value]) -> Config:
    """`base` with these settings (dotted keys) in place; InputError where it refuses them."""
    body = base.as_dict()
    for key, value in values.items():
        section, name = key.split(".")
        body[section][name] = value
    return Config.from_dict(body)


def overrides(values: Mapping[str, Value]) -> list[str]:
    """Words for `m6rec train`, one a setting."""
    return [f"--{key}={text(value)}" for key, value in values.items()]


def text(value: Value) -> str:
    """A value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _axis(path: Path, parser: Parser, key: str, said: Any) -> Axis:
    section, _, name = key.partition(".")
    if section not in SECTIONS:
        raise InputError(f"{path}: {key}: unknown key; write section.key, of the sections {', '.join(SECTIONS)}")
    known = [f.name for f in fields(SECTIONS[section])]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        mean = f"did you mean {section}.{near[0]}? " if near else ""
        raise InputError(f"{path}: {key}: unknown key; {mean}known in {section}: {', '.join(known)}")
    where = f"{path}: {key}: {_shown(said)}"
    if key == "train.best":
        raise InputError(f"{where}: trials are compared by that figure; give one to the whole sweep, --train.best=NAME")
    if isinstance(said, dict) and set(said) == {"values"}:
        return _choice(where, path, parser, key, said["values"])
    if not isinstance(said, dict) or not {"low", "high"} <= set(said) <= set(RANGE):
        raise InputError(f"{where}: must be {{values: [...]}} or {{low: ..., high: ...}}, the latter with log: true or step: ... where wanted")  # fmt: skip
    kind = get_type_hints(SECTIONS[section])[name]
    if kind not in (int, float):
        raise InputError(f"{where}: only numbers have a range; list the values: {{values: [...]}}")
    return _range(where, path, parser, key, said, kind is int)


def _choice(where: str, path: Path, parser: Parser, key: str, values: Any) -> Choice:
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: has no values; list at least one")
    made = tuple(_typed(path, parser, key, value) for value in values)
    twice = [value for i, value in enumerate(made) if value in made[:i]]
    if twice:
        raise InputError(f"{where}: {text(twice[0])} is listed twice; take one out")
    return Choice(key, made)


def _range(where: str, path: Path, parser: Parser, key: str, said: dict[str, Any], whole: bool) -> Range:
    low, high = (_typed(path, parser, key, said[name]) for name in ("low", "high"))
    log, step = said.get("log", False), said.get("step")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"{where}: an empty range; low must be below high")
    if not isinstance(log, bool):
        raise InputError(f"{where}: log must be true or false")
    if log and low <= 0:
        raise InputError(f"{where}: low must be above 0 for log: true")
    if step is not None:
        if log:
            raise InputError(f"{where}: log and step exclude each other; take one out")
        step = _typed(path, parser, key, step)
        if not 0 < step <= high - low:
            raise InputError(f"{where}: step must be above 0 and at most high - low")
        count = (high - low) / step
        if abs(count - round(count)) > 1e-9 * count:
            raise InputError(f"{where}: step does not reach high from low; the last value would be {low + math.floor(count) * step:g}")  # fmt: skip
    return Range(key, low, high, log, step, whole)


def _typed(path: Path, parser: Parser, key: str, value: Any) -> Value:
    """A value as the setting's own type: YAML takes 1e-4 for a text, and 1 for a whole number."""
    section, name = key.split(".")
    try:
        return parser.parse_object({section: {name: value}}, defaults=False).as_dict()[section][name]
    except argparse.ArgumentError as error:
        raise InputError(f"{path}: {parser.explain(error, dashes='')}") from None


def _check_together(path: Path, base: Config, axes: Sequence[Axis]) -> None:
    """Raise InputError where the configuration refuses a combination: no trial is to begin with that."""
    tried = [axis.tried() for axis in axes]
    combinations: Any = itertools.product(*tried)
    if math.prod(map(len, tried)) > MOST_CHECKED:
        draw = random.Random(0)
        alone = [[*(one[0] for one in tried[:i]), value, *(one[0] for one in tried[i + 1 :])] for i, mine in enumerate(tried) for value in mine]  # fmt: skip
        combinations = [*alone, *([draw.choice(mine) for mine in tried] for _ in range(MOST_CHECKED))]
    for values in combinations:
        chosen = {axis.key: value for axis, value in zip(axes, values, strict=True)}
        try:
            with_values(base, chosen)
        except InputError as error:
            raise InputError(f"{path}: {error}; every value must fit the configuration and every other value") from None


def _shown(said: Any) -> str:
    shown = " ".join(json.dumps(said, ensure_ascii=False, default=str).split()).replace('"', "")
    return shown if len(shown) <= 120 else shown[:117] + "..."
