"""The command line's contract: exit codes, one line of error, help with an example for every verb."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from m6rec_jax import cli
from m6rec_jax.cli import FAULT, INTERRUPTED, REQUEUE, SUCCESS, VERBS, WRONG_INPUT, main
from m6rec_jax.errors import InputError, Requeue


def one_line(capsys):
    captured = capsys.readouterr()
    assert captured.err.endswith("\n") and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err.rstrip()


@pytest.fixture
def verb_that(monkeypatch):
    """Make `m6rec doctor` do something else."""

    def _make(act):
        monkeypatch.setattr("m6rec_jax.cli.doctor.doctor", act)

    return _make


def raises(error):
    def act(argv):
        raise error

    return act


class JaxRuntimeError(Exception):
    """Named as jax names it."""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InputError("card.yaml: events.user=uid: no such column;\n columns: a, b"), WRONG_INPUT, "columns: a, b"),
        (Requeue(), REQUEUE, "the same command resumes"),
        (Requeue("saved step 40"), REQUEUE, "saved step 40"),
        (KeyboardInterrupt(), INTERRUPTED, "continues where it stopped"),
        (ZeroDivisionError("oh\nno"), FAULT, "ZeroDivisionError: oh no; M6REC_DEBUG=1"),
        (OSError(errno.ENOSPC, "No space left on device", "run/x"), WRONG_INPUT, "run/x: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), WRONG_INPUT, "out: Permission denied"),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "out"),
            WRONG_INPUT,
            "out: Is a directory; a file and a folder",
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "out/x"), WRONG_INPUT, "out/x: Not a directory"),
        (FileExistsError(errno.EEXIST, "File exists", "out"), WRONG_INPUT, "out: File exists"),
        (OSError(errno.EIO, "Input/output error", "x"), FAULT, "OSError"),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"), WRONG_INPUT, "lower data.rows"),
        (JaxRuntimeError("INTERNAL: bad"), FAULT, "JaxRuntimeError"),
    ],
)
def test_how_a_verb_ends_decides_the_exit_code(verb_that, monkeypatch, capsys, error, code, says):
    monkeypatch.delenv("M6REC_DEBUG", raising=False)
    verb_that(raises(error))
    assert main(["doctor"]) == code
    assert says in one_line(capsys)


def test_debug_prints_the_traceback(verb_that, monkeypatch, capsys):
    monkeypatch.setenv("M6REC_DEBUG", "1")
    verb_that(raises(ZeroDivisionError("oh")))
    assert main(["doctor"]) == FAULT
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_one_example_and_a_text_for_every_option(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*verb.split(), "--help"]) == SUCCESS
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(f"usage: m6rec {verb}")
    assert captured.out.count("example:\n  m6rec " + verb) == 1
    options = [line for line in captured.out.splitlines() if line.startswith("  --")]
    assert all(len(line.split("  ")) >= 3 and line.split("  ")[-1].strip() for line in options), options
    assert len(options) == len({line.split()[0] for line in options})


def test_the_overview_lists_every_verb(capsys):
    assert main(["--help"]) == SUCCESS
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in VERBS)
    assert main(["data", "--help"]) == SUCCESS
    said = capsys.readouterr().out
    assert "  data fetch " in said and "  train " not in said
    assert main(["--version"]) == SUCCESS


GENERATE = ["generate", "--run", "r", "--out", "o", "--users", "all"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "no verb given"),
        (["trian"], "trian: unknown verb; did you mean train?"),
        (["data"], "data: unknown verb"),
        (["data", "fetsh"], "did you mean data fetch?"),
        (["data", "fetch", "--out", "x"], "NAME is missing"),
        (["prepare", "--card", "x"], "--out is missing; m6rec prepare --help"),
        (["prepare", "--card", "x", "--out", "y", "--level", "3"], "did you mean --levels?"),
        (["prepare", "--card", "x", "--out", "y", "--levels", "three"], "--levels=three: must be a whole number"),
        (["train", "--run", "r"], "--dataset is missing"),
        (["train", "--dataset", "d"], "--run is missing"),
        (["train", "--dataset", "d", "--run", "r", "--model.dept=3"], "--model.dept: unknown option"),
        (["train", "--config"], "a file name is missing"),
        (["evaluate", "--run", "r", "--out", "o", "--split", "train"], "train"),
        (["generate", "--run", "r", "--out", "o", "--users", "nobody.txt"], "nobody.txt: no such file"),
        (["generate", "--run", "r", "--out", "o", "--users", "all", "--k", "0"], "--k=0: must be above 0"),
        (["generate", "--run", "r", "--out", "o", "--users", "all", "--limit", "-1"], "--limit=-1: must be above 0"),
        ([*GENERATE, "--per", "category"], "--per category: says nothing without --cap"),
        ([*GENERATE, "--per", "category", "--cap", "0"], "--cap=0: must be above 0"),
        ([*GENERATE, "--diversity", "2"], "--diversity=2.0: must lie between 0 and 1"),
        ([*GENERATE, "--new-items=-1"], "--new-items=-1.0: must lie between 0 and 1"),
        ([*GENERATE, "--candidates", "nothing.txt"], "--candidates nothing.txt: no such file"),
        (["compare", "one"], "at least two"),
        (["compare", "a", "b", "--split", "train"], "train"),
        (["compare", "nowhere", "b"], "nowhere: no such run or report"),
        (["doctor", "now"], "now: one word too many"),
        (["verify", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_wrong_command_lines_are_exit_2_and_one_line(argv, says, capsys):
    assert main(argv) == WRONG_INPUT
    assert says in one_line(capsys)


OUT = [
    ["data", "fetch", "ml-100k", "--out"],
    ["data", "card", "--from", "nowhere", "--out"],
    ["prepare", "--card", "nowhere", "--out"],
    ["train", "--dataset", "nowhere", "--run"],
    ["evaluate", "--run", "nowhere", "--out"],
    ["generate", "--run", "nowhere", "--users", "all", "--out"],
    ["compare", "nowhere", "nowhere", "--out"],
    ["embed", "--run", "nowhere", "--users", "--out"],
    ["profile", "--dataset", "nowhere", "--out"],
    ["demo", "--source", "nowhere", "--out"],
]


@pytest.mark.parametrize("argv", OUT, ids=lambda argv: " ".join(argv[:2]))
def test_a_place_that_cannot_be_written_is_said_before_any_work(argv, tmp_path, monkeypatch, capsys):
    """Before any work: the input, that is nowhere, is not yet looked at."""
    (tmp_path / "file").write_text("")
    assert main([*argv, str(tmp_path / "file" / "under" / "it")]) == WRONG_INPUT
    assert f"{tmp_path / 'file'} is a file, not a folder" in one_line(capsys)
    folder = argv[0] in ("prepare", "train", "demo") or argv[1] == "fetch"
    wrong = f"{tmp_path}/file/" if argv[0] == "generate" else tmp_path / "file" if folder else tmp_path
    assert main([*argv, str(wrong)]) == WRONG_INPUT
    assert f"{argv[-1]} {wrong}: a f" in one_line(capsys)  # a folder is there; a file is in the way
    monkeypatch.setattr("m6rec_jax.cli.outputs.os.access", lambda path, mode: path != tmp_path)
    assert main([*argv, str(tmp_path / "new")]) == WRONG_INPUT
    assert f"no permission to write in {tmp_path}" in one_line(capsys)


@pytest.mark.parametrize(("content", "says"), [(b"\n \n", "names no user"), (b"\xff\xfe\x00", "not UTF-8")])
def test_a_bad_file_of_users_is_one_line(tmp_path, content, says, capsys):
    (tmp_path / "users.txt").write_bytes(content)
    argv = ["generate", "--run", "r", "--out", "o", "--users", str(tmp_path / "users.txt")]
    assert main(argv) == WRONG_INPUT
    assert says in one_line(capsys)


def test_print_config_is_the_merged_configuration_and_loads_back(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("model: {layers: 5}\noptim: {learning_rate: 1e-4}\n")
    argv = ["train", "--config", "demo", "--config", str(tmp_path / "mine.yaml"), "--print-config"]
    assert main([*argv, "--model.width=96"]) == SUCCESS
    first = capsys.readouterr().out
    (tmp_path / "merged.yaml").write_text(first)
    assert main(["train", "--config", str(tmp_path / "merged.yaml"), "--print-config"]) == SUCCESS
    assert capsys.readouterr().out == first
    assert "layers: 5" in first and "width: 96" in first and "steps: 800" in first


def python(*argv, **kwargs):
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=60, check=False, **kwargs)


def test_help_is_quick_and_loads_nothing_heavy():
    code = "import sys; from m6rec_jax.cli import main; main(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    loaded = python("-c", code).stderr
    for heavy in ("jax", "numpy", "polars", "jsonargparse", "rich", "yaml"):
        assert f"'{heavy}'" not in loaded
    best = min(_seconds("-m", "m6rec_jax.cli", "--help") for _ in range(3))
    assert best < 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_does_not_load_jax(verb):
    code = f"import sys; from m6rec_jax.cli import main; main({[*verb.split(), '--help']}); print('jax' in sys.modules)"
    assert python("-c", code).stdout.endswith("False\n")


def _seconds(*argv):
    start = time.perf_counter()
    assert python(*argv).returncode == 0
    return time.perf_counter() - start


def test_exit_code_and_line_reach_the_shell():
    done = python("-m", "m6rec_jax.cli", "verify", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "m6rec: nowhere: no such folder; name a dataset or a run\n"


def test_a_reader_that_leaves_early_is_no_fault():
    shell = f"{sys.executable} -m m6rec_jax.cli train --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "0\n" and done.stderr == ""


def test_ctrl_c_ends_with_130():
    code = (
        "import sys, time; from m6rec_jax import cli; import m6rec_jax.cli.doctor as d\n"
        "d.doctor = lambda argv: (print('up', flush=True), time.sleep(30))\n"
        "sys.exit(cli.main(['doctor']))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "up\n"
    os.kill(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == INTERRUPTED
    assert err == "m6rec: interrupted; the same command continues where it stopped\n"


def test_every_verb_leads_to_a_function():
    assert all(callable(cli.find(verb)) for verb in VERBS)


def test_a_plugin_without_its_device_says_nothing(monkeypatch, tmp_path, capsys):
    """The extra `aot` brings compilers for devices that are not here; jax tells of each, with a traceback."""
    log, devices = logging.getLogger("jax._src.xla_bridge"), tmp_path / "dev"
    devices.mkdir()
    monkeypatch.setattr(cli, "DEVICES", devices)
    assert main(["--version"]) == SUCCESS

    def fails():
        try:
            raise RuntimeError("cuDNN not found.")
        except RuntimeError:
            log.exception(
                "Jax plugin configuration error: Exception when calling %s.initialize()", "jax_plugins.xla_cuda13"
            )

    fails()
    assert "cuDNN" not in capsys.readouterr().err
    (devices / "nvidia0").touch()
    fails()
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "jax_plugins.xla_cuda13" in err[0] and "cuDNN not found" in err[0]
