"""An engine on four devices, users spread over them: the answers of one device, and nothing exchanged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from m6rec_jax.decoding import programs
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.decoding.shapes import batches, rows_of
from m6rec_jax.recommend.recommender import Recommender
from m6rec_jax.vocab import BOS
from tests.decoding.worlds import CATALOGUE, World, text_engine, world
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401
from tests.recommend.conftest import saved_run

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def over(w: World, devices: int, **more) -> Engine:
    """The engine of a world on some of the devices."""
    one = w.engine
    content, seen = (np.asarray(x)[:CATALOGUE] for x in (one.items.content, one.items.seen))
    return Engine(w.model, one.codes, content, seen, length=48, devices=jax.local_devices()[:devices], **more)


def asked(w: World, users: int):
    """Requests of everything at once: histories, exclusions, memory with gate, heat, a filter."""
    rng = np.random.default_rng(7)
    histories = [w.histories[u % len(w.histories)] for u in range(users)]
    support = np.stack([rng.choice(CATALOGUE, 5, replace=False) for _ in range(users)]).astype(np.int32)
    return histories, {
        "exclude": histories, "memory": (support, rng.random((users, 5)).astype(np.float32)),
        "gate": rng.random(users).astype(np.float32) / 2, "temperature": (0.5 + rng.random(users)).astype(np.float32),
        "allowed": np.arange(CATALOGUE) % 3 != 0, "k": 4, "beams": 8,
    }  # fmt: skip


@pytest.mark.parametrize("levels", [1, 3])
def test_four_devices_answer_as_one(levels):
    w = world(levels)
    engine = over(w, 4)
    assert engine.devices.count == 4 and all(len(x.devices()) == 4 for x in jax.tree.leaves(engine.params))
    histories, options = asked(w, 11)
    for u in (11, 1):  # fewer users than devices too
        some = {n: x[:u] if n in ("exclude", "gate", "temperature") else x for n, x in options.items()}
        some["memory"] = tuple(part[:u] for part in options["memory"])
        one, four = (e.recommend(histories[:u], **some) for e in (w.engine, engine))
        assert np.array_equal(one.rows, four.rows) and np.array_equal(one.exact, four.exact)
        for name in ("scores", "model_logp", "memory_logp"):
            np.testing.assert_allclose(getattr(four, name), getattr(one, name), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(engine.states(histories), w.engine.states(histories), rtol=1e-5, atol=1e-5)
    rows = np.arange(11)
    np.testing.assert_allclose(engine.score(histories, rows), w.engine.score(histories, rows), rtol=1e-5, atol=1e-5)


def test_each_device_has_its_own_users_and_none_waits_for_another(monkeypatch):
    w = world(3)
    engine, calls = over(w, 4), []
    program = programs.spread
    monkeypatch.setattr(programs, "spread", lambda *given: calls.append(given) or program(*given))
    histories, rows = [w.histories[3]] * 8, np.arange(8)
    found = engine.recommend(histories, k=4, beams=8)
    engine.rank(histories, rows[:, None])
    engine.steps(histories, rows[:, None])
    engine.score(histories, rows, temperatures=[1.0, 2.0])
    engine.states(histories)
    engine.item_vectors(rows)
    asked = ["recommend", "rank", "walk", "score", "states", "item_vectors"]
    assert [given[0] for given in calls] == [getattr(programs, name) for name in asked]
    for name, given in zip(asked, calls, strict=True):
        rows_of_each = {shard.data.shape[0] for x in jax.tree.leaves(given[-1]) for shard in x.addressable_shards}
        assert rows_of_each == {64 if name == "item_vectors" else 2}
        compiled = program.lower(*given).compile().as_text()
        assert not [one for one in COLLECTIVES if one in compiled], name
    assert (found.rows >= 0).all()


def test_callers_of_many_threads_do_not_wait_for_each_other():
    """Programs that exchanged arrays would, when devices are given two of them in different order."""
    w = world(3)
    engine, histories = over(w, 4), w.histories[1:5]
    ask = (
        lambda: engine.score(histories, np.arange(4)), lambda: engine.states(histories),
        lambda: engine.rank(histories, np.arange(8).reshape(4, 2)).scores, lambda: engine.recommend(histories, k=4, beams=8).scores,
    )  # fmt: skip
    expected = [one() for one in ask]
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(ask[n % 4]) for n in range(80)]
        for n, one in enumerate(found):
            assert np.array_equal(one.result(60), expected[n % 4])


def test_known_users_find_their_programs_compiled():
    w = world(3)
    engine, settings = over(w, 4, cache_tokens=1024), {"k": 6, "beams": 8}
    of_known = (programs.read, programs.find, programs.keep, programs.read_on)
    sizes = lambda: [program._cache_size() for program in of_known]  # noqa: E731
    before = sizes()
    assert engine.compile(**settings, batches=(1,), lengths=(40,), users=True) == [(1, 64), (4, 64)]
    made, history = sizes(), w.histories[5]
    assert [now - then for now, then in zip(made, before, strict=True)] == [1, 1, 1, 1]
    for longer in (history, np.append(history, 7), history):  # read, read on, read anew
        engine.recommend([longer], users=["ann"], **settings)
    assert sizes() == made


def test_known_users_and_a_new_checkpoint_work_on_several_devices():
    w = world(3)
    engine = over(w, 2, cache_tokens=1024)
    histories, names = w.histories[1:5], ["a", "b", "c", "d"]
    expected = w.engine.recommend(histories, k=4, beams=8)
    for _ in range(2):  # read whole, then from what was kept
        found = engine.recommend(histories, users=names, k=4, beams=8)
        assert np.array_equal(found.rows, expected.rows)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-5)
    engine.params = jax.tree.map(lambda x: x * 0.5, w.engine.params)
    assert not np.allclose(engine.recommend(histories, k=4, beams=8).scores, expected.scores, atol=1e-3)


def test_items_that_are_given_are_scored_and_explained_as_on_one_device():
    w = world(3)
    engine, histories = over(w, 4), w.histories[1:5]
    rows = np.arange(20).reshape(4, 5)
    one, four = (e.rank(histories, list(rows)) for e in (w.engine, engine))
    assert np.array_equal(one.rows, four.rows)
    np.testing.assert_allclose(four.scores, one.scores, rtol=1e-5, atol=1e-5)
    one, four = (e.steps(histories, rows) for e in (w.engine, engine))
    assert np.array_equal(one.place, four.place)
    np.testing.assert_allclose(four.logp, one.logp, rtol=1e-5, atol=1e-5)


def test_texts_are_those_of_one_device():
    prompts = [[BOS], [BOS, 160, 161]]
    one, four = (text_engine(2, devices=n).write(prompts, most=8, seeds=[1, 2]) for n in (1, 4))
    assert one == four


def test_rows_are_a_multiple_of_the_devices_and_few_shapes():
    for devices in (1, 3, 4):
        shapes = {rows_of(users, 16, devices) for users in range(1, 16 * devices + 1)}
        assert shapes == {devices * n for n in (1, 2, 4, 8, 16)}
        cut = list(batches([10] * 100, 8, devices))
        assert sum(len(chosen) for chosen, _, _ in cut) == 100 and all(B % devices == 0 and len(chosen) <= B for chosen, _, B in cut)  # fmt: skip


def test_a_run_opened_to_recommend_takes_every_device(tiny_dataset, tmp_path):  # noqa: F811
    recommender = Recommender.load(saved_run(tiny_dataset, tmp_path / "run"))
    count = jax.local_device_count()
    assert recommender.engine.devices.count == count > 1 and recommender.batch == 512 * count
