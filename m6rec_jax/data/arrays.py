"""Named arrays on disk (npz), never with pickle."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from m6rec_jax.errors import InputError


def read_arrays(path: Path | str, *names: str) -> dict[str, np.ndarray]:
    """The arrays `names` of an npz, or all of them. Raises InputError when it is missing, damaged, or lacks one."""
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in names or data.files}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: missing or damaged ({reason}); prepare the dataset again") from None
