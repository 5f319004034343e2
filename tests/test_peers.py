"""The benchmark of other people's recommenders: what crosses between environments, and the peers written here."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers import local
from benchmarks.peers.__main__ import KEY, PEERS, looked, training_events
from benchmarks.peers.environments import SCRIPTS, environment, run_script
from benchmarks.peers.lstm import batches, lstm, windows
from benchmarks.peers.task import Task, best, ranked, timed
from benchmarks.quality import Case
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.histories import held_out, interactions
from tests.fixtures import tiny, tiny_dataset, tiny_root  # noqa: F401


@pytest.fixture(scope="module")
def task() -> Task:
    """Forty users who go round a ring of nine items from a place of their own; user 40 has no training event."""
    sequences = [np.arange(start, start + 5) % 9 for start in range(40)]
    user = np.repeat(np.arange(40), 5)
    histories = [*sequences, np.array([2], np.int64)]
    return Task(user, np.concatenate(sequences), np.arange(41), histories, 41, 10, 4, 0, {})


def test_a_task_survives_its_file(task: Task, tmp_path):
    asked = replace(task, settings={"epochs": 3, "loss": "warp", "rate": 0.1})
    asked.save(tmp_path / "task.npz")
    read = Task.load(tmp_path / "task.npz")
    for name in ("user", "item", "users"):
        np.testing.assert_array_equal(getattr(read, name), getattr(asked, name))
    assert [h.tolist() for h in read.histories] == [h.tolist() for h in asked.histories]
    for name in ("user_count", "catalogue", "k", "seed", "settings"):
        assert getattr(read, name) == getattr(asked, name)


def test_sequences_are_the_training_events_of_each_user(task: Task):
    assert [s.tolist() for s in task.sequences] == [h.tolist() for h in task.histories[:40]]
    assert np.flatnonzero(task.cold).tolist() == [40]


def test_best_is_a_slow_sort_without_the_history():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (30, 12)).astype(np.float32)  # many ties
    histories = [rng.choice(12, rng.integers(0, 12), replace=False) for _ in range(30)]
    rows = best(scores, histories, 5)
    for own, history, row in zip(scores, histories, rows, strict=True):
        left = sorted(set(range(12)) - set(history.tolist()), key=lambda item: (-own[item], item))
        assert row.tolist() == (left + [-1] * 5)[:5]


@pytest.mark.parametrize("system", ["popularity", "item-kNN", "ALS", "BPR", "EASE"])
def test_lists_of_local_peers_are_valid(task: Task, system: str):
    peer = PEERS[system]
    rows, _ = timed(peer.fit, replace(task, settings=peer.settings))
    assert rows.shape == (41, 4)
    for row, history in zip(rows, task.histories, strict=True):
        said = row[row >= 0].tolist()
        assert len(set(said)) == len(said) and not set(said) & set(history.tolist())


def test_ease_is_ridge_regression_of_each_item_on_the_others(task: Task):
    penalty, binary = 3.0, local.counts(task).toarray()
    weights = np.zeros((10, 10))
    for item in range(10):
        others = np.delete(np.arange(10), item)
        table = binary[:, others]
        weights[others, item] = np.linalg.solve(table.T @ table + penalty * np.eye(9), table.T @ binary[:, item])
    had = local.history_matrix(task).toarray()
    rows = local.ease(replace(task, settings={"penalty": penalty}))()
    slow = ranked(lambda part: had[part] @ weights, task)
    scores = had @ weights
    np.testing.assert_allclose(np.take_along_axis(scores, rows, 1), np.take_along_axis(scores, slow, 1), atol=1e-5)


def test_windows_hold_every_step_once():
    sequences = [np.arange(100, 100 + n) for n in (1, 2, 5, 6, 7, 23)]
    steps = [pair for w in windows(sequences, 5) for pair in zip(w[:-1].tolist(), w[1:].tolist(), strict=True)]
    assert sorted(steps) == sorted((a, a + 1) for s in sequences for a in s[:-1].tolist())


def test_an_epoch_holds_every_window():
    rows = [np.arange(n) for n in (2, 3, 4, 5, 9, 17, 17, 18)]
    seen = [row[row >= 0] for batch in batches(rows, 3, np.random.default_rng(0)) for row in batch]
    assert len(seen) == 9  # one was drawn again
    assert {len(row) for row in seen} == {len(row) for row in rows}


def test_the_lstm_learns_a_ring(task: Task):
    settings = {"width": 16, "dropout": 0.0, "length": 8, "batch": 16, "learning_rate": 0.02, "epochs": 40}
    rows = lstm(replace(task, settings=settings))()
    assert np.mean(rows[:40, 0] == (np.arange(40) + 5) % 9) > 0.9


def test_a_script_that_fails_says_why(task: Task):
    with pytest.raises(InputError, match=r"with_lightfm.py: ModuleNotFoundError: No module named 'lightfm'"):
        run_script("with_lightfm.py", task, sys.executable)


def test_a_script_gets_the_task_and_its_lists_come_back(task: Task, tmp_path):
    script = tmp_path / "echo.py"
    script.write_text(
        f"import sys; sys.path.append({str(SCRIPTS)!r})\n"
        "import numpy as np\nfrom task import answer\n"
        "answer(lambda task: lambda: np.array([h[: task.k // 4] for h in task.histories]))\n"
        "assert not {'jax', 'm6rec_jax', 'benchmarks'} & set(sys.modules)\n"
    )
    rows, trained = run_script(str(script), task, sys.executable)
    assert rows.tolist() == [[h[0]] for h in task.histories] and trained >= 0


def test_an_environment_that_cannot_be_made_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"^nowhere: ERROR: No matching distribution found for no-such-peer==1.0$"):
        environment("nowhere", ("no-such-peer==1.0",), tmp_path, sys.executable)
    with pytest.raises(InputError, match="nowhere: .*no-such-python"):
        environment("nowhere", ("no-such-peer==1.0",), tmp_path, "no-such-python")


def test_an_environment_is_made_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("benchmarks.peers.environments.run", lambda _, command: (asked.append(command), (tmp_path / "one").mkdir(exist_ok=True)))  # fmt: skip
    for packages in (("a==1",), ("a==1",), ("a==2",)):
        environment("one", packages, tmp_path, sys.executable)
    assert [command[-1] for command in asked[1::2]] == ["a==1", "a==2"]
    asked.clear()
    lock = tmp_path / "peers.lock"
    for pins in ("a==1 --hash=x", "a==1 --hash=x", "a==2 --hash=x"):  # what the lock says decides, not where it lies
        lock = lock.rename(tmp_path / f"{len(asked)}.lock") if lock.is_file() else lock
        lock.write_text(pins, encoding="utf-8")
        environment("one", (), tmp_path, sys.executable, lock)
    assert len(asked) == 4 and all("--require-hashes" in command for command in asked[1::2])


def test_looks_at_test_targets_are_counted(tmp_path):
    head = dict.fromkeys(KEY, "x")
    assert [looked(tmp_path / "looks", head | {"system": name}) for name in "aba"] == [1, 1, 2]


def test_peers_learn_from_training_events_alone(tiny: Dataset):  # noqa: F811
    events = training_events(tiny)
    counted = np.zeros((tiny.users.height, tiny.catalogue))
    np.add.at(counted, (events["user"].to_numpy(), events["item"].to_numpy()), 1)
    np.testing.assert_array_equal(counted, interactions(tiny).toarray())
    sequences = {user: part["item"].to_list() for (user,), part in events.group_by("user", maintain_order=True)}
    for split, more in (("valid", 0), ("test", 1)):  # histories at test time end with the validation item
        asked = held_out(tiny, split)
        for user, history in zip(asked.users.tolist(), asked.known, strict=True):
            assert history[: len(history) - more].tolist() == sequences[user]


def test_a_second_call_runs_nothing_and_a_look_is_counted(tiny: Dataset, tmp_path: Path, monkeypatch):  # noqa: F811
    results = tmp_path / "peers.json"
    run = []
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "commit", lambda: "c")
    monkeypatch.setattr(command, "cases", lambda names, orders: [Case("ml-100k", "leave-one-out", 0)])
    monkeypatch.setattr(command, "dataset_of", lambda case, options: tiny)
    monkeypatch.setattr(command, "note", run.append)
    write = lambda name, rows: results.write_text(json.dumps({"rows": rows})) and results  # noqa: E731
    monkeypatch.setattr(command, "write_results", write)
    monkeypatch.setattr(sys, "argv", ["peers", "--systems", "popularity", "EASE", "--work", str(tmp_path)])
    for final, wrote in (("", 2), ("", 0), ("1", 2), ("1", 0)):
        run.clear()
        monkeypatch.setenv("FINAL", final)
        command.main()
        assert len(run) == wrote
    assert not command.rows_of(results, "another")
    rows = command.rows_of(results, "c")
    assert [(row["split"], row["system"], row["looks"]) for row in rows] == [
        ("valid", "popularity", 0),
        ("valid", "EASE", 0),
        ("test", "popularity", 1),
        ("test", "EASE", 1),
    ]
    assert all(row["metrics"]["valid_id_rate"] == 1 and 0 <= row["metrics"]["ndcg@10"] <= 1 for row in rows)
