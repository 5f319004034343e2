"""Batch generation: the same bytes however often it was stopped, by however many processes, whatever broke."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from itertools import count
from pathlib import Path

import polars as pl
import pytest

from m6rec_jax.artifacts.manifest import file_digest
from m6rec_jax.cli import SUCCESS, WRONG_INPUT, main
from m6rec_jax.decoding.batch import COLUMNS, generate
from m6rec_jax.decoding.parts import Parts
from m6rec_jax.errors import InputError
from tests.decoding.jobs import JOB, LINES, USERS, recommend


def forbidden(users):
    pytest.fail("made again")


def bytes_of(out: Path) -> dict[str, bytes]:
    """Everything of a finished output, hidden files too: one file and what is left of its parts, or a folder."""
    tops = [out] if out.is_dir() else [out, out.with_name(f"{out.name}.parts")]
    files = [path for top in tops for path in (top.rglob("*") if top.is_dir() else [top]) if path.is_file()]
    found = {path.relative_to(out.parent).as_posix().replace(out.name, "X"): path.read_bytes() for path in files}
    name = f'"name": "{out.name}"'.encode()  # which the manifest of a file holds
    return {path: held.replace(name, b'"name": "X"') if path.endswith("json") else held for path, held in found.items()}


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(params=["file", "folder"])
def kind(request):
    return request.param


def place(tmp_path: Path, name: str, kind: str) -> str:
    """`--out` of a name: a file, or a folder by its slash."""
    return str(tmp_path / f"{name}.parquet") if kind == "file" else f"{tmp_path / name}/"


# -- what is written -----------------------------------------------------------------------------------------------


def test_a_file_holds_all_users_in_order_and_its_manifest_says_what_it_is(tmp_path):
    out = tmp_path / "recs.parquet"
    assert generate(recommend, iter(USERS), out, job=JOB, chunk=10) == LINES
    table = pl.read_parquet(out)
    assert dict(table.schema) == COLUMNS
    assert table["user_id"].unique(maintain_order=True).to_list() == USERS
    assert table["rank"].to_list() == [1, 2, 3] * 53
    assert sorted(bytes_of(out)) == ["X", "X.parts/manifest.json"]  # nothing twice
    said = manifest_of(tmp_path / "recs.parquet.parts")
    assert said["finished"] and said["rows"] == LINES and said["job"] == {"chunk": 10, **JOB}
    assert said["file"] == {"name": "recs.parquet", "rows": LINES, "bytes": out.stat().st_size, "xxh3": file_digest(out)}  # fmt: skip
    assert [facts["rows"] for facts in said["parts"].values()] == [30] * 5 + [9]


def test_a_folder_keeps_the_parts_and_no_file_beside(tmp_path):
    for name in ("new/", "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        assert generate(recommend, iter(USERS), f"{tmp_path}/{name}", job=JOB, chunk=10) == LINES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "there"]
    out = tmp_path / "new"
    said = manifest_of(out)
    assert sorted(bytes_of(out)) == [f"X/{name}" for name in sorted(["manifest.json", *said["parts"]])]
    assert said["finished"] and "file" not in said and said["rows"] == LINES
    for name, facts in said["parts"].items():
        part = out / name
        assert facts == {"rows": facts["rows"], "bytes": part.stat().st_size, "xxh3": file_digest(part)}
    generate(recommend, USERS, tmp_path / "one.parquet", job=JOB, chunk=10)
    assert pl.read_parquet(out / "*.parquet").equals(pl.read_parquet(tmp_path / "one.parquet"))


def test_no_users_and_bad_tables(tmp_path, kind):
    assert generate(recommend, [], place(tmp_path, "none", kind), job=JOB) == 0
    if kind == "file":
        assert dict(pl.read_parquet(tmp_path / "none.parquet").schema) == COLUMNS
    with pytest.raises(ValueError, match="no column reason"):
        generate(lambda users: recommend(users).drop("reason"), USERS, place(tmp_path, "x", kind), job=JOB)
    assert not list(tmp_path.glob("x*/part*"))
    for wrong in ({"shard": 2, "shards": 2}, {"shard": -1}, {"chunk": 0}):
        with pytest.raises(InputError, match=r"counted from 0 to|must be above 0"):
            generate(recommend, USERS, place(tmp_path, "y", kind), job=JOB, **wrong)


# -- stopped, killed -----------------------------------------------------------------------------------------------


def test_nobody_is_asked_for_twice(tmp_path, kind):
    for stop in range(6):
        out, calls = place(tmp_path, f"stopped{stop}", kind), []

        def fragile(users, stop=stop, calls=calls):
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(users)
            return recommend(users)

        with pytest.raises(KeyboardInterrupt):
            generate(fragile, USERS, out, job=JOB, chunk=10)
        again = []
        generate(lambda users, again=again: again.append(users) or recommend(users), USERS, out, job=JOB, chunk=10)
        assert calls + again == [USERS[i : i + 10] for i in range(0, 53, 10)]
        assert generate(forbidden, USERS, out, job=JOB, chunk=10) == LINES


def test_resumed_parts_count_as_done(tmp_path, kind, capsys):
    calls = []

    def fragile(users):
        calls.append(users)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return recommend(users)

    out = place(tmp_path, "recs", kind)
    with pytest.raises(KeyboardInterrupt):
        generate(fragile, USERS, out, job=JOB, chunk=10, total=53)
    generate(recommend, USERS, out, job=JOB, chunk=10, total=53)
    assert "generate: 53 users, 20 done before" in capsys.readouterr().err
    shared = place(tmp_path, "shared", kind)
    for shard in (1, 0):  # parts 1, 3, 5 hold 23 users, parts 0, 2, 4 the others
        generate(recommend, USERS, shared, job=JOB, chunk=10, total=53, shard=shard, shards=2)
    said = capsys.readouterr().err
    assert "generate: 23 users" in said and "generate: done, 30 users" in said
    part = (tmp_path / "shared" / "part-000005.parquet") if kind == "folder" else None
    if part is not None:
        part.unlink()
        generate(recommend, USERS, shared, job=JOB, chunk=10, total=53, shard=1, shards=2)
        assert "generate: 23 users, 20 done before" in capsys.readouterr().err


# Every rename and every removal under a folder is a moment to be killed at: before it happens.
KILLED = """
    import os, signal, sys
    from pathlib import Path
    from m6rec_jax.decoding.batch import generate
    from tests.decoding.jobs import JOB, USERS, recommend
    top, moment, out, shard, shards = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    seen = 0
    def watch(event, arguments):
        global seen
        if event in ("os.rename", "os.remove") and str(arguments[0]).startswith(top):
            if event == "os.remove" and not os.path.exists(arguments[0]):
                return  # `missing_ok`
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
    sys.addaudithook(watch)
    generate(recommend, USERS, out, job=JOB, chunk=30, shard=shard, shards=shards)
