"""`m6rec generate` as a job: killed and run again, shared by processes, out of room, and asked for what cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import m6rec_jax
from m6rec_jax.artifacts.manifest import MANIFEST
from m6rec_jax.cli import SUCCESS, WRONG_INPUT, main
from m6rec_jax.data.prepare import prepare
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.errors import InputError
from m6rec_jax.recommend import gating
from m6rec_jax.recommend.candidates import candidate_table, read_candidates
from m6rec_jax.recommend.code import code_of_lists
from m6rec_jax.recommend.generate import generate
from m6rec_jax.recommend.visitors import Users, read_users
from tests.decoding.test_batch_generation import bytes_of, place
from tests.fixtures import tiny_card, tiny_tables

# Kills itself before the n-th rename or removal under a folder; never, when n is -1. With a limit, files end there.
CHILD = """
    import os, resource, signal, sys
    top, moment, limit, *argv = sys.argv[1:]
    seen = 0
    def watch(event, arguments):
        global seen
        if event in ("os.rename", "os.remove") and str(arguments[0]).startswith(top):
            if event == "os.remove" and not os.path.exists(arguments[0]):
                return
            if seen == int(moment):
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
    sys.addaudithook(watch)
    if limit != "0":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    from m6rec_jax.cli import main
    sys.exit(main(argv))
