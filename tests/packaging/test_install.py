"""Which interpreter is taken, what is refused, and that a good environment is left as it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.locks import ROOT

SH = "/bin/sh"
MINOR = sys.version_info.minor
REAL = Path(getattr(sys, "_base_executable", sys.executable))
HERE = Path(sys.prefix)


def find_python(path, **variables):
    """Run find-python.sh where only the folders of `path` can be searched."""
    environment = {"PATH": os.pathsep.join(map(str, path)), "HOME": "/nowhere", **variables}
    script = [SH, str(ROOT / "requirements/find-python.sh")]
    return subprocess.run(script, env=environment, capture_output=True, text=True, check=False)


def command(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{SH}\n{script}\n")
    path.chmod(0o755)


def link(path):
    """The interpreter of these tests, under another name."""
    command(path, f'exec "{REAL}" "$@"')


def test_a_shim_that_fails_is_passed_over(tmp_path):
    shims, good = tmp_path / "shims", tmp_path / "a folder"
    for minor in (11, 12, 13, 14):
        command(shims / f"python3.{minor}", "echo 'pyenv: command not found' >&2; exit 127")
    link(good / f"python3.{MINOR}")
    found = find_python([shims, good])
    assert (found.returncode, Path(found.stdout.strip()).resolve()) == (0, REAL.resolve())


def test_a_python_without_venv_is_passed_over(tmp_path):
    bare, good = tmp_path / "bare", tmp_path / "good"
    command(bare / f"python3.{MINOR}", f'shift; exec "{REAL}" -I -c "import sys; sys.modules[\'venv\'] = None; $2"')
    link(good / "python3")
    found = find_python([bare, good])
    assert Path(found.stdout.strip()).resolve() == REAL.resolve()


def test_pyenv_versions_are_found_without_a_shim(tmp_path):
    link(tmp_path / f"versions/3.{MINOR}.99/bin/python3.{MINOR}")
    assert find_python([tmp_path], PYENV_ROOT=str(tmp_path)).returncode == 0
    assert find_python([tmp_path], PYENV_ROOT=str(tmp_path), PY=f"python3.{MINOR}").returncode == 0


def test_no_interpreter_is_one_clear_line(tmp_path):
    found = find_python([tmp_path])
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert "3.11 to 3.14" in found.stderr
    assert "PY=" in found.stderr


@pytest.mark.parametrize("says", ["it is cpython 3.9.1", "No module named venv"])
def test_a_forced_interpreter_that_cannot_serve_is_refused(tmp_path, says):
    command(tmp_path / "mine", f"echo '{says}' >&2; exit 1")
    found = find_python(["/usr/bin", "/bin"], PY=str(tmp_path / "mine"))
    assert (found.returncode, found.stdout) == (2, "")
    assert f"PY={tmp_path / 'mine'}: {says}" in found.stderr


def test_a_folder_that_is_no_venv_is_never_removed(tmp_path):
    (tmp_path / "precious").write_text("years of work")
    refused = subprocess.run(
        [SH, "requirements/install.sh", "core"], cwd=ROOT, env={**os.environ, "VENV": str(tmp_path)}, check=False
    )
    assert refused.returncode == 2
    assert (tmp_path / "precious").is_file()


def test_what_a_link_points_to_is_never_changed(tmp_path):
    theirs, link = tmp_path / "theirs", tmp_path / ".venv-mine"
    theirs.mkdir()
    (theirs / "locks").write_text("of another checkout")
    link.symlink_to(theirs)
    variables = {**os.environ, "VENV": str(link)}
    refused = subprocess.run([SH, "requirements/install.sh", "core"], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)  # fmt: skip
    assert refused.returncode == 2 and ".venv-mine: is a link" in refused.stderr
    assert (theirs / "locks").read_text() == "of another checkout" and link.is_symlink()


# Another checkout's would be taken for a bad one, and made anew.
@pytest.mark.skipif(not (HERE / "locks").is_file() or HERE.parent != ROOT, reason="not made by make in this checkout")
@pytest.mark.parametrize("what", ["core", "all"])
def test_a_good_environment_is_left_alone(what):
    def state():
        return {path: path.stat().st_mtime_ns for path in (HERE / "locks", HERE / "checkout", HERE / "pyvenv.cfg")}

    before = state()
    variables = {**os.environ, "VENV": str(HERE), "PY": ""}
    again = subprocess.run(
        [SH, "requirements/install.sh", what], cwd=ROOT, env=variables, check=True, capture_output=True, timeout=20
    )
    assert again.stdout == b""
    assert state() == before
