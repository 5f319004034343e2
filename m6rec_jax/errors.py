"""The ways a command ends early on purpose, and faults of the machine; `cli` turns them into exit codes."""

from __future__ import annotations

import errno
import os
import re


class InputError(Exception):
    """The user's input or configuration is wrong (exit 2).

    The message is one line: it names the file or key, the value found and the way out.
    """


class Requeue(Exception):
    """The work was saved after a termination signal and may be started again (exit 75)."""


class Alone(Exception):
    """The other processes of the job did not come, or fell silent (exit 69): one line says which and what to look at."""


# What the operating system refuses for reasons that only the user can mend.
_SPACE, _PERMISSION = "free some space", "change its permissions or write elsewhere"
_KIND = "a file and a folder were taken for each other; name another place, or move what is in the way"
MENDABLE = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: _PERMISSION,
    errno.EISDIR: _KIND,
    errno.ENOTDIR: _KIND,
    errno.EEXIST: _KIND,
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "give it a shorter name",
}


def mendable(error: BaseException) -> tuple[str, str] | None:
    """What the operating system refused and the way out, when the user can mend it; None for other errors.

    Libraries in Rust (polars) wrap the system's error in one of their own and keep its number in the text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        number = error.errno
    else:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else 0
    return (os.strerror(number), MENDABLE[number]) if number in MENDABLE else None
