"""Guards of training: bad gradients, spikes, damaged records, hangs; where the time went, and traces."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m6rec_jax.artifacts.checkpoints import best_step, manifest, steps
from m6rec_jax.config import CheckpointConfig, TrainConfig
from m6rec_jax.data.packing import ROW_ARRAYS
from m6rec_jax.data.records import SUFFIX, BadRecords, RecordReader, encode
from m6rec_jax.errors import InputError, Requeue
from m6rec_jax.objectives.loss import TaskLoss
from m6rec_jax.training import guards
from m6rec_jax.training.checkpoint import CheckpointWriter, Position, restore
from m6rec_jax.training.goodput import Ledger, totals
from m6rec_jax.training.guards import NEW, Rewind, SpikeWatch, judge, past_holes, rewind_of
from m6rec_jax.training.loop import Loop, train_loop
from m6rec_jax.training.metrics import read_rows
from m6rec_jax.training.run import train
from m6rec_jax.training.sharding import make_mesh
from m6rec_jax.training.state import TrainState, abstract_state
from m6rec_jax.training.step import StepMetrics
from m6rec_jax.training.straggler import slow_processes
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401
from tests.training.test_run import CONFIG, bytes_of

STEPS = 24  # the gradient is compared with the usual one in the last of them; one length: one compiled program
GUARDED = TrainConfig(steps=STEPS, log_every=1, eval_every=0, spike=50.0, profile="3:5")
BARE = TrainConfig(steps=STEPS, log_every=1, eval_every=0, explode=0.0, hang_seconds=0.0)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs of one configuration share their compiled programs through files."""
    names = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")), "jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}  # fmt: skip
    old = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in old.items():
        jax.config.update(name, value)


def little(
    run: Path,
    norm: Callable[[int], float] = lambda step: 1.0,
    validate: Callable[[float], dict[str, float]] = lambda w: {},
    every: int = 1,
    keep: int = 9,
    **train,
) -> TrainState:
    """The loop around a model of one number, which each step that counts moves by 1: `norm(step)` is the gradient."""
    config = replace(
        CONFIG, train=TrainConfig(log_every=1, **train), checkpoint=CheckpointConfig(every=every, keep=keep)
    )
    run.mkdir(exist_ok=True)
    mesh = make_mesh(config.mesh)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState({"w": jnp.zeros(2)}, {"m": jnp.zeros(2)}, zero, zero, None, guards.Guard(*map(jnp.array, NEW)))
    state, position = restore(run, abstract_state(state)) or (state, Position())

    def step(state, batch, items):
        size = jnp.float32(norm(int(state.step) + 1))
        good, guard = judge(state.guard, size, state.step - state.skipped, config.train.explode)
        params, skipped = {"w": state.params["w"] + good}, state.skipped + 1 - good
        one = TaskLoss(np.ones(1), np.ones(1))
        new = TrainState(params, state.optimizer, state.step + 1, skipped, None, guard)
        return new, StepMetrics(one, size, jnp.int32(1), skipped, guard)

    batch = {name: np.zeros((4, 8), kind) for name, kind in ROW_ARRAYS.items()}
    loop = Loop(
        config, run, mesh, [("one",)], step, (), lambda *_: iter([batch] * 99), BadRecords(0), lambda row: (0, 0),
        optax.constant_schedule(0.1), lambda params: validate(float(params["w"][0])), CheckpointWriter(run, config.checkpoint), Ledger(),
    )  # fmt: skip
    return train_loop(loop, state, position.rows)


def test_a_gradient_counts_unless_not_finite_or_far_above_the_usual():
    guard, counted = NEW, 0
    for norm in [5.0] * guards.SETTLED:
        good, guard = judge(guard, jnp.float32(norm), jnp.int32(counted), 10.0)
        counted += int(good)
    assert counted == guards.SETTLED and float(guard.norm) == pytest.approx(5.0)
    for number, norm in enumerate((51.0, np.nan, np.inf), start=1):
        good, guard = judge(guard, jnp.float32(norm), jnp.int32(counted), 10.0)
        assert not good and int(guard.in_a_row) == number and float(guard.norm) == pytest.approx(5.0)
    good, guard = judge(guard, jnp.float32(49.0), jnp.int32(counted), 10.0)
    assert good and int(guard.in_a_row) == 0
    assert judge(guard, jnp.float32(1e9), jnp.int32(counted), 0.0)[0]


