"""Where a verb writes, checked before it works: what hours have made must find its place."""

from __future__ import annotations

import os
from pathlib import Path

from m6rec_jax.errors import InputError


def file_to_write(option: str, name: str) -> Path:
    """The path of a file that an option names; InputError when no file can be written there."""
    path = Path(name)
    if path.is_dir():
        raise InputError(f"{option} {name}: a folder is there; name a file, such as one within it")
    _check_above(option, name, path.parent)
    return path


def folder_to_write(option: str, name: str) -> Path:
    """The path of a folder that an option names, there or not; InputError when none can be made or written there."""
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise InputError(f"{option} {name}: a file is in the way; name a folder")
    _check_above(option, name, path)
    return path


def _check_above(option: str, name: str, folder: Path) -> None:
    """Raise InputError unless `folder`, or what is there of the folders above it, can be written to."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise InputError(f"{option} {name}: {there} is a file, not a folder; name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{option} {name}: no permission to write in {there}; name another place")
