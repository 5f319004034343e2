"""`m6rec doctor`: versions, devices, extras; nothing that should not be pasted into a report."""

import tomllib
from pathlib import Path

import pytest

from m6rec_jax.cli import SUCCESS, doctor, main

ROOT = Path(__file__).parents[2]


def test_it_names_versions_devices_and_memory(capsys):
    assert main(["doctor"]) == SUCCESS
    said = capsys.readouterr().out
    for word in ("m6rec", "python", *doctor.VERSIONS, "cores", "memory", "disk free here", "devices"):
        assert any(line.startswith(word) for line in said.splitlines()), word


def test_it_tells_nothing_of_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("PIP_INDEX_URL", "https://user:hunter2@index.example/simple")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert main(["doctor"]) == SUCCESS
    said = capsys.readouterr().out
    assert "hunter2" not in said and "://" not in said


def test_a_broken_backend_is_one_line(monkeypatch):
    import jax

    def broken():
        raise RuntimeError("no driver\nfound")

    monkeypatch.setattr(jax, "devices", broken)
    assert doctor.devices() == ["devices           none: no driver found"]


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="not in a checkout")
def test_every_extra_says_what_it_is_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == set(doctor.PURPOSE)