"""
JOB = ["--users", "all", "--k", "5", "--chunk", "20"]  # 60 users: three parts


def start(top: Path, argv: list[str], moment: int = -1, limit: int = 0, **env: str) -> subprocess.Popen:
    given = [sys.executable, "-c", textwrap.dedent(CHILD), str(top), str(moment), str(limit), *argv]
    return subprocess.Popen(given, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu", **env})


@pytest.fixture(scope="module")
def command(tiny_run, tiny_dataset):
    return ["generate", "--run", str(tiny_run), "--dataset", str(tiny_dataset), *JOB]


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """What the job gives when nothing happens, by engine and kind of output."""
    top, made = tmp_path_factory.mktemp("undisturbed"), {}

    def of(engine: str, kind: str) -> dict[str, bytes]:
        if (engine, kind) not in made:
            out = place(top, f"whole-{engine}", kind)
            assert main([*command, "--engine", engine, "--out", out]) == SUCCESS
            made[engine, kind] = bytes_of(Path(out))
        return made[engine, kind]

    return of


# Moments, in order: the manifest, then each of three parts and the manifest that has it; of a file then the file;
# the manifest that says finished; then three parts and the locks are removed.
MOMENTS = [
    ("auto", "file", 4),
    *(("memory", "file", n) for n in (3, 7, 8, 10)),
    *(("memory", "folder", n) for n in (3, 7)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kind", "moment"), MOMENTS)
def test_killed_and_run_again_gives_the_bytes_of_an_undisturbed_run(
    command, undisturbed, tmp_path, engine, kind, moment
):
    out = place(tmp_path, "killed", kind)
    argv = [*command, "--engine", engine, "--out", out]
    child = start(tmp_path, argv, moment)
    assert child.wait(150) == -signal.SIGKILL, child.stderr.read()
    assert Path(out).is_file() == (kind == "file" and moment > 7)
    assert bytes_of(Path(out)) != undisturbed(engine, kind)
    assert main(argv) == SUCCESS
    assert bytes_of(Path(out)) == undisturbed(engine, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_two_processes_one_of_them_killed(command, undisturbed, tmp_path, kind):
    """By the environment, as a launcher sets it; process 0 has parts 0 and 2, and is killed before it enters the second."""
    argv = [*command, "--engine", "memory", "--out", place(tmp_path, "shared", kind)]
    share = [{"M6REC_PROCESSES": "2", "M6REC_PROCESS_ID": str(number)} for number in range(2)]
    children = [start(tmp_path, argv, (4, -1)[n], **share[n]) for n in range(2)]
    assert [child.wait(150) for child in children] == [-signal.SIGKILL, SUCCESS]
    assert not list(tmp_path.glob("*.parquet"))
    again = start(tmp_path, argv, **share[0])
    assert again.wait(150) == SUCCESS and "20 done before" in again.stderr.read()
    assert bytes_of(Path(place(tmp_path, "shared", kind))) == undisturbed("memory", kind)
    assert main([*argv, "--shards", "2", "--shard", "1"]) == SUCCESS  # any shard again: nothing is to do
    assert bytes_of(Path(place(tmp_path, "shared", kind))) == undisturbed("memory", kind)


@pytest.mark.slow
def test_a_full_disk_is_one_line_of_exit_2_and_the_rest_is_made_later(command, undisturbed, tmp_path):
    """The system lets no file grow beyond a part: the file that joins them is refused."""
    out = tmp_path / "full.parquet"
    argv = [*command, "--engine", "memory", "--out", str(out)]
    manifest = json.loads(undisturbed("memory", "file")["X.parts/manifest.json"])
    part = max(facts["bytes"] for facts in manifest["parts"].values())
    child = start(tmp_path, argv, limit=part + 64)
    assert child.wait(150) == WRONG_INPUT
    last = child.stderr.read().splitlines()[-1]
    assert last == (
        f"m6rec: {out}: File too large; 3 finished parts are kept in {out}.parts; raise the limit of file sizes "
        "(ulimit -f), then run the same command again, which goes on from there"
    )
    assert not out.exists() and main(argv) == SUCCESS
    assert bytes_of(out) == undisturbed("memory", "file")


# -- what a job is ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_another_digest(tiny_dataset, tmp_path_factory):
    """The tiny dataset under another digest: a run keeps no gate for it."""
    made = shutil.copytree(tiny_dataset, tmp_path_factory.mktemp("other") / "other")
    manifest = json.loads((made / MANIFEST).read_text())
    manifest["files"]["index.npz"]["xxh3"] = "0" * 32
    del manifest["seal"]
    (made / MANIFEST).write_text(json.dumps(manifest))
    return made


def job_of(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())["job"]


def test_every_part_has_the_gate_that_was_fitted_first(tiny_run, of_another_digest, tmp_path, monkeypatch):
    """A machine whose gate comes out far otherwise shares the job all the same, and goes on with it."""
    fits, fitted = [], gating._fitted

    def elsewhere(*given, **options):
        fits.append(fitted(*given, **options))
        return replace(fits[-1], bias=fits[-1].bias + 2.0 * (len(fits) - 1))

    ask = lambda out, **more: generate(tiny_run, of_another_digest, k=5, out=tmp_path / out, chunk=20, **more)  # noqa: E731
    ask("alone.parquet")
    monkeypatch.setattr(gating, "_fitted", elsewhere)
    for shard in (1, 0):
        ask("shared.parquet", shard=shard, shards=2)
    assert len(fits) == 1
    alone, shared = (tmp_path / f"{name}.parquet" for name in ("alone", "shared"))
    assert alone.read_bytes() == shared.read_bytes()
    assert ask("shared.parquet") == ask("alone.parquet") and len(fits) == 1  # finished before
    ask("third.parquet")  # another job may have another gate
    ask("fourth.parquet")
    assert len(fits) == 3 and (tmp_path / "fourth.parquet").read_bytes() != alone.read_bytes()


def test_a_job_is_its_inputs_and_its_code(tiny_run, tiny, tmp_path, monkeypatch):
    out = f"{tmp_path}/lists/"
    ask = lambda **more: generate(tiny_run, tiny, limit=30, k=5, out=out, chunk=20, **more)  # noqa: E731
    ask(shard=0, shards=2)
    [own] = (tmp_path / "lists").glob("manifest-0-of-2.json")
    job = json.loads(own.read_text())["job"]
    assert set(job) == {"chunk", "k", "engine", "users", "dataset", "model", "params", "parts", "code"}
    assert job["code"] == code_of_lists() and {"model", "memory"} <= set(job["parts"])
    monkeypatch.setattr("m6rec_jax.recommend.generate.code_of_lists", lambda: "0.1.0+later")
    with pytest.raises(InputError, match=rf"parts of another job .code was {re.escape(job['code'])}, is 0.1.0.later.;"):
        ask(shard=1, shards=2)
    monkeypatch.undo()
    assert ask(shard=1, shards=2) == 150 and job_of(tmp_path / "lists") == job
    monkeypatch.setattr("m6rec_jax.recommend.recommender.Recommender.parts", {"model", "popularity"})
    with pytest.raises(InputError, match="parts was .*, is "):
        ask()


def test_a_batch_keeps_no_prefixes(tiny_run, tiny, tmp_path, monkeypatch):
    """Each user comes once: what was kept would be given up before it could be used."""
    asked, recommend = [], Engine.recommend
    monkeypatch.setattr(Engine, "recommend", lambda self, *given, users=None, **more: asked.append(users) or recommend(self, *given, users=users, **more))  # fmt: skip
    generate(tiny_run, tiny, k=5, out=tmp_path / "r.parquet", limit=9)
    assert asked and set(asked) == {None}


def test_code_is_told_by_what_makes_lists(tmp_path, monkeypatch):
    here = code_of_lists()
    copy = shutil.copytree(Path(m6rec_jax.__file__).parent, tmp_path / "m6rec_jax", ignore=shutil.ignore_patterns("*.pyc"))  # fmt: skip
    monkeypatch.setattr(m6rec_jax, "__file__", str(copy / "__init__.py"))
    again = code_of_lists.__wrapped__
    assert again() == here and here.startswith(m6rec_jax.__version__)
    for path, same in (("cli/verify.py", True), ("training/fit.py", True), ("decoding/beam.py", False)):
        with open(copy / path, "a") as file:
            file.write("# a word\n")
        assert (again() == here) is same, path


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"user_id": [1.0, 2.0]}, "column user_id is of type Float64; ids are texts or whole numbers"),
        ({"user_id": [["u1"], ["u2"]]}, r"column user_id is of type List\(String\); ids are"),
        ({"user_id": [True, False]}, "column user_id is of type Boolean; ids are"),
        ({"user_id": ["u1"], "history": [1.5]}, "column history is of type Float64; a history is a list of item ids"),
        ({"user_id": ["u1"], "history": [[1.5]]}, r"column history is of type List\(Float64\); a history is"),
        ({"user_id": ["u1", None]}, "no user_id in row 2"),
        ({"user_id": pl.Series([], dtype=pl.String)}, "names no user"),
        ({"id": ["u1"]}, "no column user_id .there are id"),
    ],
)
def test_a_parquet_file_of_users_with_wrong_columns_is_one_line(tmp_path, table, says):
    file = tmp_path / "u[1].parquet"  # no pattern
    pl.DataFrame(table).write_parquet(file)
    with pytest.raises(InputError, match=f"--users {re.escape(str(file))}: {says}"):
        read_users(file)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"item_id": [["a"], ["b"]]}, r"column item_id is of type List\(String\); ids are texts or numbers, one a row"),
        ({"item_id": [True]}, "column item_id is of type Boolean; ids are"),
        ({"item_id": [b"a"]}, "column item_id is of type Binary; ids are"),
        ({"item_id": ["a"], "user_id": [["u1"]]}, r"column user_id is of type List\(String\); ids are"),
        ({"item": ["a"]}, "no column item_id .there are item"),
    ],
)
def test_a_parquet_file_of_candidates_with_wrong_columns_is_one_line(tmp_path, table, says):
    file = tmp_path / "c.parquet"
    pl.DataFrame(table).write_parquet(file)
    with pytest.raises(InputError, match=f"--candidates {re.escape(str(file))}: {says}"):
        read_candidates(file)
    same = pl.Series(["7", "8"])
    for ids in (pl.Series([7, 8]), pl.Series([7.0, 8.0]), same.cast(pl.Categorical)):
        assert candidate_table(pl.DataFrame({"item_id": ids}))["item_id"].to_list() == same.to_list()


def test_a_parquet_file_that_breaks_off_is_one_line(tmp_path):
    file = tmp_path / "u.parquet"
    pl.DataFrame({"user_id": [f"u{n}" for n in range(5000)], "about": np.random.default_rng(0).random(5000)}).write_parquet(file)  # fmt: skip
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) // 4) + whole[len(whole) * 3 // 4 :])
    with pytest.raises(InputError, match=f"--users {file}: not readable as parquet"):
        list(read_users(file).blocks())


def test_ids_are_exact_and_the_first_row_of_a_user_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("m6rec_jax.recommend.visitors.BLOCK", 3)
    big = 2**53 + 1
    file = tmp_path / "u.parquet"
    frame = pl.DataFrame({"user_id": [big, 7, big, 8, 7, 9], "history": [["a"], ["b"], ["c"], ["d"], ["e"], []]})
    frame.write_parquet(file)
    users = read_users(file)
    assert f"--users {file}: 2 rows name a user again; the first of each counts" in capsys.readouterr().err
    assert users.ids.to_list() == [str(big), "7", "8", "9"]
    assert [row for block in users.blocks() for row in block.select("user_id", "history").rows()] == [
        (str(big), ["a"]), ("7", ["b"]), ("8", ["d"]), ("9", []),
    ]  # fmt: skip
    text = Users.of(frame.with_columns(pl.col("user_id").cast(pl.String).cast(pl.Categorical)))
    assert text.ids.to_list() == users.ids.to_list() and "2 rows name a user again" in capsys.readouterr().err


READ = """
    import resource, sys
    import polars as pl
    from m6rec_jax.recommend.visitors import read_users
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    users = read_users(sys.argv[1])
    before = peak()
    rows = sum(block.height for block in users.blocks())
    print(rows, peak() - before)
