"""A run: learns, resumes to the bit, keeps its best step, and refuses what does not belong to it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from m6rec_jax.artifacts.checkpoints import best_step, load_params, manifest, step_folder, steps
from m6rec_jax.artifacts.manifest import MANIFEST, write_manifest
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.artifacts.schemas import CHECKPOINT
from m6rec_jax.config import (  # fmt: skip
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    MixtureConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from m6rec_jax.data.prepare import prepare
from m6rec_jax.errors import InputError
from m6rec_jax.model.load import Blueprint
from m6rec_jax.training.metrics import read_rows
from m6rec_jax.training.run import train
from tests.fixtures import tiny, tiny_card, tiny_dataset, tiny_levels, tiny_root, tiny_tables  # noqa: F401

CONFIG = Config(
    model=ModelConfig(layers=1, width=16, heads=2),
    optim=OptimConfig(learning_rate=0.02, warmup=2),
    data=DataConfig(length=64, rows=4, block=512),
    checkpoint=CheckpointConfig(every=5, keep=2),
    train=TrainConfig(steps=20, log_every=5, eval_every=10),
)


def some_score(blueprint, dataset, length):
    """An evaluator whose best step is the first validation."""
    scores = iter((0.5, 0.3, 0.2, 0.1))
    return lambda params: {"ndcg@10": next(scores)}


def bytes_of(run, step):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(params_of(run, step))]


def params_of(run, step):
    run_ = read_run(run)
    return load_params(run, step, Blueprint(run_.config.model, run_.vocab, run_.content_width).shapes())[1]


def optimizer_of(run, step):
    """What only training needs, from the checkpoint itself."""
    return jax.tree.map(np.asarray, ocp.load_checkpointables(step_folder(run, step), {"optimizer": None})["optimizer"])


def optimizer_files(run, step):
    return [x.tobytes() for x in jax.tree.leaves(optimizer_of(run, step))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_dataset):  # noqa: F811
    """An undisturbed run of 20 steps."""
    return train(CONFIG, [tiny_dataset], tmp_path_factory.mktemp("runs") / "whole", make_evaluator=some_score)


@pytest.mark.smoke
def test_every_task_learns_and_is_logged(whole):
    rows = [row for row in read_rows(whole) if "loss" in row]
    first, last = rows[0], rows[-1]
    # A task with few targets may be absent from a row, and its noise is as large as 20 steps of learning.
    compared = [t for t in CONFIG.mixture.tasks if t != "text-to-codes" and {f"loss/{t}"} <= set(first) & set(last)]
    assert len(compared) >= 4
    for task in compared:
        assert last[f"loss/{task}"] < 0.95 * first[f"loss/{task}"], task
    assert {"tokens_per_s", "padding", "step_seconds", "grad_norm", "learning_rate"} <= set(last)
    assert last["padding"] < 0.08
    valid = [row for row in read_rows(whole) if "valid/ndcg@10" in row]
    assert [row["step"] for row in valid] == [10, 20]
    assert "valid/unigram/next-item" in valid[0]


def test_keeps_the_best_step_beside_the_newest(whole):
    assert steps(whole) == [10, 15, 20]
    assert best_step(whole) == 10
    assert manifest(whole, 10)["metrics"]["ndcg@10"] == 0.5
    assert "0.5000" in (whole / "card.md").read_text()


KILLED = """
import os, sys
from pathlib import Path
import tests.training.test_run as t
from m6rec_jax.training import loop
class Death(Exception): pass
real = loop.place_batch
left = int(sys.argv[3])
def place(mesh, batch, accumulate):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), int(sys.argv[4]))
    return real(mesh, batch, accumulate)
loop.place_batch = place
from m6rec_jax.errors import Requeue
try:
    t.train(t.CONFIG, [sys.argv[1]], Path(sys.argv[2]), make_evaluator=t.some_score)
except Requeue as e:
    print(e); sys.exit(75)
