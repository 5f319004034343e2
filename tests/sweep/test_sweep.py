"""The sweep under way, with a stand-in for the training: real processes, real signals, a real journal."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from m6rec_jax.cli.tables import print_sweep
from m6rec_jax.config import Config, TrainConfig
from m6rec_jax.errors import InputError, Requeue
from m6rec_jax.settings import load_config
from m6rec_jax.sweep import study as under_test
from m6rec_jax.sweep.journal import distributions, locked, mend, open_study, remember
from m6rec_jax.sweep.launch import LocalLauncher, dealt
from m6rec_jax.sweep.report import best, rows, write_best, write_table
from m6rec_jax.sweep.space import Choice, Range
from m6rec_jax.sweep.study import Sweep, error_line, run_sweep, validations

TRAINER = Path(__file__).parent / "trainer.py"
AXES = [Range("optim.warmup", 1, 200, whole=True)]


class StandIn(LocalLauncher):
    def start(self, command, log, slot):
        assert command[1:4] == ["-m", "m6rec_jax.cli", "train"]
        return super().start([sys.executable, "-S", str(TRAINER), *command[4:]], log, slot)


class InTurn(BaseSampler):
    """The settings of trial n are `kinds[n]`."""

    def __init__(self, kinds):
        self.kinds = kinds

    def infer_relative_search_space(self, study, trial):
        return {}

    def sample_relative(self, study, trial, search_space):
        return {}

    def sample_independent(self, study, trial, name, distribution):
        return self.kinds[trial.number]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(under_test, "POLL_SECONDS", 0.03)


def sweep(out, kinds, jobs=1, lower=0.0, metric="ndcg@10", **environment):
    out.mkdir(exist_ok=True)
    study = open_study(out, 0, "none", jobs, metric)
    study.sampler, study.pruner = InTurn(kinds), optuna.pruners.ThresholdPruner(lower=lower)
    launcher = StandIn(jobs, os.environ | environment)
    return Sweep(out, Config(train=TrainConfig(best=metric)), AXES, ["data"], len(kinds), jobs, launcher, study)


def calls(plan, number):
    return (plan.run(number) / "calls").read_text().splitlines()


def states(plan):
    return [one.state.name for one in plan.study.trials]


def test_every_end_of_a_trial_is_recorded(tmp_path, capsys):
    plan = sweep(tmp_path / "out", [120, 1, 110, 2, 103, 102, 4], jobs=2, lower=0.05, CUDA_VISIBLE_DEVICES="4,5,6")
    told = []
    run_sweep(plan, lambda: told.append(states(plan)))
    assert states(plan) == ["COMPLETE", "FAIL", "COMPLETE", "FAIL", "PRUNED", "PRUNED", "FAIL"]
    table = rows(plan.study, AXES, "ndcg@10")
    assert [row.error for row in table] == [
        "", "exit code 2: out of device memory; lower data.rows", "", "killed by signal 9: step 3", "", "",
        "exit code 0, and it said nothing",
    ]  # fmt: skip
    assert (
        table[0].value == pytest.approx(0.2 * 0.9) and table[0].step == 40
    )  # the first of the two best, as in the run
    assert (plan.run(4) / "terminated").is_file() and table[4].validations in (1, 2)  # of two: it ran beside another
    assert not (plan.run(0) / "terminated").exists()
    assert best(table, "ndcg@10").trial == 0
    assert len(told) >= 7 and {"4,6", "5"} == {line for n in range(7) for line in calls(plan, n)}
    err = capsys.readouterr().err
    assert "trial 1: failed: exit code 2: out of device memory" in err and "trial 4: pruned at ndcg@10 0.0" in err
    assert "failed 3" in err.splitlines()[-1]

    write_table(tmp_path / "trials.csv", table, AXES, "ndcg@10")
    lines = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [line["state"] for line in lines] == [
        "complete",
        "failed",
        "complete",
        "failed",
        "pruned",
        "pruned",
        "failed",
    ]
    assert lines[0]["optim.warmup"] == "120" and lines[1]["error"] == table[1].error
    command = write_best(tmp_path / "best.yaml", best(table, "ndcg@10"), plan.base, plan.datasets)
    assert load_config([tmp_path / "best.yaml"]).optim.warmup == 120
    assert command == f"m6rec train --config {tmp_path / 'best.yaml'} --dataset data --run runs/best"

    again = sweep(tmp_path / "out", [120, 1, 110, 2, 103, 102, 4, 130], jobs=2)
    run_sweep(again, lambda: None)
    assert states(again)[7] == "COMPLETE" and len(states(again)) == 8
    assert all(len(calls(again, n)) == 1 for n in (0, 1, 2, 3, 4, 6))  # nothing that ended is trained again


def test_trials_are_compared_by_the_figure_that_chooses_the_checkpoint_and_the_smaller_loss_wins(tmp_path, capsys):
    plan = sweep(tmp_path / "out", [110, 120, 115], metric="loss/a")
    run_sweep(plan, lambda: None)
    table = rows(plan.study, AXES, "loss/a")
    top = best(table, "loss/a")
    assert (top.trial, top.step, top.value) == (1, 40, pytest.approx(1 - 0.2 * 0.9))
    said = capsys.readouterr().err
    assert "trial 1: loss/a 0.8200 (the best so far)" in said and "trial 2: loss/a 0.8650;" in said
    write_table(tmp_path / "trials.csv", table, AXES, "loss/a")
    assert "valid/loss/a" in (tmp_path / "trials.csv").read_text()
    write_best(tmp_path / "best.yaml", top, plan.base, plan.datasets)
    assert "valid/loss/a 0.8200 at step 40" in (tmp_path / "best.yaml").read_text()
    assert load_config([tmp_path / "best.yaml"]).train.best == "loss/a"
    print_sweep(table, ["optim.warmup"], "", "loss/a")
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if " complete " in line] == ["1", "2", "0"]


def test_a_training_that_was_stopped_from_outside_goes_on(tmp_path):
    plan = sweep(tmp_path / "out", [3])
    run_sweep(plan, lambda: None)
    assert states(plan) == ["COMPLETE"] and len(calls(plan, 0)) == 2
    steps = [json.loads(line)["step"] for line in (plan.run(0) / "metrics.jsonl").open()]
    assert steps == [10, 20, 30, 40, 50]


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, Requeue), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_the_trials_and_the_same_command_goes_on(tmp_path, number, ends, capsys):
    plan = sweep(tmp_path / "out", [120, 5, 5], jobs=2)
    before = signal.getsignal(signal.SIGTERM)

    def send():
        while not (plan.run(2) / "metrics.jsonl").is_file():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(ends):
        run_sweep(plan, lambda: None)
    assert signal.getsignal(signal.SIGTERM) == before
    assert states(plan) == ["COMPLETE", "RUNNING", "RUNNING"]
    assert "sweep: stopped, 1 trials" in capsys.readouterr().err
    spent = plan.study.trials[2].user_attrs["seconds"]
    assert spent > 0
    for trial in (1, 2):
        pid = int((plan.run(trial) / "terminated").read_text().split()[0])
        assert not Path(f"/proc/{pid}").exists()
    again = sweep(tmp_path / "out", [120, 5, 5], jobs=2)
    run_sweep(again, lambda: None)
    assert states(again) == ["COMPLETE"] * 3
    assert [len(calls(again, n)) for n in range(3)] == [1, 2, 2]
    assert len((again.run(2) / "metrics.jsonl").read_text().splitlines()) == 5
    assert again.study.trials[2].user_attrs["seconds"] > spent


def test_what_a_killed_sweep_left_behind_is_taken_up_or_marked(tmp_path, capsys):
    """Killed as it drew the settings of one trial, and with the training of another still at work."""
    plan = sweep(tmp_path / "out", [5, 7, 120])
    trial = plan.study.ask(distributions(AXES))
    job = plan.launcher.start(plan.command(0, {"optim.warmup": 5}), plan.log(0), 0)
    trial.set_user_attr("job", job.name)
    plan.study.ask()
    while not (plan.run(0) / "metrics.jsonl").is_file():
        time.sleep(0.02)
    reaper = threading.Thread(target=job.process.wait, daemon=True)  # init's part, for a process of ours
    reaper.start()
    again = sweep(tmp_path / "out", [5, 7, 120])
    run_sweep(again, lambda: None)
    assert states(again) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert (again.run(0) / "terminated").read_text().split() == [job.name] and len(calls(again, 0)) == 2
    assert len((again.run(0) / "metrics.jsonl").read_text().splitlines()) == 5
    assert "before its settings were drawn" in again.study.trials[1].user_attrs["error"]
    assert "trial 0: taken up where it stopped" in capsys.readouterr().err


def test_a_process_that_got_the_number_of_a_dead_one_is_left_alone(tmp_path):
    other = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(30)"])
    try:
        LocalLauncher(1).adopt(str(other.pid), tmp_path / "log", tmp_path / "run")
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_failure_after_failure_stops_the_sweep(tmp_path):
    plan = sweep(tmp_path / "out", [1] * 9)
    with pytest.raises(InputError, match=r"5 trials failed one after another, the last with: .*lower data.rows; mend"):
        run_sweep(plan, lambda: None)
    assert states(plan) == ["FAIL"] * 5


def test_a_journal_that_a_crash_cut_off_is_mended(tmp_path):
    study = open_study(tmp_path, 0, "median", 1, "ndcg@10")
    study.tell(study.ask(distributions(AXES)), 0.5)
    with open(tmp_path / "journal.log", "ab") as file:
        file.write(b'{"op_code":4,"worker_')
    os.symlink("journal.log", tmp_path / "journal.log.lock")
    start = time.monotonic()
    again = open_study(tmp_path, 0, "median", 1, "ndcg@10")
    again.tell(again.ask(distributions(AXES)), 0.7)
    assert time.monotonic() - start < 10  # Optuna alone waits half a minute for the lock of the dead
    assert [one.value for one in open_study(tmp_path, 0, "median", 1, "ndcg@10").trials] == [0.5, 0.7]
    whole = (tmp_path / "journal.log").read_bytes()
    mend(tmp_path / "journal.log")
    assert (tmp_path / "journal.log").read_bytes() == whole


def test_the_sampler_does_not_begin_anew_when_a_sweep_is_taken_up(tmp_path):
    space, drawn = distributions([Range("optim.learning_rate", 1e-4, 1e-2, log=True)]), []
    for _ in range(3):
        study = open_study(tmp_path, 0, "median", 1, "ndcg@10")
        trial = study.ask(space)
        drawn.append(trial.params["optim.learning_rate"])
        study.tell(trial, state=TrialState.FAIL)
    assert len(set(drawn)) == 3


@pytest.mark.parametrize(("name", "prunes"), [("median", True), ("hyperband", None), ("none", False)])
@pytest.mark.parametrize(("metric", "worse"), [("ndcg@10", 0.1), ("loss/a", 0.9)])
def test_what_falls_behind_is_pruned(tmp_path, name, prunes, metric, worse):
    study = open_study(tmp_path, 0, name, 1, metric)
    for _ in range(6):
        trial = study.ask(distributions(AXES))
        for count in range(1, 10):
            trial.report(0.5, count)
            trial.should_prune()  # hyperband takes its notes here
        study.tell(trial, 0.5)
    told = []
    for _ in range(6):
        trial, cut = study.ask(distributions(AXES)), False
        for count in range(1, 10):
            trial.report(worse, count)
            cut = cut or trial.should_prune()
        told.append(cut)
        study.tell(trial, state=TrialState.PRUNED)
    assert any(told) if prunes is None else set(told) == {prunes}


def test_one_sweep_at_a_time_in_a_folder_and_only_its_own(tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match="another sweep is at work in it"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
    remember(tmp_path, Config(), AXES, ["a"])
    remember(tmp_path, Config(), AXES, ["a"])
    with pytest.raises(InputError, match=r"was begun with space\.optim\.warmup .*200.* and is .*100"):
        remember(tmp_path, Config(), [Range("optim.warmup", 1, 100, whole=True)], ["a"])
    with pytest.raises(InputError, match=r"space\.model\.layers nothing and is"):
        remember(tmp_path, Config(), [*AXES, Choice("model.layers", (1, 2))], ["a"])
    with pytest.raises(InputError, match=r"config\.train\.steps 1000 and is 500"):
        remember(tmp_path, load_config([], ["--train.steps=500"]), AXES, ["a"])
    with pytest.raises(InputError, match="begun with datasets"):
        remember(tmp_path, Config(), AXES, ["b"])


def test_devices_are_dealt_out():
    listed = {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    assert [dealt(listed, slot, 2).get("CUDA_VISIBLE_DEVICES") for slot in (0, 1)] == ["0,2", "1"]
    assert dealt(listed, 4, 5) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert dealt(listed, 0, 1) == dealt({}, 1, 2) == dealt({"CUDA_VISIBLE_DEVICES": "3"}, 1, 2) == {}


def test_the_line_of_a_failure():
    assert error_line("x\nm6rec: no space\nbye\n", 2) == "exit code 2: no space"
    assert error_line("x\nSegmentation fault\n\n", -11) == "killed by signal 11: Segmentation fault"
    assert error_line("", 1) == "exit code 1, and it said nothing"


def test_a_validation_that_is_no_number_counts_for_no_trial(tmp_path):
    rows = [{"valid/loss/a": float("nan")}, {"valid/loss/a": 2.0, "valid/x": float("inf")}, {"valid/loss/a": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": n} | row) + "\n" for n, row in enumerate(rows)))
    assert validations(tmp_path, "loss/a") == [(2, 3.0)]


def test_a_sweep_of_before_a_setting_goes_on_with_what_it_is_by_itself(tmp_path):
    remember(tmp_path, Config(), [], ["data"])
    file = tmp_path / "sweep.json"
    body = json.loads(file.read_text())
    del body["config"]["train"]["best"]
    file.write_text(json.dumps(body))
    remember(tmp_path, Config(), [], ["data"])
    with pytest.raises(InputError, match="config.train.best ndcg@10 and is loss/next-item now"):
        remember(tmp_path, replace(Config(), train=replace(Config().train, best="loss/next-item")), [], ["data"])