def test_a_spike_is_told_from_an_outlier():
    watch, rng = SpikeWatch(20.0), np.random.default_rng(0)
    for step in range(190):
        assert watch.see(step, 4 * step, 9.0 if step % 40 == 39 else 3 + 0.1 * rng.standard_normal()) is None
    found = [watch.see(200 + i, 4 * (200 + i), float("nan") if i else 9.0) for i in range(guards.LASTS)]
    assert found[:-1] == [None] * (guards.LASTS - 1)
    assert (found[-1].first, found[-1].last, found[-1].first_row) == (200, 204, 800)


def test_rows_of_a_spike_are_left_out_and_no_other():
    holes = [Rewind(5, 9, 24, 40), Rewind(5, 12, 48, 52)]
    row, used = 0, []
    for _ in range(12):
        row = past_holes(row, holes)
        used.append(row)
        row += 4
    assert used == [0, 4, 8, 12, 16, 20, 40, 44, 52, 56, 60, 64]
    spike = guards.Spike(10, 14, 40, 9.0, 3.0)
    assert rewind_of(spike, 60, [3, 8, 12], [], 1) == Rewind(8, 14, 40, 60)
    with pytest.raises(InputError, match="train.rewinds=1 rewinds are used up"):
        rewind_of(spike, 60, [8], [Rewind(8, 14, 40, 60)], 1)
    with pytest.raises(InputError, match="no checkpoint from before step 10"):
        rewind_of(spike, 60, [12], [], 1)


@pytest.fixture
def settled(monkeypatch):
    """Gradients are compared with the usual one after three of them."""
    monkeypatch.setattr(guards, "SETTLED", 3)


def test_steps_skipped_in_a_row_stop_the_run_and_nothing_of_them_is_saved(tmp_path, settled):
    def norm(step):
        return 1e6 if step >= 5 else 1.0

    with pytest.raises(InputError, match="max_skips=3: the gradient of 3 steps in a row, the last of them step 7"):
        little(tmp_path / "run", norm, lambda w: {"ndcg@10": w}, steps=20, eval_every=1, max_skips=3)
    assert steps(tmp_path / "run") == [1, 2, 3, 4] and best_step(tmp_path / "run") == 4
    assert [row["step"] for row in read_rows(tmp_path / "run") if "valid/ndcg@10" in row] == [1, 2, 3, 4]


def test_what_is_due_while_steps_are_skipped_comes_with_the_next_that_counts(tmp_path, settled):
    run = tmp_path / "run"
    state = little(run, lambda step: 1e6 if step in (5, 6) else 1.0, lambda w: {"ndcg@10": w}, steps=8, eval_every=5)
    assert steps(run) == [1, 2, 3, 4, 7, 8] and int(state.skipped) == 2
    assert [row["step"] for row in read_rows(run) if "valid/ndcg@10" in row] == [7, 8]
    little(tmp_path / "seldom", lambda step: np.nan if step in (5, 6) else 1.0, every=5, steps=9, eval_every=0)
    assert steps(tmp_path / "seldom") == [7, 9]


@pytest.mark.parametrize("sign", [False, True])
def test_a_run_that_ends_on_a_skipped_step_leaves_the_one_before(tmp_path, settled, sign, capsys):
    """By SIGTERM, or because it is the last one; the next start goes on from the step that counted."""
    run = tmp_path / "run"

    def norm(step):
        if sign and step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return np.nan if step >= 5 else 1.0

    if sign:
        with pytest.raises(Requeue, match="step 6 is not saved, .* the last one saved is step 4; the same command"):
            little(run, norm, steps=20, eval_every=0)
    else:
        little(run, norm, steps=6, eval_every=0)
        assert "step 6 is not saved" in capsys.readouterr().err
    assert steps(run) == [1, 2, 3, 4] and best_step(run) == 4
    state = little(run, steps=8, eval_every=0)
    assert float(state.params["w"][0]) == 8 and int(state.skipped) == 0 and steps(run)[-1] == 8


def test_a_checkpoint_after_which_nothing_counts_is_given_up_unless_it_was_validated(tmp_path, capsys):
    def norm(step):
        return np.nan if step >= 5 else 1.0

    with pytest.raises(InputError, match="train.max_skips=2"):
        little(tmp_path / "run", norm, lambda w: {"loss/one": w}, steps=20, eval_every=3, max_skips=2)
    assert steps(tmp_path / "run") == [1, 2, 3] and "checkpoint 4 is given up" in capsys.readouterr().err
    with pytest.raises(InputError, match="train.max_skips=2"):
        little(tmp_path / "run", lambda step: np.nan, steps=20, eval_every=3, max_skips=2)
    assert steps(tmp_path / "run") == [1, 2, 3]


