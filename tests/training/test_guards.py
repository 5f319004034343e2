"""Guards of training: bad gradients, spikes, damaged records, hangs; where the time went, and traces."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.artifacts.checkpoints import manifest, steps
from m6rec_jax.config import TrainConfig
from m6rec_jax.data.records import SUFFIX, BadRecords, RecordReader
from m6rec_jax.errors import InputError
from m6rec_jax.training import guards
from m6rec_jax.training.goodput import Ledger, totals
from m6rec_jax.training.guards import NEW, Rewind, SpikeWatch, judge, past_holes, rewind_of
from m6rec_jax.training.metrics import read_rows
from m6rec_jax.training.run import train
from m6rec_jax.training.straggler import slow_processes
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401
from tests.training.test_run import CONFIG, bytes_of

SHORT = replace(CONFIG, train=TrainConfig(steps=6, log_every=1, eval_every=0))


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


def test_the_guard_changes_no_bit_where_it_does_not_fire(tiny_dataset, tmp_path):  # noqa: F811
    runs = [train(replace(SHORT, train=replace(SHORT.train, explode=e)), [tiny_dataset], tmp_path / f"{e}") for e in (0.0, 100.0)]  # fmt: skip
    assert bytes_of(runs[0], 6) == bytes_of(runs[1], 6)
    assert read_rows(runs[1])[-2]["skipped"] == 0


def test_skips_in_a_row_stop_the_run_and_nothing_of_them_is_saved(tiny_dataset, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(guards, "SETTLED", 3)
    config = replace(
        CONFIG,
        checkpoint=replace(CONFIG.checkpoint, every=1, keep=9),
        train=TrainConfig(steps=20, log_every=1, eval_every=1, explode=1.0001, max_skips=3),
    )
    real = guards.judge

    def judged(guard, norm, counted, explode):  # from step 4 on every gradient is far too large
        return real(guard, jnp.where(counted >= 3, norm * 1e6, norm), counted, explode)

    monkeypatch.setattr("m6rec_jax.training.step.judge", judged)
    with pytest.raises(
        InputError, match="train.max_skips=3: the gradient of 3 steps in a row, the last of them step 6"
    ):
        train(config, [tiny_dataset], tmp_path / "run")
    assert steps(tmp_path / "run") == [1, 2, 3]


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


def test_a_run_goes_back_before_a_spike_and_past_its_rows(tiny_dataset, tmp_path, monkeypatch):  # noqa: F811
    """The losses that the watch sees at rows 40 to 59 are those of a spike."""
    monkeypatch.setattr(guards, "WINDOW", 12)
    real = SpikeWatch.see
    monkeypatch.setattr(SpikeWatch, "see", lambda self, step, row, loss: real(self, step, row, 99.0 if 40 <= row < 60 else 3.0))  # fmt: skip
    config = replace(CONFIG, train=TrainConfig(steps=20, log_every=5, eval_every=0, spike=50.0))
    run = train(config, [tiny_dataset], tmp_path / "run")
    assert [(one.to, one.last, one.first_row) for one in guards.read_rewinds(run)] == [(10, 15, 40)]
    end = guards.read_rewinds(run)[0].end_row
    assert manifest(run, 20)["rows"] == 20 * 4 + end - 40
    assert [row["rewind/first_row"] for row in read_rows(run) if "rewind/to" in row] == [40]
    assert bytes_of(run, 20)
    before = bytes_of(run, 20)
    import shutil

    shutil.rmtree(run / "checkpoints" / "20")  # taken up again from 15, the hole behind it
    train(config, [tiny_dataset], run)
    assert bytes_of(run, 20) == before


def damaged(dataset, to, record=3):
    """A copy of a dataset whose training record has one byte changed."""
    import shutil

    shutil.copytree(dataset, to)
    path = sorted(to.glob(f"train-*{SUFFIX}"))[0]
    data = bytearray(path.read_bytes())
    from m6rec_jax.data.records import encode

    blob = encode(RecordReader([path])[record])
    at = bytes(data).index(blob)
    data[at] ^= 0xFF
    path.write_bytes(data)
    return path


def test_damaged_records_are_left_out_up_to_a_cap(tiny_dataset, tmp_path, capsys):  # noqa: F811
    path = damaged(tiny_dataset, tmp_path / "data")
    config = replace(CONFIG, train=TrainConfig(steps=6, log_every=1, eval_every=0))
    with pytest.raises(InputError, match=rf"{path.name}: damaged at record 3 .*data.bad_records"):
        train(config, [tmp_path / "data"], tmp_path / "strict")
    lenient = replace(config, data=replace(config.data, bad_records=1))
    run = train(lenient, [tmp_path / "data"], tmp_path / "lenient")
    assert "record 3 is damaged and left out (1 of at most 1)" in capsys.readouterr().err
    assert [row["bad_records"] for row in read_rows(run) if "loss" in row][-1] == 1
    assert bytes_of(run, 6) == bytes_of(train(lenient, [tmp_path / "data"], tmp_path / "again"), 6)
    bad = BadRecords(1)
    reader = RecordReader([path], bad)
    assert reader.take([3])[0] is None and reader.take([3, 2])[1].row == reader[2].row and len(bad) == 1


HANGS = """
import sys, time
from dataclasses import replace
from pathlib import Path
import tests.training.test_run as t
train = replace(t.CONFIG.train, steps=4, eval_every=2, hang_seconds=float(sys.argv[3]))
def stuck(*_):
    return lambda params: time.sleep(600)
t.train(replace(t.CONFIG, train=train), [sys.argv[1]], Path(sys.argv[2]), make_evaluator=stuck)
"""


def test_a_hang_ends_with_the_stacks_and_a_code_that_queues_again(tiny_dataset, tmp_path):  # noqa: F811
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", HANGS, str(tiny_dataset), str(tmp_path / "run"), "8"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}, timeout=150)  # fmt: skip
    assert done.returncode == 75, done.stderr
    stacks = (tmp_path / "run" / "hang-0.txt").read_text()
    assert "in stuck" in stacks or "<lambda>" in stacks
    assert "hangs: nothing ended for 8 s" in done.stderr and "after step 2" in done.stderr


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


def test_a_run_logs_where_its_time_went_and_traces_steps(tiny_dataset, tmp_path, capsys):  # noqa: F811
    import time

    config = replace(SHORT, train=replace(SHORT.train, profile="3:5"))
    begun = time.perf_counter()
    run = train(config, [tiny_dataset], tmp_path / "run")
    wall = time.perf_counter() - begun
    found = totals(run)
    assert 0.8 * wall < sum(found.values()) <= wall
    assert min(found[kind] for kind in ("init", "compile", "step", "validate", "save")) > 0
    assert "goodput" in [row for row in read_rows(run) if "loss" in row][-1]
    assert "goodput " in capsys.readouterr().err
    assert list((run / "profile" / "3").rglob("*.xplane.pb"))
