"""Configuration as it is written by hand: layered YAML, dotted overrides, help texts, errors of one line.

    load_config(["configs/base.yaml", "mine.yaml"], ["--train.steps=500"]) -> Config

Later files win over earlier ones, the command line over every file. Shipped configurations go by bare name.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from m6rec_jax.config import Config
from m6rec_jax.errors import InputError

SECTIONS: dict[str, type] = {f.name: f.default_factory for f in dataclasses.fields(Config)}  # type: ignore[misc]


def load_config(layers: Iterable[Path | str] = (), overrides: Sequence[str] = ()) -> Config:
    """The configuration of YAML files laid over each other, then of `--section.key=value` overrides.

    Raises InputError: one line that names the file or option, the value and the way out.
    """
    parser = Parser(prog="load_config")
    add_config_options(parser)
    argv = [word for layer in layers for word in ("--config", str(layer))]
    return config_of(parser.parse([*argv, *overrides]))


def config_of(options: Any) -> Config:
    """The Config among parsed options; InputError where two settings contradict."""
    values = options.as_dict()
    return Config.from_dict({section: values[section] for section in SECTIONS})


def add_config_options(parser: Parser) -> None:
    """`--config FILE` (repeatable) and one dotted option a field, with the help of the dataclass docstrings."""
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="YAML file, or the name of a shipped one (" + ", ".join(shipped()) + "); repeat it to lay one file over "
        "another: later files win over earlier ones, options of the command line over every file",
    )
    for section, kind in SECTIONS.items():
        group = parser.add_argument_group(f"{section}: {(kind.__doc__ or '').splitlines()[0].rstrip('.')}")
        texts, hints, defaults = field_help(kind), get_type_hints(kind), kind()
        for f in dataclasses.fields(kind):
            group.add_argument(
                f"--{section}.{f.name}",
                type=hints[f.name],
                default=getattr(defaults, f.name),
                metavar=_metavar(f"--{section}.{f.name}", hints[f.name]),
                help=texts[f.name].rstrip("."),
            )


HELP_COLUMN = 36  # where the text of an option begins


def _metavar(option: str, kind: object) -> str:
    """The choices where they fit beside the option, whose text names them anyway; else VALUE."""
    choices = "|".join(map(str, get_args(kind))) if _is_choice(kind) else "VALUE"
    return choices if len(f"  {option} {choices}  ") <= HELP_COLUMN else "VALUE"


def field_help(kind: type) -> dict[str, str]:
    """Help of each field: the `Args:` part of a dataclass docstring."""
    _, _, args = inspect.cleandoc(kind.__doc__ or "").partition("Args:")
    return {
        name: " ".join(text.split()) for name, text in re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", args, re.MULTILINE)
    }


def shipped(kind: str = "") -> dict[str, Path]:
    """The configurations that come with the program (those of a subfolder, where `kind` names one), by name: inside the
    installed package or beside it."""
    here = Path(__file__).resolve().parent
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    return {path.stem: path for path in sorted((folder / kind).glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file at `name`, or the shipped configuration of that name."""
    path, known = Path(name), shipped()
    if path.is_file():
        return path
    if name in known:
        return known[name]
    raise InputError(f"--config {name}: no such file; the shipped configurations are {', '.join(known)}")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help without Python types; a default is shown where there is one to tell."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        width = min(110, shutil.get_terminal_size().columns)
        super().__init__(*args, **{**kwargs, "width": width, "max_help_position": HELP_COLUMN})

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        return (action.help or "") + (
            "" if silent or not action.option_strings else f" (default: {_show(action.default)})"
        )