def test_a_validation_that_is_no_number_makes_no_checkpoint(tmp_path):
    scores = iter(
        ({"ndcg@10": 0.1, "loss/one": 3.0}, {"ndcg@10": 0.9, "loss/one": np.nan}, {"ndcg@10": 0.2, "loss/one": 2.0})
    )
    little(tmp_path / "run", validate=lambda w: next(scores), steps=3, eval_every=1)
    assert steps(tmp_path / "run") == [1, 3] and best_step(tmp_path / "run") == 3


def test_parameters_that_overflow_are_skipped_and_no_checkpoint_of_them_is_left(tiny_dataset, tmp_path):  # noqa: F811
    """A real run: the second step sends the parameters beyond what a float can square, and every gradient after it is NaN."""
    optim = replace(CONFIG.optim, learning_rate=1e36, warmup=1)
    config = replace(
        CONFIG, optim=optim, checkpoint=CheckpointConfig(every=1, keep=9), train=TrainConfig(steps=STEPS, log_every=1, eval_every=0, max_skips=4)
    )  # fmt: skip
    with pytest.raises(InputError, match=r"train.max_skips=4: .* \(it was (nan|inf)\)"):
        train(config, [tiny_dataset], tmp_path / "run")
    rows = [row for row in read_rows(tmp_path / "run") if "loss" in row]
    counted = sum(row["skipped"] == 0 for row in rows)
    assert steps(tmp_path / "run") == list(range(1, counted)) and not np.isfinite(rows[-1]["grad_norm"])
    assert all(np.isfinite(np.frombuffer(b, np.float32)).all() for b in bytes_of(tmp_path / "run", counted - 1))


@pytest.fixture(scope="module")
def bare(compiled_once, tiny_dataset, tmp_path_factory):  # noqa: F811
    return train(replace(CONFIG, train=BARE), [tiny_dataset], tmp_path_factory.mktemp("bare") / "run")


@pytest.fixture(scope="module")
def guarded(compiled_once, tiny_dataset, tmp_path_factory):  # noqa: F811
    begun = time.perf_counter()
    run = train(replace(CONFIG, train=GUARDED), [tiny_dataset], tmp_path_factory.mktemp("guarded") / "run")
    return run, time.perf_counter() - begun


def test_guards_that_do_not_fire_change_no_bit(bare, guarded):
    assert STEPS > guards.SETTLED
    assert bytes_of(bare, STEPS) == bytes_of(guarded[0], STEPS)
    assert [row["loss"] for row in read_rows(bare) if "loss" in row] == [row["loss"] for row in read_rows(guarded[0]) if "loss" in row]  # fmt: skip
    assert all(row["skipped"] == 0 for row in read_rows(guarded[0]) if "loss" in row)


def test_a_run_logs_where_its_time_went_and_traces_steps(guarded):
    run, wall = guarded
    found = totals(run)
    assert 0.8 * wall < sum(found.values()) <= wall
    assert min(found[kind] for kind in ("init", "compile", "data wait", "step", "validate", "save")) > 0
    rows = [row for row in read_rows(run) if "loss" in row]
    assert 0 < rows[-1]["goodput"] < 1 and rows[-1]["seconds/step"] > rows[3]["seconds/step"]
    assert list((run / "profile" / "3").rglob("*.xplane.pb"))


def test_steps_are_traced_when_asked_for(tmp_path, monkeypatch):
    traced = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: traced.append(Path(folder).name))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traced.append("end"))
    monkeypatch.setattr("m6rec_jax.training.profiler.LOOK_SECONDS", 0.0)

    def norm(step):
        if step == 3:
            (tmp_path / "run" / "profile-now").touch()
        traced.append(step)
        return 1.0

    little(tmp_path / "run", norm, steps=12, eval_every=0)
    assert traced == [1, 2, 3, "4", 4, 5, 6, 7, 8, "end", 9, 10, 11, 12]
    assert not (tmp_path / "run" / "profile-now").exists()