"""


def interrupted(dataset, run, at, how):
    """A process that gets signal `how` while step `at + 1` is being fed."""
    command = [sys.executable, "-c", KILLED, str(dataset), str(run), str(at), str(int(how))]
    root = Path(__file__).parents[2]
    return subprocess.run(
        command, cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )


def test_killed_at_a_random_step_and_resumed_equals_undisturbed(whole, tiny_dataset, tmp_path):  # noqa: F811
    at = int(np.random.default_rng().integers(11, 19))  # two saves have begun; under load neither may have ended
    done = interrupted(tiny_dataset, tmp_path / "run", at, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert max(steps(tmp_path / "run"), default=0) <= at
    train(CONFIG, [tiny_dataset], tmp_path / "run", make_evaluator=some_score)
    assert bytes_of(tmp_path / "run", 20) == bytes_of(whole, 20), f"killed at step {at}"
    assert optimizer_files(tmp_path / "run", 20) == optimizer_files(whole, 20)
    assert manifest(tmp_path / "run", 20)["rows"] == manifest(whole, 20)["rows"]
    losses = lambda run: [(r["step"], r["loss"]) for r in read_rows(run) if "loss" in r]  # noqa: E731
    assert losses(tmp_path / "run")[-1] == losses(whole)[-1]


def test_a_resume_lays_out_no_block_it_is_past(tiny_dataset, tmp_path, monkeypatch):  # noqa: F811
    """With small blocks, the second half of a run asks the plan for no block of the first but the sampled block 0."""
    from m6rec_jax.data.plan import Plan

    config = replace(CONFIG, data=replace(CONFIG.data, block=32), train=replace(CONFIG.train, eval_every=0))
    run = train(config, [tiny_dataset], tmp_path / "run")
    shutil.rmtree(step_folder(run, 20))
    asked, real = set(), Plan._lay_out
    monkeypatch.setattr(Plan, "_lay_out", lambda plan, block: asked.add(block) or real(plan, block))
    train(config, [tiny_dataset], run)
    assert steps(run)[-1] == 20
    assert min(asked - {0}) > 5


def test_a_running_mean_is_kept_and_served_and_resumes_to_the_bit(tiny_dataset, tmp_path):  # noqa: F811
    config = replace(
        CONFIG,
        optim=replace(CONFIG.optim, warmup=2, average=0.5),
        checkpoint=replace(CONFIG.checkpoint, every=1, keep=9),
        train=TrainConfig(steps=6, log_every=1, eval_every=0),
    )
    run = train(config, [tiny_dataset], tmp_path / "run")
    served = [jax.tree.map(np.asarray, params_of(run, step)) for step in range(1, 7)]
    trained = [optimizer_of(run, step)["trained"] for step in range(1, 7)]
    for i in range(1, 6):
        decay = min(0.5, (1 + i) / (10 + i))
        mean = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, served[i - 1], trained[i])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), served[i], mean)
    assert max(abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (served[5], trained[5])), strict=True)) > 1e-5
    before = bytes_of(run, 6), optimizer_files(run, 6)
    for step in (4, 5, 6):
        shutil.rmtree(step_folder(run, step))
    train(config, [tiny_dataset], run)
    assert (bytes_of(run, 6), optimizer_files(run, 6)) == before


def test_sigterm_saves_this_very_step_and_asks_to_be_requeued(tiny_dataset, tmp_path):  # noqa: F811
    done = interrupted(tiny_dataset, tmp_path / "run", 7, signal.SIGTERM)
    assert done.returncode == 75, done.stderr
    assert max(steps(tmp_path / "run")) == 8
    assert "step 8" in done.stdout


def test_accumulation_sums_to_the_same_step(tiny_dataset, tmp_path):  # noqa: F811
    still = replace(CONFIG.model, dropout=0.0, embed_dropout=0.0, id_dropout=0.0)
    losses = []
    for accumulate in (1, 4):
        config = replace(
            CONFIG, model=still, train=TrainConfig(steps=5, log_every=1, eval_every=0, accumulate=accumulate)
        )
        run = train(config, [tiny_dataset], tmp_path / str(accumulate))
        losses.append([row["loss"] for row in read_rows(run) if "loss" in row])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_patience_stops_early(tiny_dataset, tmp_path):  # noqa: F811
    config = replace(CONFIG, train=replace(CONFIG.train, steps=40, eval_every=5, patience=2))
    scores = iter((0.5, 0.3, 0.2))
    run = train(
        config, [tiny_dataset], tmp_path / "run", make_evaluator=lambda *_: lambda params: {"ndcg@10": next(scores)}
    )
    assert steps(run)[-1] == 15
    assert best_step(run) == 5
    before = (run / "metrics.jsonl").read_text()
    train(config, [tiny_dataset], run, make_evaluator=lambda *_: lambda params: {"ndcg@10": 0.9})
    assert steps(run) == [5, 10, 15] and (run / "metrics.jsonl").read_text() == before


def copy(whole, to):
    return Path(shutil.copytree(whole, to))


def test_a_flipped_bit_is_noticed_and_the_step_before_it_taken(whole, tmp_path, capsys, tiny_dataset):  # noqa: F811
    run = copy(whole, tmp_path / "run")
    good = bytes_of(run, 15)
    files = manifest(run, 20)["files"]
    name = max((n for n in files if n.startswith("params/")), key=lambda n: files[n]["bytes"])
    path = step_folder(run, 20) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert bytes_of(run, "latest") == good
    assert "checkpoint 20 is damaged" in capsys.readouterr().err
    train(CONFIG, [tiny_dataset], run, make_evaluator=lambda *_: lambda params: {})
    assert bytes_of(run, 20) == bytes_of(whole, 20)


def test_what_orbax_restores_wrong_is_noticed_though_the_files_are_as_they_were_written(whole, tmp_path, capsys, tiny_dataset):  # fmt: skip # noqa: F811
    """Bits that flipped before the files were digested: only the digests of arrays can know."""
    run = copy(whole, tmp_path / "run")
    folder, good = step_folder(run, 20), bytes_of(run, 15)
    state = jax.tree.map(np.array, ocp.load_checkpointables(folder, {"params": None, "optimizer": None, "data": None}))
    state["params"]["block"]["query"].reshape(-1).view(np.uint32)[7] ^= 1 << 3
    said = manifest(run, 20)
    shutil.rmtree(folder)
    ocp.save_checkpointables(folder, state)
    body = {name: said[name] for name in ("step", "rows", "metrics", "shapes", "content")}
    write_manifest(folder, *CHECKPOINT, body, [path for path in folder.rglob("*") if path.is_file()])
    assert bytes_of(run, "latest") == good
    assert "params['block']['query'] does not hold what was saved" in capsys.readouterr().err
    train(CONFIG, [tiny_dataset], run, make_evaluator=lambda *_: lambda params: {})
    assert "checkpoint 20 is damaged" in capsys.readouterr().err and bytes_of(run, 20) == bytes_of(whole, 20)


@pytest.mark.parametrize("how", ["flip", "cut", "seal"])
def test_a_damaged_manifest_is_one_damaged_step(whole, tmp_path, capsys, tiny_dataset, how):  # noqa: F811
    run = copy(whole, tmp_path / "run")
    path = step_folder(run, 20) / MANIFEST
    text = path.read_text()
    changed = {
        "flip": text.replace('"rows": 80', '"rows": 81'),
        "cut": text[:-40],
        "seal": text.replace("seal", "sEal"),
    }
    assert changed[how] != text
    path.write_text(changed[how])
    assert best_step(run) == 10  # and none of the others is lost with it
    train(CONFIG, [tiny_dataset], run, make_evaluator=lambda *_: lambda params: {})
    assert "checkpoint 20 is damaged" in capsys.readouterr().err and bytes_of(run, 20) == bytes_of(whole, 20)


def test_taken_up_with_another_figure_the_best_is_that_of_the_checkpoints_still_kept(whole, tmp_path, capsys, tiny_dataset):  # fmt: skip # noqa: F811
    run = copy(whole, tmp_path / "run")
    config = replace(CONFIG, train=replace(CONFIG.train, best="loss/next-item"))
    train(config, [tiny_dataset], run, make_evaluator=lambda *_: lambda params: {})  # nothing is left to train
    losses = {step: manifest(run, step)["metrics"]["loss/next-item"] for step in (10, 20)}
    step = min(losses, key=lambda step: losses[step])
    assert best_step(run) == step != best_step(whole) == 10
    said = capsys.readouterr().err
    assert "train.best was ndcg@10 and is loss/next-item now" in said
    assert f"best step {step}, validation loss/next-item {losses[step]:.4f}" in said
    assert f"Best checkpoint by loss/next-item: step {step}" in (run / "card.md").read_text()
    assert read_run(run).config.train.best == "loss/next-item" and bytes_of(run, "best") == bytes_of(whole, step)


def test_half_written_steps_are_swept(whole, tmp_path, tiny_dataset):  # noqa: F811
    run = copy(whole, tmp_path / "run")
    (step_folder(run, 20) / MANIFEST).unlink()
    assert steps(run)[-1] == 15
    train(CONFIG, [tiny_dataset], run, make_evaluator=lambda *_: lambda params: {})
    assert bytes_of(run, 20) == bytes_of(whole, 20)


def test_a_full_disk_leaves_the_last_checkpoint_good(whole, tmp_path, tiny_dataset):  # noqa: F811
    """No file may grow past 16 kB: saving fails for real, in one line, and step 15 can still be loaded."""
    run = copy(whole, tmp_path / "run")
    shutil.rmtree(step_folder(run, 20))
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nimport tests.training.test_run as t\n"
        "from m6rec_jax.training import checkpoint\nreal = checkpoint.ocp.save_checkpointables_async\n"
        "def save(*a, **k):\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (16000, 16000))\n"
        "    return real(*a, **k)\n"
        "checkpoint.ocp.save_checkpointables_async = save\n"
        "try:\n    t.train(t.CONFIG, [sys.argv[1]], Path(sys.argv[2]))\n"
        "except t.InputError as e:\n    print('ERROR', e); sys.exit(2)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_dataset), str(run)],
        cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert "saving failed" in done.stdout and "resumes from step 15" in done.stdout
    assert steps(run) == [10, 15]
    assert bytes_of(run, 15) == bytes_of(whole, 15)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mesh": MeshConfig(data=3)}, "mesh data=3 .* needs 3 devices and there are 1"),
        ({"mesh": MeshConfig(tensor=2)}, "2 does not divide the 1 devices"),
        ({"model": replace(CONFIG.model, width=32)}, "model.width was 16 and is 32 now"),
        ({"mixture": MixtureConfig({"next-item": 1.0})}, "mixture.tasks was"),
        ({"train": replace(CONFIG.train, seed=9)}, "train.seed was 0, now 9"),
    ],
)
def test_a_run_refuses_what_does_not_fit(whole, tmp_path, tiny_dataset, change, message):  # noqa: F811
    run = copy(whole, tmp_path / "run")
    with pytest.raises(InputError, match=message):
        train(replace(CONFIG, **change), [tiny_dataset], run)
    assert steps(run) == [10, 15, 20]


def test_a_run_goes_on_where_another_code_attends(whole, tmp_path, tiny_dataset):  # noqa: F811
    run = copy(whole, tmp_path / "run")
    train(replace(CONFIG, model=replace(CONFIG.model, attention="xla")), [tiny_dataset], run)
    with pytest.raises(InputError, match="model.dtype was 'float32' and is 'bfloat16' now"):
        train(replace(CONFIG, model=replace(CONFIG.model, dtype="bfloat16")), [tiny_dataset], run)


def test_a_run_refuses_a_changed_dataset_and_a_folder_that_is_no_run(whole, tmp_path, tiny_dataset, tiny_levels):  # noqa: F811
    run = copy(whole, tmp_path / "run")
    with pytest.raises(InputError, match="another tokenizer.*--like"):
        train(CONFIG, [tiny_levels], run)
    tables = tiny_tables()
    tables["events"] = tables["events"][:-1]  # one event fewer, the same texts
    changed = prepare(tiny_card(tables), tmp_path / "changed", vocab_size=640, codebook=16).path
    with pytest.raises(InputError, match="digest .* resume on the same dataset, or start a new --run with --init-from"):
        train(CONFIG, [changed], run)
    assert steps(run) == [10, 15, 20]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(InputError, match="not empty and not a run"):
        train(CONFIG, [tiny_dataset], tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"


def test_a_checkpoint_of_another_shape_is_refused_by_name(whole):
    run = read_run(whole)
    other = Blueprint(replace(run.config.model, width=32, heads=2), run.vocab, run.content_width)
    with pytest.raises(InputError, match="params.*16.* there and .*32.* in this model"):
        load_params(whole, "best", other.shapes())


def test_a_run_named_by_a_relative_path_saves_too(tiny_dataset, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, train=TrainConfig(steps=2, eval_every=0), optim=OptimConfig(warmup=1))
    train(config, [tiny_dataset], Path("runs/here"))
    assert steps("runs/here") == [2]
    assert len(bytes_of("runs/here", 2))


def test_init_from_lends_text_layers_and_items_by_id(whole, tmp_path, tiny):  # noqa: F811
    """The catalogue turned round: every item finds its own row again."""
    tables = tiny_tables()
    tables["items"] = tables["items"].reverse()
    turned = prepare(tiny_card(tables), tmp_path / "turned", vocab_size=640, codebook=16)
    config = replace(CONFIG, train=TrainConfig(steps=3, eval_every=0), optim=OptimConfig(learning_rate=1e-9, warmup=1))
    run = train(config, [turned.path], tmp_path / "run", init_from=whole)
    old, lent = params_of(whole, "best"), params_of(run, 3)
    np.testing.assert_allclose(lent["block"]["query"], old["block"]["query"], atol=1e-6)
    np.testing.assert_allclose(lent["embeddings"]["tables"]["text"], old["embeddings"]["tables"]["text"], atol=1e-6)
    for item in ("item-0", "item-17", "item-55"):
        here, there = turned.row_of(item), tiny.row_of(item)
        assert here != there
        tables = (lent["embeddings"]["tables"]["level1"][here], old["embeddings"]["tables"]["level1"][there])
        np.testing.assert_allclose(*tables, atol=1e-6)


def test_one_trainer_a_run(whole, tmp_path, tiny_dataset):  # noqa: F811
    from m6rec_jax.training.run import _lock

    run = copy(whole, tmp_path / "run")
    with _lock(run), pytest.raises(InputError, match=f"process {os.getpid()} on .* is training it"):
        train(CONFIG, [tiny_dataset], run)
    train(CONFIG, [tiny_dataset], run)  # the lock went with its holder


def test_metrics_rows_are_not_doubled_by_a_resume(tmp_path):
    from m6rec_jax.training.metrics import MetricsLog

    log = MetricsLog(tmp_path, 0)
    for step in (5, 10, 15):
        log.write({"step": step, "loss": 1.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 16, "lo')
    log = MetricsLog(tmp_path, 10)
    log.write({"step": 15, "loss": 2.0})
    log.close()
    assert [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 5, "loss": 1.0}, {"step": 10, "loss": 1.0}, {"step": 15, "loss": 2.0},
    ]  # fmt: skip
