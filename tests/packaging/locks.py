"""Lock files as data, and the machines they are for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from packaging.markers import Marker
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PINNED = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[\w.!+]+)(?: ; (?P<marker>.+?))? \\\n")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?\n")

MACHINES = {
    f"python{version}-{system}-{machine}": {
        "python_version": version,
        "python_full_version": f"{version}.1",
        "sys_platform": system,
        "platform_machine": machine,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[system],
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    for version in ("3.11", "3.12", "3.13", "3.14")
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
}


@dataclass(frozen=True)
class Pin:
    name: str
    version: str
    marker: Marker | None
    hashes: int


@cache
def read_lock(name: str) -> tuple[Pin, ...]:
    """The pins of `requirements/<name>.lock`; raises ValueError at a line that is no pin, hash or comment."""
    pins: list[Pin] = []
    with open(ROOT / "requirements" / f"{name}.lock", encoding="utf-8") as file:
        for line in file:
            if HASH.fullmatch(line):
                last = pins.pop()
                pins.append(Pin(last.name, last.version, last.marker, last.hashes + 1))
            elif found := PINNED.fullmatch(line):
                marker = Marker(found["marker"]) if found["marker"] else None
                pins.append(Pin(canonicalize_name(found["name"]), found["version"], marker, 0))
            elif not line.lstrip().startswith("#"):
                raise ValueError(f"{file.name}: {line!r}")
    return tuple(pins)


def installed_on(name: str, machine: dict[str, str] | None = None) -> dict[str, str]:
    """Package to version, as a lock gives them to a machine (None: this one)."""
    pins = [pin for pin in read_lock(name) if pin.marker is None or pin.marker.evaluate(machine)]
    versions = {pin.name: pin.version for pin in pins}
    assert len(versions) == len(pins), f"{name}.lock gives {machine} two versions of a package"
    return versions


@cache
def brought_by(name: str, package: str) -> frozenset[str]:
    """A package of a lock with all it needs, and what they need; empty when the lock has it not."""
    wanted_by: dict[str, set[str]] = {}
    for line in (ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"[a-z0-9-]+(?===)", line):
            parents = wanted_by.setdefault(found[0], set())
        elif found := re.fullmatch(r"    #   ([a-z0-9-]+)|    # via ([a-z0-9-]+)", line):
            parents.add(found[1] or found[2])
    brought = {package} & wanted_by.keys()
    while more := {one for one, parents in wanted_by.items() if parents & brought} - brought:
        brought |= more
    return frozenset(brought)
