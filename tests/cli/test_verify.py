"""`m6rec verify`: whole artefacts pass, and every kind of damage is found, file by file, without a model."""

import json

import pytest

from m6rec_jax.artifacts.manifest import write_manifest
from m6rec_jax.artifacts.run import Run, write_run
from m6rec_jax.artifacts.schemas import CHECKPOINT, DATASET
from m6rec_jax.cli import SUCCESS, WRONG_INPUT, main
from m6rec_jax.config import Config
from m6rec_jax.vocab import Vocab


def folder_of(path, schema, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    write_manifest(path, schema.name, schema.version, {}, [path / name for name in files])
    return path


@pytest.fixture
def dataset(tmp_path):
    return folder_of(tmp_path / "data", DATASET, {"items.parquet": b"i" * 5000, "codes.npz": b"c" * 70})


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("{}\n")
    write_run(Run(path, Config(), Vocab(300, (9,)), 8, (), "t", "0"))
    for step in (20, 100):
        folder_of(path / "checkpoints" / str(step), CHECKPOINT, {"params/a": b"a" * 90, "data/b": b"b"})
    return path


def test_whole_artefacts_pass(dataset, run, capsys):
    assert main(["verify", str(dataset)]) == SUCCESS
    assert capsys.readouterr().out == f"{dataset}: 2 files are as they were written\n"
    assert main(["verify", str(run)]) == SUCCESS
    assert "5 files" in capsys.readouterr().out
    assert main(["verify", str(run / "checkpoints" / "20")]) == SUCCESS
    assert "2 files" in capsys.readouterr().out


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (flip, "its bytes are not those that were written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "89 bytes, 90 were written"),
        (lambda path: path.unlink(), "missing"),
    ],
)
def test_damage_is_named_and_ends_with_2(run, spoil, says, capsys):
    spoil(run / "checkpoints" / "100" / "params" / "a")
    (run / "config.yaml").write_text("{ }\n")
    assert main(["verify", str(run)]) == WRONG_INPUT
    captured = capsys.readouterr()
    assert says in captured.out and str(run / "checkpoints" / "100" / "params" / "a") in captured.out
    assert len(captured.out.splitlines()) == 2
    last = captured.err.splitlines()[-1]
    assert str(run / "config.yaml") in last and "(2 of 5 files wrong)" in last


def test_an_unfinished_save_is_mentioned_but_no_damage(run, capsys):
    (run / "checkpoints" / "200").mkdir()
    assert main(["verify", str(run)]) == SUCCESS
    assert "200: a save that was never finished" in capsys.readouterr().err


def test_other_folders_and_other_versions_are_refused(dataset, tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == WRONG_INPUT
    assert "neither a dataset" in capsys.readouterr().err
    body = json.loads((dataset / "manifest.json").read_text())
    (dataset / "manifest.json").write_text(json.dumps({**body, "version": 99}))
    assert main(["verify", str(dataset)]) == WRONG_INPUT
    assert "version 99" in capsys.readouterr().err
