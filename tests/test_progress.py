"""Progress: plain lines where there is no terminal, a bar where there is one, silence but on process 0."""

import os
import pty
import subprocess
import sys
import threading

import pytest

from m6rec_jax import progress
from m6rec_jax.progress import note, stage


@pytest.fixture(autouse=True)
def first_process(monkeypatch):
    monkeypatch.setattr(progress, "_told", None)
    monkeypatch.delenv("M6REC_PROCESS_ID", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)


class Clock:
    """Time that passes only when told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress, "_now", lambda: self.now)

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def lines(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_plain_lines_carry_percent_rate_eta_and_fields(clock, capsys):
    with stage("train", 1000, "steps") as bar:
        clock.pass_(10)
        bar.advance(200, loss=1.23456)
    first, line, last = lines(capsys)
    assert first == "train: 1,000 steps"
    assert line == "train: 20 % (200/1,000 steps), 20 steps/s, ETA 0:40, loss 1.235"
    assert last == "train: done, 200 steps in 0:10, 20 steps/s, loss 1.235"


def test_lines_come_each_tenth_but_not_more_often_than_a_second(clock, capsys):
    with stage("clean", 100, "rows") as bar:
        for _ in range(100):
            clock.pass_(0.5)
            bar.advance()
    assert len(lines(capsys)) == 2 + 10
    with stage("clean", 100, "rows") as bar:
        for _ in range(100):
            clock.pass_(0.01)
            bar.advance()
    assert len(lines(capsys)) == 2


def test_slow_stages_speak_every_ten_seconds(clock, capsys):
    with stage("train", 10**6, "steps") as bar:
        for _ in range(60):
            clock.pass_(1)
            bar.advance()
    assert len(lines(capsys)) == 2 + 6


def test_work_done_before_counts_for_the_share_but_not_for_the_rate(clock, capsys):
    with stage("train", 1000, "steps", done=900) as bar:
        clock.pass_(10)
        bar.advance(50)
    first, line, last = lines(capsys)
    assert "900 done before" in first
    assert "95 %" in line and "5 steps/s" in line and "ETA 0:10" in line
    assert "950 steps" in last and "5 steps/s" in last


def test_rate_follows_the_last_half_minute(clock):
    with stage("train", 1000, "steps") as bar:
        clock.pass_(60)  # compiling
        bar.advance(1)
        for _ in range(40):
            clock.pass_(1)
            bar.advance(2)
        assert bar.rate() == pytest.approx(2, rel=0.1)


def test_unknown_total_has_neither_percent_nor_eta(clock, capsys):
    with stage("read", unit="rows") as bar:
        clock.pass_(11)
        bar.advance(22)
    _, line, _ = lines(capsys)
    assert line == "read: 22 rows, 2 rows/s"


def test_a_stage_that_fails_says_where_it_stopped(capsys):
    with pytest.raises(ValueError, match="broken"), stage("clean", 10, "rows") as bar:
        bar.advance(3)
        raise ValueError("broken")
    assert lines(capsys)[-1].startswith("clean: stopped, 3 rows")


@pytest.mark.parametrize("variable", ["M6REC_PROCESS_ID", "SLURM_PROCID"])
def test_only_process_0_prints(monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, "1")
    with stage("train", 10, "steps") as bar:
        bar.advance(10)
        note("hello")
    assert lines(capsys) == []
    progress.speak(True)
    note("hello")
    assert lines(capsys) == ["hello"]


def test_stages_of_several_threads_do_not_disturb_each_other(capsys):
    def work(name):
        with stage(name, 200, "rows") as bar:
            for _ in range(200):
                bar.advance()
        assert bar.done == 200

    threads = [threading.Thread(target=work, args=(f"part {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = lines(capsys)
    assert len(said) == 8 and all(f"part {i}: 200 rows" in said for i in range(4))


SCRIPT = """
import time
from m6rec_jax.progress import note, stage
with stage("outer", 2, "parts") as outer:
    for part in range(2):
        with stage(f"inner [{part}]", 10, "rows") as inner:
            for _ in range(10):
                time.sleep(0.02)
                inner.advance(loss=0.5)
        note(f"between {part} [bold]")
        outer.advance()
print("result")
"""


def test_a_terminal_gets_bars_with_eta_and_standard_output_stays_apart(tmp_path):
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    done = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=follower, env=environment)
    os.close(follower)
    screen = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        screen += part
    os.close(leader)
    assert done.stdout.read() == b"result\n"
    assert done.wait() == 0
    text = screen.decode()
    assert "inner [1]: done, 10 rows" in text and "between 0 [bold]" in text
    assert "ETA" in text and "rows/s" in text and "loss 0.5" in text and "%" in text