class Parser(ArgumentParser):
    """jsonargparse, every complaint an InputError of one line with near matches."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            **{"formatter_class": HelpFormatter, **kwargs},
            exit_on_error=False,
            allow_abbrev=False,
            print_config=None,
        )

    def parse(self, argv: Sequence[str]) -> Any:
        """Options of `argv`; configuration files are checked one by one first, so that errors name the file."""
        argv = self._files_first(argv) if "--config" in self._option_string_actions else list(argv)
        try:
            return self.parse_args(argv)
        except argparse.ArgumentError as error:
            raise InputError(self.explain(error)) from None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise argparse.ArgumentError(None, message)

    def explain(self, error: Exception, dashes: str = "--") -> str:
        """One line for an error of jsonargparse; `dashes` before an option that came from the command line."""
        text = str(error)
        unknown = re.search(r"unrecognized arguments: (\S+)", text)
        if unknown:
            word = unknown[1].split("=")[0]
            if not word.startswith("-"):
                return f"{word}: one word too many; {self.prog} --help shows what is taken"
            near = _near(word, self._option_string_actions)
            return f"{word}: unknown option; {near or f'{self.prog} --help lists them'}"
        wrong = re.search(r'Parser key "([^"]+)":.*?Got value: (.*)', text, re.DOTALL)
        if wrong:
            action = self._option_string_actions.get(f"--{wrong[1]}")
            return f"{dashes}{wrong[1]}={_line(wrong[2])}: must be {_expected(action)}"
        missing = re.search(r"the following arguments are required: (\S+?),?(?: |$)", text)
        if missing:
            name = missing[1]
            option = f"--{name}" if f"--{name}" in self._option_string_actions else name.upper()
            return f"{option} is missing; {self.prog} --help shows an example"
        return f"{_line(re.sub(r'^Parser key .config.: ', '', text))}; {self.prog} --help shows an example"

    def _files_first(self, argv: Sequence[str]) -> list[str]:
        files, rest, words = [], [], iter(argv)
        for word in words:
            if word == "--config":
                name = next(words, None)
                if name is None:
                    raise InputError("--config: a file name is missing after it")
                files.append(name)
            elif word.startswith("--config="):
                files.append(word.removeprefix("--config="))
            else:
                rest.append(word)
        paths = [find_config(name) for name in files]
        for path in paths:
            _check_layer(path)
        return [word for path in paths for word in ("--config", str(path))] + rest


def _check_layer(path: Path) -> None:
    """Raise InputError, naming `path`, when a configuration file does not hold a configuration."""
    import yaml

    try:
        layer = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML: {_line(str(error))}") from None
    known = ", ".join(SECTIONS)
    if not isinstance(layer, dict):
        raise InputError(f"{path}: holds {_show(layer)} where sections are needed: {known}")
    for section, values in layer.items():
        if section not in SECTIONS:
            raise InputError(
                f"{path}: {section}: unknown section; {_near(str(section), SECTIONS) or f'known: {known}'}"
            )
        keys = [f.name for f in dataclasses.fields(SECTIONS[section])]
        if not isinstance(values, dict):
            raise InputError(f"{path}: {section}={_show(values)}: must be a section with some of: {', '.join(keys)}")
        for key in values:
            if key not in keys:
                near = _near(f"{section}.{key}", [f"{section}.{k}" for k in keys])
                raise InputError(f"{path}: {section}.{key}: unknown key; {near or 'known: ' + ', '.join(keys)}")
    parser = Parser(prog="config")
    add_config_options(parser)
    try:
        parser.parse_object(layer, defaults=False)
    except argparse.ArgumentError as error:
        raise InputError(f"{path}: {parser.explain(error, dashes='')}") from None


def _near(word: str, known: Iterable[str]) -> str:
    """ "did you mean ...?" with up to three near matches, or nothing."""
    known, last = list(known), word.split(".")[-1].lstrip("-")
    found = [k for k in known if k.split(".")[-1].lstrip("-") == last] or [k for k in known if k.startswith(word)]
    found = found or difflib.get_close_matches(word, known, 2, 0.8)
    return f"did you mean {' or '.join(found[:3])}?" if found else ""


def _is_choice(hint: Any) -> bool:
    return get_origin(hint) is Literal


def _expected(action: argparse.Action | None) -> str:
    hint = getattr(action, "_typehint", None) or getattr(action, "type", None)
    if _is_choice(hint):
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is dict:
        return "names with numbers, as in {next-item: 0.6, text-causal: 0.4}"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "something else; see --help")


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    return "nothing" if value is None else _line(str(value))


def _line(text: str) -> str:
    """`text` on one line, cut where it grows long."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "..."
