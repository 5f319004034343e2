"""Freed memory stays with the process: XLA on CPU asks for its buffers anew at every step."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

# glibc's mallopt parameters (malloc.h). What it takes by mmap, as it does for every large buffer and for all buffers of a
# thread's own arena beyond 64 MB, comes as pages that the kernel has to fault in and zero again: 72,000 of them and a
# quarter of the time in a step of the demo. One arena, that only grows, reuses them.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_SETTINGS = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20))


@cache
def keep_freed_memory() -> bool:
    """Ask glibc to reuse freed buffers instead of returning them; once a process. False where there is no glibc.

    To be called before any thread is started (importing numpy starts some): glibc counts its arenas once, and each thread
    keeps the one that it began with. Worth it where buffers of megabytes come and go all the time; the process keeps the
    most it ever held. A program of one's own: MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in _SETTINGS)
