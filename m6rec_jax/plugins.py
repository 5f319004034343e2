"""Named things of ours and of other packages, joined through entry points."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

from m6rec_jax.errors import InputError


def load_points(group: str, built_in: Iterable[Any]) -> dict[str, Any]:
    """`name -> thing` of the built-in things and of every entry point of `group` (which loads to such a thing).

    Raises InputError when two have one name.
    """
    found = {thing.name: thing for thing in built_in}
    for point in entry_points(group=group):
        thing = point.load()
        if thing.name in found:
            raise InputError(f"{point.value}: the name {thing.name!r} is taken in {group}; give it another name")
        found[thing.name] = thing
    return found
