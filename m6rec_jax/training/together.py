"""Processes that start one job compare what they were started with, before any of them waits for another's arithmetic.

Said through the key-value store of jax's coordinator: text, with a deadline. A collective would do neither: processes
with different programs wait for each other without end.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import xxhash

import m6rec_jax
from m6rec_jax.artifacts.run import code_version
from m6rec_jax.config import Config
from m6rec_jax.data.domains import Domain
from m6rec_jax.errors import Alone, InputError

SECONDS = 300.0  # as long as jax waits for processes to come
LINGER = 2.0  # until all have read why the job ends: the store ends with the first process
SHOWN = 3  # differences named in the line
WAY_OUT = "start all with the same command, code and environment"
Made = TypeVar("Made")
_asked = itertools.count()  # a key of the store is written once


def started_with(config: Config, domains: Sequence[Domain]) -> dict[str, str]:
    """What must be equal in all processes of a job, by name: settings, datasets, code, versions, compiler flags."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return {
        **{name: repr(value) for name, value in _flat(asdict(config))},
        **{f"dataset {n}": f"{one.name}={one.weight:g} {one.dataset.digest[:12]}" for n, one in enumerate(domains)},
        "m6rec_jax": code_version(),
        "digest of m6rec_jax's source": _source(),
        "python": ".".join(map(str, sys.version_info[:2])),
        "jax": f"{jax.__version__}, jaxlib {version('jaxlib')}",
        # What the compiler writes for debugging may have a place of its own in each process.
        "XLA_FLAGS": " ".join(sorted(flag for flag in flags if not flag.startswith("--xla_dump"))),
        "LIBTPU_INIT_ARGS": " ".join(sorted(os.environ.get("LIBTPU_INIT_ARGS", "").split())),
    }


def agree(
    make: Callable[[], Made], facts: Callable[[Made], Mapping[str, str]] = lambda _: {}, seconds: float = SECONDS
) -> Made:
    """`make()`, once `facts(make())` is known to be the same in all processes of the job.

    Raises InputError, in all of them and in the same words, when one has other facts than the first (which, what, both
    values) or when `make` raised InputError in one. Any other error is raised as it is where it arose, and as InputError
    in the others, who else would wait for this process. Alone when one says nothing for `seconds`.
    """
    if jax.process_count() == 1:
        made = make()
        facts(made)
        return made
    from jax._src.distributed import global_state  # there is no public door to the store

    store, room = global_state.client, f"m6rec_jax/agree/{next(_asked)}"
    assert store is not None
    made, said, fault = None, {"host": platform.node()}, None
    try:
        made = make()
        said |= {"facts": dict(facts(made))}
    except InputError as error:
        said |= {"refused": str(error)}
    except Exception as error:
        said |= {"refused": f"{type(error).__name__}: {error}"}
        fault = error
    if jax.process_index() == 0:
        kind, text = _verdict(said, lambda other, wait: store.blocking_key_value_get(f"{room}/{other}", wait), seconds)
        store.key_value_set(f"{room}/verdict", json.dumps([kind, text]))
        if kind == "silent":
            time.sleep(LINGER)
    else:
        store.key_value_set(f"{room}/{jax.process_index()}", json.dumps(said))
        seconds += 30  # the first waits that long for the slowest; its verdict is to reach everybody
        try:
            kind, text = json.loads(store.blocking_key_value_get(f"{room}/verdict", int(1000 * seconds)))
        except Exception as error:  # XlaRuntimeError or JaxRuntimeError, by the version of jax
            raise fault or Alone(_silent(0, seconds)) from error
    if fault is not None:
        raise fault
    if kind == "refused":
        raise InputError(text)
    if kind == "silent":
        raise Alone(text)
    return made  # type: ignore[return-value]  nothing was refused, so it was made


def _verdict(mine: dict[str, Any], ask: Callable[[int, int], str], seconds: float) -> tuple[str, str]:
    """("agreed" | "refused" | "silent", a line) of the first process; `ask(process, milliseconds)` gives its message."""
    processes, until = jax.process_count(), time.monotonic() + seconds
    if "refused" in mine:
        return "refused", mine["refused"]
    for other in range(1, processes):
        try:
            told = ask(other, max(1, int(1000 * (until - time.monotonic()))))
        except Exception:  # no answer in time: XlaRuntimeError or JaxRuntimeError, by the version of jax
            return "silent", _silent(other, seconds)
        its = json.loads(told)
        if "refused" in its:
            return "refused", f"process {other} of {processes} on {its['host']}: {its['refused']}"
        if found := differences(mine["facts"], its["facts"]):
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            said = ", ".join(
                f"{name} is {there or 'not set'} there and {here or 'not set'} here"
                for name, here, there in found[:SHOWN]
            )
            return "refused", (
                f"process {other} of {processes} on {its['host']} was started otherwise than process 0 on "
                f"{mine['host']}: {said}{more}; {WAY_OUT}"
            )
    return "agreed", ""


def differences(ours: Mapping[str, str], its: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(name, our value, its value) of every fact that is not the same, in order; "missing" where there is none."""
    pairs = ((name, ours.get(name, "missing"), its.get(name, "missing")) for name in dict.fromkeys([*ours, *its]))
    return [(name, our, other) for name, our, other in pairs if our != other]


def _silent(process: int, seconds: float) -> str:
    return (
        f"process {process} of {jax.process_count()} said nothing for {seconds:g} s after it had joined; look at the end of its "
        "log, then start the job again"
    )


def _flat(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested dicts, named with dots."""
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for key, value in tree.items() for leaf in _flat(value, f"{path}.{key}" if path else str(key))]


def _source() -> str:
    """Digest of the package's Python files: two checkouts of one commit may differ in what was not committed."""
    root, digest = Path(m6rec_jax.__file__).parent, xxhash.xxh3_64()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
