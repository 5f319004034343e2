"""How processes of a job meet: what is said when they do not, and what when they were started differently."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from m6rec_jax.artifacts.checkpoints import steps
from m6rec_jax.cli import ALONE, FAULT, REQUEUE, WRONG_INPUT, main
from m6rec_jax.cli.processes import join_processes, slurm_devices
from m6rec_jax.config import Config, TrainConfig
from m6rec_jax.errors import InputError
from m6rec_jax.training import loop, together
from m6rec_jax.training import run as training
from m6rec_jax.training.together import differences, started_with
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401
from tests.launch.places import LAUNCH, ROOT, SCANCEL, SCONTROL, SRUN, cluster

TINY = [
    "train", "--config", "demo", "--model.layers=1", "--model.width=16", "--data.rows=4", "--data.length=64",
    "--optim.warmup=4", "--train.log_every=1", "--train.eval_every=0",
]  # fmt: skip
MEET = "from m6rec_jax.cli.processes import join_processes as join; join()"

# What a name that nobody knows comes to, without asking a resolver, which may take long or answer with a search page.
UNKNOWN = "import socket; socket.getaddrinfo = lambda *a, **k: (_ for _ in ()).throw(socket.gaierror(-2, 'unknown'))"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(number, processes, port, program, seconds=60, host="127.0.0.1"):
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "M6REC_COORDINATOR": f"{host}:{port}", "M6REC_PROCESSES": str(processes),
        "M6REC_PROCESS_ID": str(number), "M6REC_JOIN_SECONDS": str(seconds),
    }  # fmt: skip
    return subprocess.Popen([sys.executable, *program], env=environment, stderr=subprocess.PIPE, text=True)


def ends(*children):
    """(exit codes, stderr) of all; none outlives the test."""
    try:
        said = [child.communicate(timeout=120)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    return [child.returncode for child in children], said


def own(said):
    """Its lines that begin with "m6rec: ", less what libraries print."""
    return [line for line in said.splitlines() if line.startswith("m6rec: ")]


@pytest.mark.multiprocess
def test_who_cannot_join_says_why_in_a_line_and_leaves():
    """One at a time each way a start goes wrong: together they take as long as one."""
    open_port = socket.socket()
    open_port.bind(("127.0.0.1", 0))
    open_port.listen()
    with open_port:
        children = {
            "Connection refused; see whether process 0 runs on 127.0.0.1": start(1, 2, free_port(), ["-c", MEET], 3),
            "this machine knows no host nowhere": start(1, 2, 1234, ["-c", f"{UNKNOWN}; {MEET}"], 3, "nowhere"),
            "not all others came": start(0, 2, free_port(), ["-c", MEET], 3),
            "something answers there, but": start(1, 2, open_port.getsockname()[1], ["-c", MEET], 3),
        }
        codes, said = ends(*children.values())
    assert codes == [ALONE] * 4, said
    for reason, text in zip(children, said, strict=True):
        (line,) = own(text)
        assert reason in line and "3 s" in line
        assert "Traceback" not in text and "stack trace" not in text


@pytest.mark.multiprocess
def test_a_port_in_use_is_refused_before_jax_takes_it():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        codes, (said,) = ends(start(0, 2, port, ["-m", "m6rec_jax.cli", *TINY, "--dataset", "d", "--run", "r"]))
    assert codes == [WRONG_INPUT]
    assert f"127.0.0.1:{port}: process 0 cannot listen" in said


@pytest.mark.multiprocess
@pytest.mark.parametrize("what", ["settings", "dataset", "steps"])
def test_processes_started_differently_refuse_in_the_same_words(tiny_dataset, tmp_path, what):  # noqa: F811
    port, words = free_port(), ["-m", "m6rec_jax.cli", *TINY, "--run", str(tmp_path / "run")]
    here = ["--train.steps=30", "--dataset", str(tiny_dataset)]
    there = ["--train.steps=20", *here[1:]] if what == "settings" else [*here[:2], str(tmp_path / "nowhere")]
    if what == "steps":  # as of a disk of its own; what is asked of all processes together must not begin then
        there, other = here, "from m6rec_jax.training import run; run.steps = lambda run: [40]"
        program = [
            "-c",
            f"{other}; import sys; from m6rec_jax.cli import main; sys.exit(main(sys.argv[1:]))",
            *words[2:],
        ]
    else:
        program = words
    codes, said = ends(start(0, 2, port, [*words, *here]), start(1, 2, port, [*program, *there]))
    assert codes == [WRONG_INPUT] * 2, said
    (line,), (other,) = map(own, said)
    assert line == other and re.search(r"process 1 of 2 on \S+", line)
    named = {"settings": "train.steps is 20 there and 30 here", "dataset": "nowhere", "steps": "is 40 there and 0 here"}
    assert named[what] in line
    assert not (tmp_path / "run").exists()


@pytest.mark.multiprocess
def test_a_process_that_falls_silent_is_named():
    ask = (
        "import m6rec_jax.cli as cli; from m6rec_jax.training.together import agree; "
        "cli.find = lambda verb: lambda argv: agree(int, seconds=2); cli.main(['train'])"
    )
    port = free_port()
    first = start(0, 2, port, ["-c", f"{MEET}; {ask}"])
    second = start(1, 2, port, ["-c", f"{MEET}; import time; time.sleep(60)"])
    said = first.communicate(timeout=100)[1]
    second.kill()
    second.communicate()
    assert first.returncode == ALONE, said
    assert "process 1 of 2 said nothing for 2 s" in own(said)[0]


@pytest.mark.multiprocess
@pytest.mark.parametrize("broken", [0, 1])
def test_a_fault_in_one_process_ends_the_others_in_a_line(broken):
    ask = (
        "import os, sys; import m6rec_jax.cli as cli; from m6rec_jax.training.together import agree\n"
        "def made():\n"
        f"    if int(os.environ['M6REC_PROCESS_ID']) == {broken}: raise OSError(5, 'Input/output error', '/data/shop')\n"
        "cli.find = lambda verb: lambda argv: agree(made); sys.exit(cli.main(['train']))"
    )
    port = free_port()
    codes, said = ends(*(start(number, 2, port, ["-c", f"{MEET}; {ask}"], 20) for number in range(2)))
    assert (codes[broken], codes[1 - broken]) == (FAULT, WRONG_INPUT), said
    assert "OSError: [Errno 5] Input/output error: '/data/shop'" in own(said[1 - broken])[0]
    assert own(said[broken])[0].startswith("m6rec: a fault of m6rec itself: OSError")


@pytest.mark.multiprocess
def test_sigterm_before_the_loop_ends_a_process_that_has_joined():
    """jax takes SIGTERM for itself when processes join, and would go on."""
    told = f"{MEET}; import os, signal, time; time.sleep(1); os.kill(os.getpid(), signal.SIGTERM); time.sleep(3); os._exit(5)"
    port = free_port()
    codes, said = ends(*(start(number, 2, port, ["-c", told]) for number in range(2)))
    assert codes == [-signal.SIGTERM] * 2, said


def test_a_signal_that_comes_while_processes_exchange_is_not_lost(monkeypatch):
    told = []

    def exchange(mine):
        if not told:
            signal.raise_signal(signal.SIGTERM)
        told.append(int(mine))
        return np.array([mine, 0])

    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop.multihost_utils, "process_allgather", exchange)
    with loop.StopSignals() as stop:
        assert [stop.asked(None), stop.asked(None)] == [False, True]
    assert told == [0, signal.SIGTERM]


@pytest.mark.multiprocess
@pytest.mark.timeout(420)  # two processes compile; other tests may have the cores
def test_a_slurm_job_saves_before_its_limit_and_queues_itself_again(tiny_dataset, tmp_path):  # noqa: F811
    """The batch script as it is; `srun` starts two tasks here, with the variables that Slurm gives them."""
    environment = cluster(tmp_path, srun=SRUN, scancel=SCANCEL, scontrol=SCONTROL)
    # jax derives the port of the coordinator from the number of the job
    port = next(port for port in iter(free_high_port, None) if port)
    environment |= {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(port - 61440),
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_CPUS_PER_TASK": "3",
        "M6REC_ENV": "",
    }
    run = tmp_path / "run"
    one_task = tmp_path / "one.yaml"  # the fewer there are, the sooner all is compiled
    one_task.write_text("mixture: {tasks: {next-item: 1}}\n")
    words = [
        *TINY[1:],
        "--config",
        str(one_task),
        "--train.steps=100000",
        "--dataset",
        str(tiny_dataset),
        "--run",
        str(run),
    ]
    job = subprocess.Popen(
        ["bash", LAUNCH / "slurm/train.sbatch", *words],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics, until = run / "metrics.jsonl", time.monotonic() + 300
    try:
        while time.monotonic() < until and job.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.2)
        job.send_signal(signal.SIGTERM)
        said = job.communicate(timeout=90)[1]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == REQUEUE, said
    assert steps(run) and f"saved step {steps(run)[-1]}" in said
    assert {f"process {number} of 2" for number in range(2)} == set(re.findall(r"process \d of 2", said))
    calls = (tmp_path / "calls").read_text().splitlines()
    number = environment["SLURM_JOB_ID"]
    options = "--label --wait=150 --kill-on-bad-exit=0 --cpus-per-task=3"
    assert calls[0].startswith(f"srun {options} m6rec train --config demo")
    assert calls[1:] == [f"scancel --signal=TERM {number}", f"scontrol requeue {number}"]


def free_high_port():
    """A free port among those that jax derives from a Slurm job's number; None when the one tried is taken."""
    import random

    port = random.randrange(61441, 65536)
    with socket.socket() as free:
        try:
            free.bind(("127.0.0.1", port))
        except OSError:
            return None
    return port


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, {}),  # eight tasks on each node: jax gives each the GPU of its number
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, {}),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "5"},
            {"local_device_ids": [0]},
        ),  # bound to one
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4"}, {"local_device_ids": [0, 1, 2, 3]}),
    ],
)
def test_a_slurm_task_takes_the_gpus_that_are_its_own(environment, devices):
    assert slurm_devices(environment) == devices


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"M6REC_COORDINATOR": "host", "M6REC_PROCESSES": "2", "M6REC_PROCESS_ID": "1"}, "M6REC_COORDINATOR=host"),
        ({"M6REC_COORDINATOR": "host:port", "M6REC_PROCESSES": "2", "M6REC_PROCESS_ID": "1"}, "host:port"),
        ({"M6REC_COORDINATOR": "host:1", "M6REC_PROCESSES": "2", "M6REC_PROCESS_ID": "2"}, "M6REC_PROCESS_ID=2"),
        ({"M6REC_COORDINATOR": "host:1", "M6REC_PROCESSES": "2", "M6REC_PROCESS_ID": ""}, "M6REC_PROCESS_ID="),
        ({"M6REC_JOIN_SECONDS": "soon"}, "M6REC_JOIN_SECONDS=soon"),
    ],
)
def test_half_said_variables_are_refused(monkeypatch, variables, named):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=re.escape(named)):
        join_processes()


