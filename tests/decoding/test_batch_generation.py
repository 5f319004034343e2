"""Batch generation: one file with the same bytes however often it was stopped."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time

import numpy as np
import polars as pl
import pytest

from m6rec_jax.artifacts.manifest import read_manifest, verify_files
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
    folder = tmp_path / "recs.parquet.parts"
    manifest = read_manifest(folder, "parts", 1)
    assert manifest["lines"] == 159 and len(manifest["files"]) == 7 and not verify_files(folder, manifest["files"])


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
    generate(recommend, USERS, out, job=JOB)
    with pytest.raises(InputError, match=r"recs.parquet.parts: parts of another job \(k was 3, is 5\)"):
        generate(recommend, USERS, out, job=JOB | {"k": 5})
    out.unlink()
    assert generate(recommend, USERS, out, job=JOB) == 159 and out.is_file()  # joined again from its parts


def test_no_users_and_bad_tables(tmp_path):
    assert generate(recommend, [], tmp_path / "none.parquet", job=JOB) == 0
    assert dict(pl.read_parquet(tmp_path / "none.parquet").schema) == COLUMNS
    with pytest.raises(ValueError, match="no column reason"):
        generate(lambda users: recommend(users).drop("reason"), USERS, tmp_path / "x.parquet", job=JOB)
    assert not list((tmp_path / "x.parquet.parts").glob("*.parquet*"))
    with pytest.raises(InputError, match="is a folder"):
        generate(recommend, USERS, tmp_path, job=JOB)