"""


def killed_at(moment: int, top: Path, out: str, shard: int = 0, shards: int = 1) -> bool:
    """Run a job that is killed at a moment; whether it came so far."""
    argv = [sys.executable, "-c", textwrap.dedent(KILLED), str(top), str(moment), out, str(shard), str(shards)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def test_killed_at_any_moment_and_rerun_gives_the_same_bytes(tmp_path, kind):
    """Renames of the manifest and of two parts in turn, of the file, and each removal while tidying up."""
    undisturbed = Path(place(tmp_path, "whole", kind))
    generate(recommend, USERS, place(tmp_path, "whole", kind), job=JOB, chunk=30)
    for moment in count():
        top = tmp_path / f"{moment}"
        top.mkdir()
        out = place(top, "killed", kind)
        if not killed_at(moment, top, out):
            break
        made = []
        generate(lambda users, made=made: made.append(users) or recommend(users), USERS, out, job=JOB, chunk=30)
        assert len(made) == max(0, 2 - (moment - 1) // 2 if moment else 2)  # what was entered was not made again
        assert bytes_of(Path(out)) == bytes_of(undisturbed), moment
        assert len(list(top.iterdir())) == (2 if kind == "file" else 1)
    assert moment == {"file": 14, "folder": 11}[kind]


def test_two_shards_one_of_them_killed_at_any_moment(tmp_path, kind):
    undisturbed = Path(place(tmp_path, "whole", kind))
    generate(recommend, USERS, place(tmp_path, "whole", kind), job=JOB, chunk=30)
    for moment in count():
        top = tmp_path / f"{moment}"
        top.mkdir()
        out = place(top, "killed", kind)
        assert generate(recommend, USERS, out, job=JOB, chunk=30, shard=1, shards=2) == 69
        if not killed_at(moment, top, out, 0, 2):
            break
        generate(recommend, USERS, out, job=JOB, chunk=30, shard=moment % 2, shards=2)  # either may come first
        generate(recommend, USERS, out, job=JOB, chunk=30, shard=1 - moment % 2, shards=2)
        assert bytes_of(Path(out)) == bytes_of(undisturbed), moment
    assert moment >= {"file": 10, "folder": 7}[kind]


# -- many processes ------------------------------------------------------------------------------------------------

SHARD = """
    import sys
    from m6rec_jax.decoding.batch import generate
    from tests.decoding.jobs import JOB, USERS, recommend
    sys.stdin.readline()
    generate(recommend, USERS, sys.argv[1], job=JOB, chunk=4, shard=int(sys.argv[2]), shards=3)
