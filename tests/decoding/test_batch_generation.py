"""Batch generation: one file with the same bytes however often it was stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import polars as pl
import pytest

from m6rec_jax.artifacts.atomic import remove
from m6rec_jax.artifacts.manifest import file_digest
from m6rec_jax.decoding import batch
from m6rec_jax.decoding.batch import COLUMNS, generate
from m6rec_jax.errors import InputError

USERS = [f"用户{i}" for i in range(53)]
JOB = {"model_version": "run@7", "k": 3, "users": "all"}


def recommend(users: list[str]) -> pl.DataFrame:
    n = len(users) * 3
    return pl.DataFrame(
        {
            "rank": [1, 2, 3] * len(users),
            "user_id": np.repeat(users, 3),
            "item_id": [f"i{hash_ % 97}" for hash_ in range(n)],
            "score": np.linspace(0, 1, n),
            "source": ["model"] * n,
            "route": ["history"] * n,
            "reason": [None] * n,
            "model_version": ["run@7"] * n,
        }
    )


def test_all_users_in_order_with_the_contract_columns(tmp_path):
    out = tmp_path / "recs.parquet"
    assert generate(recommend, iter(USERS), out, job=JOB, chunk=10) == 53 * 3
    table = pl.read_parquet(out)
    assert dict(table.schema) == COLUMNS
    assert table["user_id"].unique(maintain_order=True).to_list() == USERS
    assert table["rank"].to_list() == [1, 2, 3] * 53
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recs.parquet", "recs.parquet.job.json"]  # nothing twice
    record = json.loads((tmp_path / "recs.parquet.job.json").read_text(encoding="utf-8"))
    assert record["lines"] == 159 and record["xxh3"] == file_digest(out) and record["job"] == {"chunk": 10, **JOB}


def test_stopped_anywhere_and_rerun_gives_the_same_bytes(tmp_path):
    generate(recommend, USERS, tmp_path / "whole.parquet", job=JOB, chunk=10)
    wanted = (tmp_path / "whole.parquet").read_bytes()
    for stop in range(6):
        out = tmp_path / f"stopped{stop}.parquet"
        calls = []

        def fragile(users, stop=stop, calls=calls):
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(users)
            return recommend(users)

        with pytest.raises(KeyboardInterrupt):
            generate(fragile, USERS, out, job=JOB, chunk=10)
        assert not out.exists()
        again = []
        generate(lambda users, again=again: again.append(users) or recommend(users), USERS, out, job=JOB, chunk=10)
        assert out.read_bytes() == wanted
        assert calls + again == [USERS[i : i + 10] for i in range(0, 53, 10)]  # nobody was asked for twice
        generate(lambda users: pytest.fail("made again"), USERS, out, job=JOB, chunk=10)
        assert out.read_bytes() == wanted
    out.write_bytes(wanted[:-1])  # what was damaged or is gone since is made again
    assert generate(recommend, USERS, out, job=JOB, chunk=10) == 159 and out.read_bytes() == wanted
    out.unlink()
    assert generate(recommend, USERS, out, job=JOB, chunk=10) == 159 and out.read_bytes() == wanted


def test_killed_while_tidying_up_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    out = tmp_path / "recs.parquet"
    gone = []

    def killed(path):
        if len(gone) == 3:
            raise KeyboardInterrupt
        gone.append(path)
        remove(path)

    monkeypatch.setattr(batch, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(recommend, USERS, out, job=JOB, chunk=10)
    monkeypatch.undo()
    wanted = out.read_bytes()
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert generate(lambda users: pytest.fail("made again"), USERS, out, job=JOB, chunk=10) == 159
    assert out.read_bytes() == wanted and not (tmp_path / "recs.parquet.parts").exists()
    other = tmp_path / "copy" / "recs.parquet"
    assert generate(recommend, USERS[:5], other, job=JOB | {"users": "five"}, chunk=10) == 15
    assert pl.read_parquet(other).height == 15 and not (tmp_path / "copy" / "recs.parquet.parts").exists()


SCRIPT = """
    import sys, time
    from tests.decoding.test_batch_generation import JOB, USERS, generate, recommend
    def slow(users):
        time.sleep(float(sys.argv[2]))
        return recommend(users)
    generate(slow, USERS, sys.argv[1], job=JOB, chunk=4)
"""


def test_killed_process_leaves_parts_that_a_rerun_uses(tmp_path):
    out, whole = tmp_path / "killed.parquet", tmp_path / "whole.parquet"
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(out), "0.2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    parts = tmp_path / "killed.parquet.parts"
    waited = time.monotonic()
    while len(list(parts.glob("part-*"))) < 3 and time.monotonic() - waited < 60:
        time.sleep(0.02)
    process.kill()
    process.wait()
    there = len(list(parts.glob("part-*")))
    assert 3 <= there < 14 and not out.exists()
    made = []
    generate(lambda users: made.append(users) or recommend(users), USERS, out, job=JOB, chunk=4)
    assert len(made) == 14 - there
    generate(recommend, USERS, whole, job=JOB, chunk=4)
    assert out.read_bytes() == whole.read_bytes()


def test_parts_of_another_job_are_refused(tmp_path):
    out = tmp_path / "recs.parquet"
    calls = []

    def fragile(users):
        if calls:
            raise KeyboardInterrupt
        calls.append(users)
        return recommend(users)

    with pytest.raises(KeyboardInterrupt):
        generate(fragile, USERS, out, job=JOB, chunk=10)
    with pytest.raises(InputError, match=r"recs.parquet.parts: parts of another job \(k was 3, is 5\)"):
        generate(recommend, USERS, out, job=JOB | {"k": 5}, chunk=10)
    assert generate(recommend, USERS, out, job=JOB, chunk=10) == 159
    assert generate(recommend, USERS[:4], out, job=JOB | {"users": "four"}) == 12  # a finished one is no obstacle
    assert pl.read_parquet(out).height == 12


def test_no_users_and_bad_tables(tmp_path):
    assert generate(recommend, [], tmp_path / "none.parquet", job=JOB) == 0
    assert dict(pl.read_parquet(tmp_path / "none.parquet").schema) == COLUMNS
    with pytest.raises(ValueError, match="no column reason"):
        generate(lambda users: recommend(users).drop("reason"), USERS, tmp_path / "x.parquet", job=JOB)
    assert not list((tmp_path / "x.parquet.parts").glob("*.parquet*"))
    with pytest.raises(InputError, match="is a folder"):
        generate(recommend, USERS, tmp_path, job=JOB)


def test_a_job_may_have_more_columns(tmp_path):
    extra = {"evidence": pl.List(pl.Struct({"item_id": pl.String, "share": pl.Float64}))}
    more = lambda users: recommend(users).with_columns(evidence=pl.lit([{"item_id": "i1", "share": 0.5}]))  # noqa: E731
    generate(more, USERS, tmp_path / "more.parquet", job=JOB, chunk=10, extra=extra)
    table = pl.read_parquet(tmp_path / "more.parquet")
    assert dict(table.schema) == COLUMNS | extra and table["evidence"].to_list() == [[{"item_id": "i1", "share": 0.5}]] * 159  # fmt: skip
    assert generate(more, [], tmp_path / "none.parquet", job=JOB, extra=extra) == 0
    assert dict(pl.read_parquet(tmp_path / "none.parquet").schema) == COLUMNS | extra
    with pytest.raises(ValueError, match="no column evidence"):
        generate(recommend, USERS, tmp_path / "x.parquet", job=JOB, extra=extra)
