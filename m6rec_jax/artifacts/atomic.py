"""Write beside, then rename: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
HOST = re.sub(r"\W", "-", platform.node())  # a folder may be shared: another machine's processes are not ours to judge


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a path beside `target` to write (file or folder); renamed over it on success, removed on failure.

    What a killed process of this machine left beside `target` is removed first.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}@{HOST}{PARTIAL}")
    remove(partial)
    try:
        yield partial
        if partial.is_file():
            _sync(partial)
        if partial.is_dir() and target.is_dir():
            old = target.with_name(f".{target.name}.{os.getpid()}@{HOST}.old{PARTIAL}")
            os.replace(target, old)
            os.replace(partial, target)
            remove(old)
        else:
            os.replace(partial, target)
    finally:
        remove(partial)


def _sync(file: Path) -> None:
    """Bring a file to the disk: renamed before, it could be an empty one after a power cut."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _sweep(target: Path) -> None:
    """Remove the partials of `target` whose process is no more; put back an old folder that was not replaced yet."""
    for left in target.parent.glob(f".{escape(target.name)}.*{PARTIAL}"):
        found = re.fullmatch(rf"(\d+)@{re.escape(HOST)}(\.old)?", left.name[len(target.name) + 2 : -len(PARTIAL)])
        if found is None or _alive(int(found[1])):
            continue
        if found[2] and not target.exists():
            os.replace(left, target)
        else:
            remove(left)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's, but there
        return True
    return True


def write_json(target: Path | str, value: Any) -> None:
    """Atomically write `value` as indented UTF-8 JSON."""
    with atomic_path(target) as path, open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


def write_text(target: Path | str, text: str) -> None:
    """Atomically write UTF-8 text."""
    with atomic_path(target) as path:
        path.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