"""


def test_processes_at_once_make_each_part_once_and_one_of_them_finishes(tmp_path, kind):
    out = place(tmp_path, "shared", kind)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SHARD), out, str(shard)],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for shard in range(3)
    ]  # fmt: skip
    said = [child.communicate("go\n", timeout=60)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], said
    generate(recommend, USERS, place(tmp_path, "alone", kind), job=JOB, chunk=4)
    assert bytes_of(Path(out)) == bytes_of(Path(place(tmp_path, "alone", kind)))
    for shard in range(3):
        assert generate(forbidden, USERS, out, job=JOB, chunk=4, shard=shard, shards=3) == LINES


def test_shards_write_only_their_parts_and_another_number_of_them_goes_on(tmp_path, kind, capsys):
    out = place(tmp_path, "recs", kind)
    folder = tmp_path / ("recs" if kind == "folder" else "recs.parquet.parts")
    made = []
    keep = lambda users: made.append(users[0]) or recommend(users)  # noqa: E731
    assert generate(keep, USERS, out, job=JOB, chunk=10, shard=1, shards=3) == 60
    assert made == [USERS[10], USERS[40]]
    assert sorted(path.name for path in folder.glob("part*")) == ["part-000001.parquet", "part-000004.parquet"]
    assert "4 of 6 parts are still missing, the first of them part-000000" in capsys.readouterr().err
    assert not (tmp_path / "recs.parquet").exists()
    assert generate(keep, USERS, out, job=JOB, chunk=10) == LINES  # one process takes up what one of three left
    assert len(made) == 6
    generate(recommend, USERS, place(tmp_path, "alone", kind), job=JOB, chunk=10)
    assert bytes_of(Path(out)) == bytes_of(Path(place(tmp_path, "alone", kind)))


def test_processes_of_another_count_wait_for_the_end_of_these(tmp_path, kind):
    out = place(tmp_path, "recs", kind)

    def other(users):
        with pytest.raises(
            InputError, match=r"recs.*: shared by 2 processes, which are at work, and this is one of 1;"
        ):
            generate(forbidden, USERS, out, job=JOB, chunk=20)
        return recommend(users)

    assert generate(other, USERS, out, job=JOB, chunk=20, shard=1, shards=2) == 60
    assert generate(recommend, USERS, out, job=JOB, chunk=20) == LINES


def test_what_others_finished_meanwhile_stays_finished(tmp_path, kind, monkeypatch):
    """Where there are no locks one process alone and two that share may begin together."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("m6rec_jax.decoding.parts.fcntl.flock", no_locks)
    out = place(tmp_path, "recs", kind)
    folder = tmp_path / ("recs" if kind == "folder" else "recs.parquet.parts")
    finished = []

    def slow(users):
        if not finished:
            for shard in range(2):
                generate(recommend, USERS, out, job=JOB, chunk=20, shard=shard, shards=2)
            finished.append(bytes_of(Path(out)))
        assert manifest_of(folder)["finished"] and main(["verify", str(folder)]) == SUCCESS
        return recommend(users)

    assert generate(slow, USERS, out, job=JOB, chunk=20) == LINES
    assert bytes_of(Path(out)) == finished[0]