def test_a_run_goes_back_before_a_spike_and_past_its_rows(tiny_dataset, tmp_path, monkeypatch, guarded):  # noqa: F811
    """The losses that the watch sees at rows 40 to 59 are those of a spike."""
    monkeypatch.setattr(guards, "WINDOW", 12)
    real = SpikeWatch.see
    monkeypatch.setattr(SpikeWatch, "see", lambda self, step, row, loss: real(self, step, row, 99.0 if 40 <= row < 60 else 3.0))  # fmt: skip
    config = replace(CONFIG, train=replace(GUARDED, log_every=5, profile=""))
    run = train(config, [tiny_dataset], tmp_path / "run")
    assert [(one.to, one.last, one.first_row) for one in guards.read_rewinds(run)] == [(10, 15, 40)]
    end = guards.read_rewinds(run)[0].end_row
    assert manifest(run, STEPS)["rows"] == STEPS * 4 + end - 40
    assert [row["rewind/first_row"] for row in read_rows(run) if "rewind/to" in row] == [40]
    assert totals(run)["lost"] > 0
    before = bytes_of(run, STEPS)
    assert before != bytes_of(guarded[0], STEPS)
    shutil.rmtree(run / "checkpoints" / str(STEPS))  # taken up again from 20, the hole behind it
    train(config, [tiny_dataset], run)
    assert bytes_of(run, STEPS) == before


def damaged(dataset, to, record=3):
    """A copy of a dataset whose training record has one byte changed."""
    shutil.copytree(dataset, to)
    path = sorted(to.glob(f"train-*{SUFFIX}"))[0]
    data = bytearray(path.read_bytes())
    data[bytes(data).index(encode(RecordReader([path])[record]))] ^= 0xFF
    path.write_bytes(data)
    return path


def test_damaged_records_are_left_out_up_to_a_cap(tiny_dataset, tmp_path, capsys, guarded):  # noqa: F811
    path = damaged(tiny_dataset, tmp_path / "data")
    config = replace(CONFIG, train=replace(GUARDED, profile=""))
    with pytest.raises(InputError, match=rf"{path.name}: damaged at record 3 .*data.bad_records=N"):
        train(config, [tmp_path / "data"], tmp_path / "strict")
    run = train(replace(config, data=replace(config.data, bad_records=1)), [tmp_path / "data"], tmp_path / "lenient")
    assert "record 3 is damaged and left out (1 of at most 1)" in capsys.readouterr().err
    assert [row["bad_records"] for row in read_rows(run) if "loss" in row][-1] == 1
    assert bytes_of(run, STEPS) != bytes_of(guarded[0], STEPS)
    bad = BadRecords(1)
    reader = RecordReader([path], bad)
    assert reader.take([3])[0] is None and reader.take([3, 2])[1].row == reader[2].row and len(bad) == 1


HANGS = """
import sys, time
from pathlib import Path
from tests.training.test_guards import little
def stuck(w):
    time.sleep(600)
little(Path(sys.argv[1]), validate=stuck, steps=4, eval_every=2, hang_seconds=3.0)
"""


def test_a_hang_ends_with_the_stacks_and_a_code_of_its_own(tmp_path):
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", HANGS, str(tmp_path / "run")]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}, timeout=150)  # fmt: skip
    assert done.returncode == 70, done.stderr
    assert "in stuck" in (tmp_path / "run" / "hang-0.txt").read_text() and "in stuck" in done.stderr
    assert "hangs: nothing ended for 3 s" in done.stderr and "after step 2" in done.stderr


def test_a_slow_process_is_one_whose_own_time_matters():
    assert slow_processes(np.array([0.01, 0.3]), 0.3) == [1]
    assert slow_processes(np.array([0.01, 0.01, 0.011, 0.2]), 0.3) == [3]
    assert slow_processes(np.array([0.001, 0.003]), 0.3) == []  # three times, and nothing beside the step


def test_the_seconds_of_a_run_sum_to_the_wall_and_steps_done_again_are_lost(tmp_path):
    ledger = Ledger()
    ledger.switch("step")
    ledger.switch("save")
    lines = [
        {"begun": 100.0, "first": 0, "step": 5, "seconds": dict.fromkeys(ledger.seconds, 0.0) | {"init": 1.0, "step": 5.0}},
        {"begun": 100.0, "first": 0, "step": 10, "seconds": dict.fromkeys(ledger.seconds, 0.0) | {"init": 1.0, "step": 10.0}},
        {"begun": 120.0, "first": 6, "step": 20, "seconds": dict.fromkeys(ledger.seconds, 0.0) | {"init": 2.0, "step": 14.0}},
    ]  # fmt: skip
    (tmp_path / "goodput.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"begun": 130')
    found = totals(tmp_path)
    assert found["lost"] == 4.0 and found["step"] == 20.0 and found["down"] == 9.0 and found["init"] == 3.0
    assert sum(found.values()) == 36.0  # from 100 to the end of the second start