def test_differences_are_named_with_both_values():
    here, there = Config(), Config(train=TrainConfig(steps=777, seed=3))
    found = differences(started_with(here, []), started_with(there, []))
    assert [name for name, *_ in found] == ["train.steps", "train.seed"]
    assert found[0][1:] == (str(here.train.steps), "777")
    assert differences({"a": "1"}, {"b": "2"}) == [("a", "1", "missing"), ("b", "missing", "2")]


def test_code_and_flags_count_as_differences(monkeypatch):
    before = started_with(Config(), [])
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=here {os.environ.get('XLA_FLAGS', '')}")
    assert started_with(Config(), []) == before  # where each process writes its dumps does not matter
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=true")
    monkeypatch.setattr(together, "_source", lambda: "another")
    named = [name for name, *_ in differences(before, started_with(Config(), []))]
    assert named == ["digest of m6rec_jax's source", "XLA_FLAGS"]


def test_a_run_folder_that_is_not_shared_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "APPEARS", 0.0)
    with pytest.raises(InputError, match="all machines share"):
        training._see(tmp_path / "run")


def test_alone_nothing_is_asked(tmp_path, capsys):
    """No process of another job is waited for, and no line about processes is printed."""
    assert main([*TINY, "--dataset", str(tmp_path / "none"), "--run", str(tmp_path / "run")]) == WRONG_INPUT
    assert "process" not in capsys.readouterr().err