"""


@pytest.mark.slow
def test_a_file_of_users_is_read_block_by_block(tmp_path):
    """Twenty events each: as Python strings all at once they would be some 80 MB for each 65,536 users."""
    file, count = tmp_path / "u.parquet", 400_000
    history = pl.Series([[f"item-{n}" for n in range(20)]]).new_from_index(0, count)
    pl.DataFrame({"user_id": range(count), "history": history}).write_parquet(file, row_group_size=1 << 16)
    env = os.environ | {"MALLOC_ARENA_MAX": "1", "POLARS_MAX_THREADS": "2"}
    argv = [sys.executable, "-c", textwrap.dedent(READ), str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    rows, grown = map(float, done.stdout.split())
    assert rows == count and grown < 200


def test_blocks_of_any_size_make_the_same_job(tiny_run, tiny, tmp_path, monkeypatch, capsys):
    frame = pl.DataFrame({"user_id": ["u5", "s1", "u5", "s2", "u6", "s3"], "history": [[], ["item-3"], [], ["item-9", "no"], [], ["item-9"]]})  # fmt: skip
    said = []
    for block in (1, 2, 100):
        monkeypatch.setattr("m6rec_jax.recommend.visitors.BLOCK", block)
        generate(tiny_run, tiny, users=frame, out=tmp_path / f"{block}.parquet", k=3, chunk=2, engine="memory")
        said.append([line for line in capsys.readouterr().err.splitlines() if " ids are not in " in line or "items of their" in line])  # fmt: skip
    assert len({(tmp_path / f"{block}.parquet").read_bytes() for block in (1, 2, 100)}) == 1
    assert len({str(lines) for lines in said}) == 1 and len(said[0]) == 2 and "3 of 5 ids" in said[0][0]
    table = pl.read_parquet(tmp_path / "1.parquet")
    assert table["user_id"].unique(maintain_order=True).to_list() == ["u5", "s1", "s2", "u6", "s3"]
    limited = generate(tiny_run, tiny, users=frame, limit=2, out=tmp_path / "two.parquet", k=3, engine="memory")
    assert limited == 6 and pl.read_parquet(tmp_path / "two.parquet").equals(table[:6])


def test_what_cannot_be_listed_is_said_and_the_lists_end_there(command, tmp_path, capsys):
    argv = [*command, "--engine", "memory", "--limit", "3", "--out"]
    assert main([*argv, str(tmp_path / "none.parquet"), "--filter", "price < -1"]) == SUCCESS
    assert "no item may be shown, so every list is empty; widen the filter" in capsys.readouterr().err
    assert pl.read_parquet(tmp_path / "none.parquet").height == 0
    (tmp_path / "two.txt").write_text("item-3\nitem-9\n")
    assert main([*argv, str(tmp_path / "two.parquet"), "--candidates", str(tmp_path / "two.txt")]) == SUCCESS
    assert "k=5: only 2 items may be shown, and lists end there" in capsys.readouterr().err
    table = pl.read_parquet(tmp_path / "two.parquet")
    assert set(table["item_id"]) <= {"item-3", "item-9"} and table["rank"].max() <= 2


def test_unknown_users_of_a_file_get_lists_and_a_line_and_a_file_of_none_but_them_is_refused(command, tmp_path, capsys):
    pl.DataFrame({"user_id": ["u5", "who"]}).write_parquet(tmp_path / "u.parquet")
    argv = [
        *command,
        "--engine",
        "memory",
        "--users",
        str(tmp_path / "u.parquet"),
        "--out",
        str(tmp_path / "r.parquet"),
    ]
    assert main(argv) == SUCCESS
    assert "1 of 2 ids are not in" in capsys.readouterr().err
    assert pl.read_parquet(tmp_path / "r.parquet").group_by("user_id").len().sort("user_id").rows() == [("u5", 5), ("who", 5)]  # fmt: skip
    pl.DataFrame({"user_id": ["who", "else"]}).write_parquet(tmp_path / "u.parquet")
    assert main(argv) == WRONG_INPUT
    assert "none of the 2 ids is in" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_over_another_catalogue_is_refused_before_anything_is_written(tiny_run, tmp_path, capsys):
    tables = tiny_tables()
    events = tables["events"].with_columns(i="x" + pl.col("i"))
    strange = tables | {"items": tables["items"].with_columns(id="x" + pl.col("id")), "events": events}
    other = prepare(tiny_card(strange, name="other"), tmp_path / "other", like=tiny_run)
    argv = ["generate", "--run", str(tiny_run), "--dataset", str(other.path), *JOB, "--out", str(tmp_path / "r/")]
    assert main(argv) == WRONG_INPUT
    assert "its catalogue does not begin with the 56 items of" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--shards", "2"], "--shards=2 --shard=None: say how many"),
        (["--shards", "2", "--shard", "2"], "--shards=2 --shard=2: say how many"),
        (["--chunk", "0"], "--chunk=0: must be above 0"),
    ],
)
def test_wrong_shares_of_the_work_are_one_line(given, says, capsys):
    assert main(["generate", "--run", "r", "--users", "all", "--out", "o", *given]) == WRONG_INPUT
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("env", [{"M6REC_PROCESSES": "2"}, {"M6REC_PROCESSES": "2", "M6REC_PROCESS_ID": "two"}])
def test_half_a_job_in_the_environment_is_one_line(env, monkeypatch, capsys):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert main(["generate", "--run", "r", "--users", "all", "--out", "o"]) == WRONG_INPUT
    assert "M6REC_PROCESSES=2" in capsys.readouterr().err


def test_a_slurm_step_is_a_job(monkeypatch):
    from m6rec_jax.cli.processes import shard_of_job

    assert shard_of_job(None, None) == (None, None)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert shard_of_job(None, None) == (3, 4) and shard_of_job(0, 2) == (0, 2)
