"""`m6rec tune` from the command line: a tiny run, its tasks, artefacts that are verified, served and refused."""

import json

import numpy as np
import polars as pl
import pytest

from m6rec_jax.artifacts.tuned import TENSORS, read_tuned
from m6rec_jax.cli import SUCCESS, WRONG_INPUT, main
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.instances import read_instances
from m6rec_jax.data.prepare import prepare
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.metrics.options import of_options
from m6rec_jax.recommend.tuned import open_tuned
from m6rec_jax.settings import load_config
from m6rec_jax.training.run import train
from tests.fixtures import tiny_card

SMALL = [
    "--model.layers=2",
    "--model.width=32",
    "--data.rows=4",
    "--data.length=64",
    "--optim.warmup=1",
    "--train.steps=3",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dataset with a task of three topics and one of texts, and a run of three steps on it."""
    root = tmp_path_factory.mktemp("tuned")
    n = 120
    number = np.arange(n)
    things = np.array(["red shoes", "coffee mug", "piano book"])[number % 3]
    table = pl.DataFrame({"text": [f"{thing} of day {i}" for thing, i in zip(things, number, strict=True)],
                          "topic": np.array(["wear", "drink", "play"])[number % 3], "summary": things})  # fmt: skip
    tasks = {
        "topic": {"path": table, "fields": {"item": "text"}, "target": "topic", "valid": 0.2, "test": 0.1},
        "summarise": {"path": table, "fields": {"item": "text"}, "target": "summary", "valid": 0.2, "test": 0.1},
    }
    data = prepare(tiny_card(tasks=tasks), root / "data", levels=1, codebook=16, vocab_size=640).path
    train(load_config(["demo"], SMALL), [data], root / "run")
    return root, data, root / "run"


def tune(world, name, *more, task="topic", method="option-adapter"):
    root, data, run = world
    argv = ["tune", "--run", str(run), "--dataset", str(data), "--task", task, "--method", method]
    return main([*argv, "--out", str(root / name), "--epochs=4", "--rows=16", "--dropout=0", *more])


def test_an_artefact_is_tuned_verified_and_served(world, capsys):
    root, data, run = world
    assert tune(world, "topic") == SUCCESS
    captured = capsys.readouterr()
    assert "topic by option-adapter; validation accuracy" in captured.out
    made = read_tuned(root / "topic")
    assert sorted(made.options) == ["drink", "play", "wear"]
    assert {"config.yaml", "card.md", "metrics.jsonl", "manifest.json", TENSORS} <= {p.name for p in (root / "topic").iterdir()}  # fmt: skip
    assert tune(world, "topic") == SUCCESS
    assert "tuned already" in capsys.readouterr().err
    assert main(["verify", str(root / "topic")]) == SUCCESS

    assert tune(world, "by-lora", "--rank=3", method="lora") == SUCCESS
    held_out = read_instances(open_dataset(data), "topic", "valid")
    prompts = [(one.source, one.source_rows) for one in held_out.laid_out(64)]
    for name in ("topic", "by-lora"):
        server = open_tuned(run, [root / name], data)
        logp = np.stack(server.score(["topic"] * len(prompts), prompts))
        figures = of_options(held_out.labels, logp)
        validated = read_tuned(root / name).metrics
        assert figures | {"loss": validated["loss"]} == pytest.approx(validated, abs=1e-5)

    (root / "topic" / TENSORS).write_bytes((root / "topic" / TENSORS).read_bytes()[:-4] + b"abcd")
    assert main(["verify", str(root / "topic")]) == WRONG_INPUT
    with pytest.raises(InputError, match="not those that were written"):
        open_tuned(run, [root / "topic"], data)


def test_a_text_task_is_tuned(world, capsys):
    root, *_ = world
    assert tune(world, "texts", task="summarise", method="prompt") == SUCCESS
    rows = [json.loads(line) for line in (root / "texts" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["valid/loss"] for row in rows if "valid/loss" in row]
    assert min(losses) < losses[0]
    assert read_tuned(root / "texts").options == []


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--method=prefix"], "--method prefix: unknown; one of prompt, option"),
        (["--task=topics"], "task topics: "),
        (["--layers=keep=7"], "layers keep=7: the backbone has layers 0 to 1"),
        (["--prompts=2"], "prompts=2: fewer than the 3 options"),
        (["--rank=-1"], "rank=-1"),
        (["--epochs=0"], "tune.epochs=0"),
        (["--seed=4"], "settings.seed was 0 and is 4 now"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(world, capsys, more, says):
    root, *_ = world
    if "--seed=4" in more:
        assert tune(world, "seeded", "--epochs=1") == SUCCESS
        capsys.readouterr()
        more = [*more, "--epochs=1"]
    assert tune(world, "seeded" if "--seed=4" in more else "never", *more) == WRONG_INPUT
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (root / "never").exists()
