"""A reader sees the old or the new; what a killed process left is swept away, what a living one writes is not."""

import os
import signal
import subprocess
import sys

import pytest

from m6rec_jax.artifacts.atomic import HOST, atomic_path, write_text

KILLED = """
import os, signal, sys
from m6rec_jax.artifacts.atomic import atomic_path
with atomic_path(sys.argv[1]) as path:
    if sys.argv[2] == "folder":
        path.mkdir()
        path = path / "part"
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_is_swept_by_the_next_to_write_there(tmp_path, kind):
    target, beside = tmp_path / "a[1].b", tmp_path / ".a[1].b.c.7@x.partial"
    beside.write_text("of another target")
    ran = subprocess.run([sys.executable, "-c", KILLED, str(target), kind], check=False)
    assert ran.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 2 and not target.exists()
    write_text(target, "whole")
    assert sorted(tmp_path.iterdir()) == sorted([target, beside]) and target.read_text() == "whole"


def test_what_others_are_writing_stays(tmp_path):
    living, abroad = tmp_path / f".x.{os.getppid()}@{HOST}.partial", tmp_path / f".x.99999999@{HOST}-2.partial"
    for path in (living, abroad):
        path.write_text("")
    write_text(tmp_path / "x", "mine")
    assert living.exists() and abroad.exists()


def test_an_old_folder_whose_successor_never_came_is_put_back(tmp_path):
    old = tmp_path / f".x.99999999@{HOST}.old.partial"
    old.mkdir()
    (old / "kept").write_text("old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "x"):
        raise RuntimeError
    assert (tmp_path / "x" / "kept").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ("old", "new"):
        with atomic_path(tmp_path / "x") as path:
            path.mkdir()
            (path / content).write_text(content)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1
