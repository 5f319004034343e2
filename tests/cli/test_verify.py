"""`m6rec verify`: whole artefacts pass, and every kind of damage is found, file by file, without a model."""

import json

import jax.numpy as jnp
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from m6rec_jax.artifacts.checkpoints import step_folder
from m6rec_jax.artifacts.content import content, digests
from m6rec_jax.artifacts.manifest import write_manifest
from m6rec_jax.artifacts.run import Run, write_run
from m6rec_jax.artifacts.schemas import CHECKPOINT, DATASET
from m6rec_jax.cli import SUCCESS, WRONG_INPUT, main
from m6rec_jax.config import Config
from m6rec_jax.vocab import Vocab


def folder_of(path, schema, files):
    for name, held in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(held)
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
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


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
    assert str(run / "config.yaml") in last and "(2 wrong of 5 files)" in last


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


def saved(path, damage):
    """A run with one checkpoint, whose manifest tells of arrays that `damage` has not touched."""
    path.mkdir()
    (path / "config.yaml").write_text("{}\n")
    write_run(Run(path, Config(), Vocab(300, (9,)), 8, (), "t", "0"))
    params = {"block": {"w": jnp.arange(12.0).reshape(3, 4)}}
    optimizer = {"moments": (optax.ScaleByAdamState(jnp.zeros((), jnp.int32), params, params),), "step": jnp.array(3)}
    said = {"params": digests(content(params)), "optimizer": digests(content(optimizer))}
    parts = {"params": params, "optimizer": optimizer, "data": {"rows": 3}}
    folder = step_folder(path, 20)
    ocp.save_checkpointables(folder, damage(parts))
    write_manifest(folder, *CHECKPOINT, {"content": said}, [p for p in folder.rglob("*") if p.is_file()])
    return path


def test_arrays_that_were_wrong_before_their_files_are_found(tmp_path, capsys):
    whole = saved(tmp_path / "whole", lambda parts: parts)
    assert main(["verify", str(whole), "--arrays"]) == SUCCESS
    assert "the arrays of 1 checkpoints are as they were written" in capsys.readouterr().out

    def flipped(parts):
        moments = parts["optimizer"]["moments"][0]
        wrong = moments._replace(nu={"block": {"w": moments.nu["block"]["w"].at[2, 1].add(1e-6)}})
        return {**parts, "optimizer": {**parts["optimizer"], "moments": (wrong,)}}

    bad = saved(tmp_path / "bad", flipped)
    assert main(["verify", str(bad)]) == SUCCESS  # the files are as they were written
    capsys.readouterr()
    assert main(["verify", str(bad), "--arrays"]) == WRONG_INPUT
    captured = capsys.readouterr()
    assert captured.out == f"{bad}/checkpoints/20: optimizer['moments'][0].nu['block']['w'] does not hold what was saved (its digest differs)\n"  # fmt: skip
    assert "(1 wrong of the arrays of 1 checkpoints)" in captured.err


def test_arrays_are_asked_for_of_checkpoints_alone(dataset, capsys):
    assert main(["verify", str(dataset), "--arrays"]) == WRONG_INPUT
    assert "holds no checkpoint" in capsys.readouterr().err
