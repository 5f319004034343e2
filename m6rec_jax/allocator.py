"""Freed memory stays with the process: XLA on CPU asks for its buffers anew at every step."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

# glibc's mallopt parameters (malloc.h). Every buffer it takes by mmap comes as pages the kernel has to fault in and zero
# again: a third of a training step on two cores.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_SETTINGS = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20))


@cache
def keep_freed_memory() -> bool:
    """Ask glibc to reuse freed buffers instead of returning them; once a process. False where there is no glibc.

    Worth it where buffers of megabytes come and go all the time; the process keeps the most it ever held.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in _SETTINGS)