def test_what_was_settled_first_counts_for_all_processes(tmp_path, kind, monkeypatch):
    out, used, first = place(tmp_path, "recs", kind), [], {"gate": {"bias": 0.1 + 0.2}}

    def settle(kept, own=None):
        used.append(kept)
        return own or first

    generate(recommend, USERS, out, job=JOB, settle=settle, chunk=10, shard=1, shards=2)
    generate(recommend, USERS, out, job=JOB, settle=lambda kept: used.append(kept) or kept, chunk=10, shard=0, shards=2)
    assert used == [None, first]
    folder = tmp_path / ("recs" if kind == "folder" else "recs.parquet.parts")
    assert manifest_of(folder)["settled"] == first
    victim = Path(out) if kind == "file" else folder / "part-000001.parquet"
    victim.unlink()
    generate(recommend, USERS, out, job=JOB, settle=lambda kept: used.append(kept) or kept, chunk=10)
    assert used[2:] == [first]  # and for whoever makes it again
    # Without locks two may settle at once: their parts are not mixed.
    monkeypatch.setattr("m6rec_jax.decoding.parts.Parts._read", lambda *_: None)
    two = place(tmp_path, "two", kind)
    for shard, bias in ((0, 1.0), (1, 2.0)):
        if shard:
            monkeypatch.setattr("m6rec_jax.decoding.parts.Parts._others", lambda *_: [])
        generate(recommend, USERS, two, job=JOB, settle=lambda kept, bias=bias: {"gate": bias}, chunk=10, shard=shard, shards=2)  # fmt: skip
    monkeypatch.undo()
    part = next(tmp_path.glob("two*")) / "manifest-0-of-2.json"
    with pytest.raises(InputError, match=r"do not agree \(manifest-1-of-2.json: gate differ\)"):
        generate(recommend, USERS, two, job=JOB, settle=lambda kept: kept, chunk=10, shard=0, shards=2)
    assert part.is_file()


def test_a_shard_run_again_while_another_finishes_makes_nothing(tmp_path, kind, monkeypatch):
    out, check = place(tmp_path, "recs", kind), Parts.check
    generate(recommend, USERS, out, job=JOB, chunk=10, shard=0, shards=2)

    def meanwhile(self):
        check(self)
        monkeypatch.undo()
        generate(recommend, USERS, out, job=JOB, chunk=10, shard=1, shards=2)

    monkeypatch.setattr(Parts, "check", meanwhile)
    never = lambda users: pytest.fail("made again")  # noqa: E731
    assert generate(never, USERS, out, job=JOB, chunk=10, shard=0, shards=2) == LINES


def test_what_a_kill_left_of_a_finished_file_is_no_obstacle_to_another_job(tmp_path):
    out = place(tmp_path, "recs", "file")
    generate(recommend, USERS, out, job=JOB, chunk=10)
    folder = Path(f"{out}.parts")
    kept = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    left = {**kept, "finished": False}
    (folder / "manifest-0-of-1.json").write_text(json.dumps(left), encoding="utf-8")
    assert generate(recommend, USERS, out, job={**JOB, "k": 7}, chunk=10) == LINES


