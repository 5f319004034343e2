"""Write beside, then rename: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a path beside `target` to write (file or folder); renamed over it on success, removed on failure."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")
    remove(partial)
    try:
        yield partial
        if partial.is_dir() and target.is_dir():
            old = target.with_name(f".{target.name}.{os.getpid()}.old{PARTIAL}")
            os.replace(target, old)
            os.replace(partial, target)
            remove(old)
        else:
            os.replace(partial, target)
    finally:
        remove(partial)


def write_json(target: Path | str, value: Any) -> None:
    """Atomically write `value` as indented UTF-8 JSON."""
    with atomic_path(target) as path, open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


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
