"""run.json: what is written is read back, and every kind of wrong folder is one line that names the file."""

import json

import pytest

from m6rec_jax.artifacts.manifest import verify_files
from m6rec_jax.artifacts.run import RUN_FILE, Run, TrainedOn, code_version, read_run, read_run_file, write_run
from m6rec_jax.config import Config, ModelConfig
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import Vocab


@pytest.fixture
def run(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "config.yaml").write_text("model: {layers: 3}\n")
    manifest = {"name": "shop", "levels": 1, "timed": True, "card": {"key": "not for a run"}}
    made = Run(
        tmp_path,
        Config(model=ModelConfig(layers=3)),
        Vocab(300, (17, 256)),
        64,
        (TrainedOn.of("data/shop", "abc", manifest),),
        "def",
        code_version(),
    )
    write_run(made)
    return made


def test_what_is_written_is_read_back(run):
    assert read_run(run.path) == run
    assert "card" not in run.datasets[0].summary


def test_the_served_layout_is_recorded_and_older_runs_have_the_only_one(run):
    body = read_run_file(run.path)
    assert body["layout"] == "causal"
    del body["layout"]
    (run.path / RUN_FILE).write_text(json.dumps(body))
    assert read_run(run.path) == run


def test_static_files_are_digested(run):
    files = read_run_file(run.path)["files"]
    assert sorted(files) == ["config.yaml", "tokenizer.model"]
    assert verify_files(run.path, files) == []
    (run.path / "tokenizer.model").write_bytes(b"piecez")
    assert "tokenizer.model" in verify_files(run.path, files)[0]


def rewrite(run, **changes):
    body = json.loads((run.path / RUN_FILE).read_text())
    (run.path / RUN_FILE).write_text(json.dumps({**body, **changes}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run.path / RUN_FILE).unlink(), "not a run"),
        (lambda run: (run.path / RUN_FILE).write_text("{"), "not readable as JSON"),
        (lambda run: (run.path / RUN_FILE).write_text("[]"), "no object"),
        (lambda run: rewrite(run, version=9), "version 9"),
        (lambda run: rewrite(run, schema="dataset"), "'dataset'"),
        (lambda run: rewrite(run, vocab={}), "damaged"),
        (lambda run: rewrite(run, config={"model": {"depth": 3}}), "model.depth"),
        (lambda run: rewrite(run, layout="masked"), "layout='masked'"),
    ],
)
def test_a_wrong_folder_is_one_line_that_names_the_file(run, spoil, says):
    spoil(run)
    with pytest.raises(InputError) as caught:
        read_run(run.path)
    line = str(caught.value)
    assert says in line and str(run.path) in line and "\n" not in line


def test_a_missing_folder_names_itself(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_run(tmp_path / "nowhere")
