"""Which code makes lists: what tells those of one version of this package from those of another."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import xxhash

import m6rec_jax

ROOMS = ("data", "decoding", "model", "recommend")  # and the modules beside them; nothing else has a say in a list


@cache
def code_of_lists() -> str:
    """`0.1.0+` and a digest of the sources that lists come from: the version alone does not tell two commits apart.

    Python, jax and the machine are left out: they move last digits, not what was asked.
    """
    top, whole = Path(m6rec_jax.__file__).parent, xxhash.xxh3_64()
    for path in [*sorted(top.glob("*.py")), *(p for room in ROOMS for p in sorted((top / room).rglob("*.py")))]:
        whole.update(f"{path.relative_to(top).as_posix()}\0".encode())
        whole.update(path.read_bytes())
    return f"{m6rec_jax.__version__}+{whole.hexdigest()}"