def test_the_same_work_twice_at_once_is_refused(tmp_path, kind):
    out = place(tmp_path, "recs", kind)

    def other(users):
        with pytest.raises(InputError, match=rf"recs.*: process {os.getpid()} on .* is at the same work; wait"):
            generate(recommend, USERS, out, job=JOB, chunk=20)
        return recommend(users)

    assert generate(other, USERS, out, job=JOB, chunk=20) == LINES


# -- what is damaged, or of others ---------------------------------------------------------------------------------


def stopped_after(parts: int, out: str, **more) -> None:
    calls = []

    def fragile(users):
        if len(calls) == parts:
            raise KeyboardInterrupt
        calls.append(users)
        return recommend(users)

    with pytest.raises(KeyboardInterrupt):
        generate(fragile, USERS, out, job=JOB, chunk=10, **more)


@pytest.mark.parametrize("damage", ["torn", "altered", "gone"])
def test_a_part_that_is_not_as_it_was_written_is_made_again(tmp_path, kind, damage, capsys):
    out = place(tmp_path, "recs", kind)
    stopped_after(4, out)
    part = next(tmp_path.glob("recs*")) / "part-000002.parquet"
    whole = part.read_bytes()
    if damage == "gone":
        part.unlink()
    else:
        part.write_bytes(whole[:-7] if damage == "torn" else whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    capsys.readouterr()
    made = []
    generate(lambda users: made.append(users[0]) or recommend(users), USERS, out, job=JOB, chunk=10)
    said = capsys.readouterr().err
    assert said.count("part-000002.parquet: ") == said.count("; made again") == 1
    assert made == [USERS[20], USERS[40], USERS[50]]
    generate(recommend, USERS, place(tmp_path, "alone", kind), job=JOB, chunk=10)
    assert bytes_of(Path(out)) == bytes_of(Path(place(tmp_path, "alone", kind)))


def test_a_finished_output_that_was_damaged_since_is_made_again(tmp_path, kind, capsys):
    out = place(tmp_path, "recs", kind)
    generate(recommend, USERS, out, job=JOB, chunk=10)
    undisturbed = bytes_of(Path(out))
    victim = Path(out) if kind == "file" else Path(out) / "part-000003.parquet"
    for damage in (lambda: victim.write_bytes(victim.read_bytes()[:-1]), victim.unlink):
        damage()
        assert generate(recommend, USERS, out, job=JOB, chunk=10) == LINES and bytes_of(Path(out)) == undisturbed
        assert f"{victim}: " in capsys.readouterr().err


def test_a_shard_finds_the_damage_of_another(tmp_path, kind):
    out = place(tmp_path, "recs", kind)
    generate(recommend, USERS, out, job=JOB, chunk=10, shard=1, shards=2)
    part = next(tmp_path.glob("recs*")) / "part-000003.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"part-000003.parquet: .* run the command of shard 1 again"):
        generate(recommend, USERS, out, job=JOB, chunk=10, shard=0, shards=2)
    assert generate(recommend, USERS, out, job=JOB, chunk=10, shard=1, shards=2) == LINES


def test_parts_of_another_job_are_refused(tmp_path, kind):
    out = place(tmp_path, "recs", kind)
    for shards in (1, 2):
        stopped_after(1, out, shards=shards)
        for number in (1, 2):
            with pytest.raises(InputError, match=r"recs.*: parts of another job \(k was 3, is 5\); delete the folder"):
                generate(recommend, USERS, out, job=JOB | {"k": 5}, chunk=10, shards=number)
    assert generate(recommend, USERS, out, job=JOB, chunk=10) == LINES


def test_a_finished_file_is_no_obstacle_and_a_finished_folder_is_not_mixed(tmp_path):
    file, folder = place(tmp_path, "recs", "file"), place(tmp_path, "recs", "folder")
    for out in (file, folder):
        generate(recommend, USERS, out, job=JOB, chunk=10)
    four = JOB | {"users": "four"}
    for shards in (1, 2):
        for shard in range(shards):
            assert generate(recommend, USERS[:4], file, job=four, chunk=2, shard=shard, shards=shards) > 0
        assert pl.read_parquet(file).height == 12 and len(bytes_of(Path(file))) == 2
        generate(recommend, USERS, file, job=JOB, chunk=10)
        assert pl.read_parquet(file).height == LINES
    with pytest.raises(InputError, match=r"parts of another job \(users was all, is four\)"):
        generate(recommend, USERS[:4], folder, job=four, chunk=10)


def test_lists_in_a_folder_named_by_a_date_are_verified(tmp_path):
    generate(recommend, USERS, f"{tmp_path}/20261125/", job=JOB, chunk=10)
    assert main(["verify", str(tmp_path / "20261125")]) == SUCCESS


def test_other_folders_and_older_parts_are_refused_in_one_line(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(InputError, match=r"mine: holds other things \(thesis.txt\); name a new or an empty folder"):
        generate(recommend, USERS, tmp_path / "mine", job=JOB)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"schema": "dataset", "version": 1}')
    with pytest.raises(InputError, match="a 'dataset' where a 'lists' is needed"):
        generate(recommend, USERS, tmp_path / "data", job=JOB)
    (tmp_path / "old.parquet.parts").mkdir()
    (tmp_path / "old.parquet.parts" / "job.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"old.parquet.parts: parts of an earlier version of m6rec \(job.json\); delete"
    ):
        generate(recommend, USERS, tmp_path / "old.parquet", job=JOB)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_verify_knows_finished_lists(tmp_path, kind, capsys):
    out = place(tmp_path, "recs", kind)
    folder = tmp_path / ("recs" if kind == "folder" else "recs.parquet.parts")
    stopped_after(2, out)
    assert main(["verify", str(folder)]) == WRONG_INPUT and "are not finished" in capsys.readouterr().err
    generate(recommend, USERS, out, job=JOB, chunk=10)
    assert main(["verify", str(folder)]) == SUCCESS
    victim = Path(out) if kind == "file" else folder / "part-000003.parquet"
    victim.write_bytes(victim.read_bytes()[:-1])
    assert main(["verify", str(folder)]) == WRONG_INPUT and victim.name in capsys.readouterr().err


# -- no room -------------------------------------------------------------------------------------------------------


NO_ROOM = [("file", "part-000003"), ("file", "manifest"), ("file", "recs.parquet"), ("folder", "part-000003")]


@pytest.mark.parametrize(("kind", "refused"), NO_ROOM)
def test_no_room_is_one_line_and_the_next_run_goes_on(tmp_path, kind, refused, monkeypatch):
    """The system refuses the rename of one file: the words of a full disk, whoever writes."""
    out, replace = place(tmp_path, "recs", kind), os.replace
    renames = []

    def full(source, target):
        renames.append(target)
        if Path(target).name.startswith(refused) and len(renames) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("m6rec_jax.artifacts.atomic.os.replace", full)
    kept = {"part-000003": 3, "manifest": 1, "recs.parquet": 6}[refused]
    with pytest.raises(InputError) as caught:
        generate(recommend, USERS, out, job=JOB, chunk=10)
    said = str(caught.value)
    assert Path(said.split(": ")[0]).name.startswith(refused) and ": No space left on device; " in said
    assert f"{kept} finished parts are kept in {next(tmp_path.glob('recs*'))}" in said
    assert said.endswith("free some space, then run the same command again, which goes on from there")
    monkeypatch.undo()
    made = []
    generate(lambda users: made.append(users) or recommend(users), USERS, out, job=JOB, chunk=10)
    assert len(made) == 6 - kept
    generate(recommend, USERS, place(tmp_path, "alone", kind), job=JOB, chunk=10)
    assert bytes_of(Path(out)) == bytes_of(Path(place(tmp_path, "alone", kind)))


FULL = """
    import resource, sys
    import m6rec_jax.decoding.batch as batch
    from m6rec_jax.errors import InputError
    from tests.decoding.jobs import JOB, USERS, recommend
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    try:
        batch.generate(recommend, USERS, sys.argv[1], job=JOB, chunk=10)
    except InputError as error:
        print(error)
"""


@pytest.mark.parametrize("limit", ["a part", "the file"])
def test_the_system_refuses_bytes_to_the_parquet_writer_itself(tmp_path, limit):
    whole, out = tmp_path / "whole.parquet", tmp_path / "full.parquet"
    generate(recommend, USERS, whole, job=JOB, chunk=10)
    part = max(facts["bytes"] for facts in manifest_of(tmp_path / "whole.parquet.parts")["parts"].values())
    assert whole.stat().st_size > part + 100
    room = part - 100 if limit == "a part" else whole.stat().st_size - 50
    argv = [sys.executable, "-c", textwrap.dedent(FULL), str(out), str(room)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    assert ": File too large; " in done.stdout and "ulimit -f" in done.stdout
    assert str(out) in done.stdout.split("; ")[0] and not out.exists()
    assert not list(tmp_path.rglob("*.partial"))
    generate(recommend, USERS, out, job=JOB, chunk=10)
    assert bytes_of(out) == bytes_of(whole)


# -- bounded memory ------------------------------------------------------------------------------------------------

MEMORY = """
    import resource, sys
    import numpy as np, polars as pl
    from m6rec_jax.decoding.batch import COLUMNS, generate
    k, said = 10, {}
    def recommend(users):
        n = k * len(users)
        return pl.DataFrame({
            "user_id": pl.Series([f"user-{u}" for u in users]).gather(np.repeat(np.arange(len(users)), k)),
            "item_id": [f"item-{(i * 7919) % 1000003}" for i in range(n)], "rank": np.tile(np.arange(1, k + 1), len(users)),
            "score": np.random.default_rng(users[0]).random(n), "source": ["model"] * n, "route": ["model+memory"] * n,
            "reason": ["because of something"] * n, "model_version": ["run@7"] * n,
        })
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    users = int(sys.argv[2])
    print(generate(recommend, iter(range(users)), sys.argv[1], job={}, total=users), peak())
"""


def peak(out: str, users: int) -> float:
    """Peak memory in MB of a process that writes ten lines for each of so many users."""
    env = os.environ | {"MALLOC_ARENA_MAX": "1", "POLARS_MAX_THREADS": "2"}
    argv = [sys.executable, "-c", textwrap.dedent(MEMORY), out, str(users)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=env)
    lines, found = done.stdout.split()
    assert int(lines) == 10 * users
    return float(found)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_users(tmp_path):
    """Ten times the users, 10^7 lines in the end, of which a table of all would take more than 500 MB."""
    some, many = peak(str(tmp_path / "some.parquet"), 100_000), peak(str(tmp_path / "many.parquet"), 1_000_000)
    assert many - some < 100


def test_a_job_may_have_more_columns(tmp_path):
    extra = {"evidence": pl.List(pl.Struct({"item_id": pl.String, "share": pl.Float64}))}
    more = lambda users: recommend(users).with_columns(evidence=pl.lit([{"item_id": "i1", "share": 0.5}]))  # noqa: E731
    generate(more, USERS, tmp_path / "more.parquet", job=JOB, chunk=10, columns=COLUMNS | extra)
    table = pl.read_parquet(tmp_path / "more.parquet")
    assert dict(table.schema) == COLUMNS | extra and table["evidence"].to_list() == [[{"item_id": "i1", "share": 0.5}]] * 159  # fmt: skip
    assert generate(more, [], tmp_path / "none.parquet", job=JOB, columns=COLUMNS | extra) == 0
    assert dict(pl.read_parquet(tmp_path / "none.parquet").schema) == COLUMNS | extra
    with pytest.raises(ValueError, match="no column evidence"):
        generate(recommend, USERS, tmp_path / "x.parquet", job=JOB, columns=COLUMNS | extra)
