"""The benchmark of decoding: what systems share, what is compared, and what is measured in which way."""

from argparse import Namespace

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.decoding import __main__ as command
from benchmarks.decoding import kernel, ours, setting, table
from benchmarks.decoding.work import System, Work, children, measure
from m6rec_jax.decoding.trie import allowed_under, build_trie
from m6rec_jax.errors import InputError


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    return setting.lay_out(tmp_path_factory.mktemp("decoding"))


def test_the_setting_is_what_the_table_says(work: Work):
    assert setting.BLUEPRINT.parameters() == pytest.approx(6.6e6, rel=0.01)
    assert len(np.unique(work.codes, axis=0)) == setting.CATALOGUE
    assert work.codes.min() >= 0 and work.codes.max() < setting.CODEBOOK
    assert work.prefixes.shape == (setting.USERS, 1 + 4 * setting.EVENTS)
    read = Work.load(work.folder)
    spelled = read.prefixes[:, 1:].reshape(setting.USERS, setting.EVENTS, 4) - read.offsets
    np.testing.assert_array_equal(read.rows(spelled), read.histories)
    assert work.rows(np.full((2, 4), 255)).tolist() == [-1, -1] or (work.codes == 255).all(1).any()
    restored = setting.load_params(work.folder)
    assert set(restored) == {"embeddings", "block", "final_norm"}


def test_the_table_of_children_spells_the_catalogue_and_nothing_else(work: Work):
    codes = work.codes[:3000]
    child = children(codes, 256)
    node = np.zeros(len(codes), np.int64)
    for level, code in enumerate(codes.T):
        after = child[node, code]
        assert (after >= 0).all()
        nodes = build_trie(codes).size[level]
        used = np.unique(node)
        assert len(used) == nodes
        assert (child[used] >= 0).sum() == build_trie(codes).size[level + 1]
        node = after
    assert len(np.unique(node)) == len(codes)


def test_measure_times_what_it_says():
    asked, prepared = [], []

    def ask(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        asked.append(users.tolist())
        return np.array([[3, 3, -1, 4]] * len(users)), np.zeros((len(users), 4))

    made = measure(System(ask, lambda users: prepared.append(users.tolist())), 5, 2, warm=2, calls=3, seconds=60)
    assert asked == prepared == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]
    assert made["calls"] == 3 and made["rows"] == [[3, 3, -1, 4]] * 2
    assert made["valid_rate"] == 0.5  # of four places two hold an item that was not there before
    assert made["users_per_s"] > 0 and made["p50_ms"] <= made["p95_ms"] and made["peak_mb"] > 10
    few = measure(System(ask), 5, 2, warm=1, calls=9, seconds=0)
    assert few["calls"] == 2
    assert set(measure(System(ask), 5, 2, warm=1, calls=0, seconds=0)) == {"rows", "scores"}


def test_other_lists_or_scores_are_not_timed(monkeypatch):
    same = {"rows": [[1, 2, 3]], "scores": [[-1.0, -2.0, -3.0]]}
    moved = {"rows": [[1, 3, 2]], "scores": [[-1.0, -2.9995, -3.0]]}
    assert command.distance(same, same) == (0, 1)
    assert command.distance(same, moved) == (pytest.approx(1.0), 1.0)
    other = {"rows": [[1, 2, 9]], "scores": same["scores"]}
    assert command.distance(same, other) == (0, pytest.approx(2 / 3))
    options = Namespace(systems=["hf", "cold"], dtypes=["float32"], threads=[1])
    for wrong in (moved, other):
        answers = {"cold": same, "hf": wrong}
        with pytest.raises(InputError, match="hf: .* not the same work, so it is not timed"):
            command.prove_parity(lambda system, answers=answers, **job: answers[system], options)
    command.prove_parity(lambda system, **job: same, options)


def test_the_fastest_way_of_a_trial_is_used_everywhere():
    options = Namespace(systems=["cold"], batches=[1, 8, 32], beams=[10, 20], threads=[1, 2], dtypes=["float32", "bfloat16"], every=False)  # fmt: skip
    rows: list[dict] = []
    for job in command.plan(rows, options):
        rows.append(job | {"users_per_s": job["threads"] + (job["dtype"] == "bfloat16")})
    trials, rest = rows[:4], rows[4:]
    assert {(r["batch"], r["beams"]) for r in trials} == {(8, 20)}
    assert {(r["threads"], r["dtype"]) for r in trials} == {
        (1, "float32"),
        (1, "bfloat16"),
        (2, "float32"),
        (2, "bfloat16"),
    }
    assert {(r["batch"], r["beams"]) for r in rest} == {(b, m) for b in (1, 8, 32) for m in (10, 20)}
    assert {(r["threads"], r["dtype"]) for r in rest} == {(2, "bfloat16")}
    chosen = table.best([*rows, {"system": "prefill", "batch": 8}])
    assert chosen["cold", 8, 20]["users_per_s"] == 3


@pytest.mark.slow  # three programs of six layers to compile
def test_ours_find_the_same_items(work: Work):
    job, users = {"dtype": "float32", "beams": 4}, np.arange(2)
    rows, scores = ours.cold(work, job).ask(users)
    reference = {"rows": rows.tolist(), "scores": scores.tolist()}
    for system, limit in ((ours.warm, 1e-4), (ours.int8, 0.5)):
        made = system(work, job)
        if made.before is not None:
            made.before(users)
        rows, scores = made.ask(users)
        assert (rows >= 0).all() and (np.diff(scores) <= 0).all()
        difference, same = command.distance(reference, {"rows": rows.tolist(), "scores": scores.tolist()})
        assert difference < limit and same >= 0.75


def test_the_constraint_alone_spells_allowed_items():
    rng = np.random.default_rng(0)
    codes = kernel.spellings(rng, 500)
    assert len(np.unique(codes, axis=0)) == 500
    trie = build_trie(codes)
    allowed = np.arange(500) % 3 == 0
    under = allowed_under(trie, allowed)
    none = jnp.full((2, 4), -1)
    logp = [jnp.zeros((2, 1 if t == 0 else 5, kernel.CODEBOOK)) for t in range(kernel.LEVELS)]
    beams, parents = kernel.constraint(5, trie, (under, none, none, jnp.zeros((2, 4)), jnp.zeros(2)), logp)
    found = np.asarray(beams.node) - trie.leaf0
    assert found.shape == (2, 5) and ((found >= 0) & (found < 500)).all() and len(parents) == kernel.LEVELS
    assert allowed[trie.row[found]].all()
