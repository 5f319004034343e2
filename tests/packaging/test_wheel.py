"""The wheel holds the program, its templates and configurations, and nothing else."""

import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest

from tests.packaging.locks import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def text(wheel, ending):
    (name,) = [name for name in wheel.namelist() if name.endswith(ending)]
    return wheel.read(name).decode()


def test_it_holds_every_file_of_the_package(wheel):
    package = [path for path in (ROOT / "m6rec_jax").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    here = {path.relative_to(ROOT).as_posix() for path in package}
    configs = {f"m6rec_jax/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert "m6rec_jax/configs/sweep/quality.yaml" in configs
    assert any(name.endswith(".html.j2") for name in here)
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == here | configs


def test_the_command_is_m6rec(wheel):
    assert "m6rec = m6rec_jax.cli:main" in text(wheel, "/entry_points.txt")


def test_its_metadata_names_the_version_and_every_extra(wheel):
    facts = Parser().parsestr(text(wheel, "/METADATA"))
    assert facts["Version"] == __import__("m6rec_jax").__version__
    assert facts["Requires-Python"] == ">=3.11"
    assert {"aot", "dev", "serve", "sweep"} <= set(facts.get_all("Provides-Extra"))
