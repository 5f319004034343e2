"""Requests gathered by a thread: like with like, in time, bounded, each answered as if alone."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor

import jax
import numpy as np
import pytest

from m6rec_jax.decoding import programs
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.decoding.gather import Busy, Gatherer
from tests.decoding.test_engine import requests
from tests.decoding.worlds import CATALOGUE, World, world

LONG = 60.0  # nobody waits so long, or the test fails


class Desk:
    """Answers `(kind, request)`, writes down its batches, and works only while `open`."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.begun, self.open = threading.Event(), threading.Event()
        self.open.set()

    def __call__(self, kind: str, asked: list[int]) -> list[tuple[str, int]]:
        self.begun.set()
        assert self.open.wait(LONG)
        self.batches.append((kind, asked))
        if -1 in asked:
            raise ValueError("-1 is not a request")
        return [(kind, one) for one in asked]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_like_requests_leave_together_when_the_batch_is_full(desk):
    queue = Gatherer(desk, wait=LONG, most=3)
    futures = [queue.submit("a", 0)]
    assert not desk.begun.wait(0.05)  # it waits for company
    futures += [queue.submit("ab"[i % 2], i) for i in range(1, 6)]
    assert [f.result(LONG) for f in futures] == [("ab"[i % 2], i) for i in range(6)]
    assert desk.batches == [("a", [0, 2, 4]), ("b", [1, 3, 5])]
    queue.close()


def test_nobody_waits_longer_than_said(desk):
    queue = Gatherer(desk, wait=0.01, most=100)
    assert queue.submit("a", 1).result(LONG) == ("a", 1)
    assert queue.submit("b", 2).result(LONG) == ("b", 2)
    queue.close()


def test_answers_of_the_wrong_number_reach_who_asked_and_end_nothing():
    queue = Gatherer(lambda kind, asked: asked[:-1] if "too few" in kind else asked, wait=0.0, most=2)
    for _ in range(2):
        with pytest.raises(ValueError):
            queue.submit("too few", 1).result(LONG)
    assert queue.submit("enough", 2).result(LONG) == 2  # by the same thread
    queue.close()


def test_a_callback_may_close():
    queue = Gatherer(lambda kind, asked: asked, wait=0.0, most=1)
    closed = threading.Event()

    def end(future):
        queue.close()
        closed.set()

    queue.submit("a", 1).add_done_callback(end)
    assert closed.wait(LONG)


def test_a_full_queue_refuses_and_goes_on(desk):
    desk.open.clear()
    queue = Gatherer(desk, wait=0, most=1, room=2)
    futures = [queue.submit("a", 0)]
    assert desk.begun.wait(LONG)  # no longer waiting: it is being answered
    futures += [queue.submit("a", 1), queue.submit("b", 2)]
    with pytest.raises(Busy, match="2 requests wait already"):
        queue.submit("a", 3)
    desk.open.set()
    assert [f.result(LONG)[1] for f in futures] == [0, 1, 2]
    assert queue.submit("a", 4).result(LONG) == ("a", 4)
    queue.close()


def test_closing_answers_who_waits_and_ends_the_thread(desk):
    queue = Gatherer(desk, wait=LONG, most=100)
    futures = [queue.submit("a", i) for i in range(3)] + [queue.submit("b", 7)]
    thread = queue._thread
    queue.close()
    assert all(f.done() for f in futures) and desk.batches == [("a", [0, 1, 2]), ("b", [7])]
    assert thread is not None and not thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        queue.submit("a", 1)
    queue.close()
    Gatherer(desk).close()  # nothing was ever asked


def test_an_idle_queue_has_no_thread_and_holds_nothing_alive(desk):
    queue = Gatherer(desk, wait=0.0, most=1)
    assert queue.submit("a", 1).result(LONG) == ("a", 1)
    if (thread := queue._thread) is not None:
        thread.join(LONG)
    assert queue._thread is None
    assert queue.submit("a", 2).result(LONG) == ("a", 2)  # another one
    gone = weakref.ref(queue)
    queue.close()
    del queue, thread
    gc.collect()
    assert gone() is None


def test_who_was_submitted_is_answered_before_the_interpreter_ends():
    code = (
        "import time\n"
        "from m6rec_jax.decoding.gather import Gatherer\n"
        "def answer(kind, asked):\n"
        "    time.sleep(0.2)\n"
        "    return asked\n"
        "Gatherer(answer).submit('a', 'answered').add_done_callback(lambda f: print(f.result()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG, check=True)
    assert (done.stdout, done.stderr) == ("answered\n", "")


def test_several_threads_submit_at_once(desk):
    queue = Gatherer(desk, wait=0.001, most=7)
    asked = [(kind, i) for i in range(25) for kind in "ab"]
    with ThreadPoolExecutor(8) as pool:
        futures = list(pool.map(lambda one: queue.submit(*one), asked))
    assert [f.result(LONG) for f in futures] == asked
    assert sorted((kind, i) for kind, batch in desk.batches for i in batch) == sorted(asked)  # each once, with its like
    queue.close()


def test_a_bad_request_spoils_no_other(desk):
    queue = Gatherer(desk, wait=LONG, most=3)
    good, bad, other = (queue.submit("a", i) for i in (1, -1, 2))
    assert good.result(LONG) == ("a", 1) and other.result(LONG) == ("a", 2)
    with pytest.raises(ValueError, match="-1 is not a request"):
        bad.result(LONG)
    queue.close()


def test_a_cancelled_request_is_not_answered(desk):
    desk.open.clear()
    queue = Gatherer(desk, wait=0, most=5)
    first = queue.submit("a", 0)
    assert desk.begun.wait(LONG)
    second, third = queue.submit("a", 1), queue.submit("a", 2)
    assert second.cancel()
    desk.open.set()
    assert first.result(LONG) == ("a", 0) and third.result(LONG) == ("a", 2)
    with pytest.raises(CancelledError):
        second.result(LONG)
    assert desk.batches == [("a", [0]), ("a", [2])]
    queue.close()


# -- through the engine --------------------------------------------------------------------------------------------


def opened(w: World) -> Engine:
    """An engine of its own with a queue that waits for company."""
    content, seen = (np.asarray(x)[:CATALOGUE] for x in w.engine.items)
    engine = Engine(w.model, w.engine.codes, content, seen, length=48)
    engine.queue.wait, engine.queue.most = LONG, len(w.histories)
    return engine


def test_submitted_requests_are_answered_as_if_alone(any_world, monkeypatch):
    w, ran, original = any_world, [], programs.recommend
    engine, asked = opened(w), requests(w)

    def spy(*args):
        ran.append(len(args[-1].lengths))
        return original(*args)

    monkeypatch.setattr(programs, "recommend", spy)
    rows, mass = asked["memory"]
    futures = [
        engine.submit(
            h, k=7, beams=2, memory=(rows[u], mass[u]), gate=asked["gate"][u], exclude=asked["exclude"][u],
            allowed=asked["allowed"].copy(), times=np.zeros(len(h), np.int64) if u % 2 else None, queries={},
        )
        for u, h in enumerate(w.histories)
    ]  # fmt: skip
    expected = w.engine.recommend(w.histories, k=7, beams=2, **asked)
    for u, future in enumerate(futures):
        found = future.result(LONG)
        assert found.rows.tolist() == [expected.rows[u].tolist()] and found.exact == [expected.exact[u]]
        np.testing.assert_allclose(found.scores[0], expected.scores[u], atol=1e-4)
    assert ran == [8, 8]  # all in one batch, like those asked at once
    engine.close()


def test_other_settings_ride_in_another_batch_and_errors_come_through():
    w = world(3)
    engine = opened(w)
    engine.queue.wait = 0.2
    h, some = w.histories[3], np.arange(CATALOGUE) % 2 == 0
    plain, filtered, bad = engine.submit(h, k=7), engine.submit(h, k=7, allowed=some), engine.submit(np.array([999]))
    some[:] = True  # whoever submitted goes on writing into what was given
    assert plain.result(LONG).rows.shape == (1, 7)
    assert (filtered.result(LONG).rows % 2 == 0).all() and not (plain.result().rows % 2 == 0).all()
    with pytest.raises(ValueError, match="outside the catalogue"):
        bad.result(LONG)
    engine.close()


def test_what_was_submitted_is_what_was_there_then():
    w = world(3)
    engine, asked = opened(w), requests(w)
    rows, mass = asked["memory"]
    given = [
        {"history": h.copy(), "times": np.arange(len(h)) * 90_000, "memory": (rows[u].copy(), mass[u].copy()),
         "exclude": asked["exclude"][u].copy(), "gate": float(asked["gate"][u])}
        for u, h in enumerate(w.histories)
    ]  # fmt: skip
    futures = [engine.submit(k=5, **own) for own in given[:-1]]  # the batch waits for one more
    for own in given[:-1]:
        for part in (own["history"], own["times"], own["exclude"], *own["memory"]):
            part[:] = 0
    futures.append(engine.submit(k=5, **given[-1]))
    expected = w.engine.recommend(
        w.histories, times=[np.arange(len(h)) * 90_000 for h in w.histories], memory=asked["memory"],
        gate=asked["gate"], exclude=asked["exclude"], k=5,
    )  # fmt: skip
    for u, future in enumerate(futures):
        np.testing.assert_allclose(future.result(LONG).scores[0], expected.scores[u], atol=1e-4)
        assert future.result().rows.tolist() == [expected.rows[u].tolist()]
    engine.close()


def test_a_call_is_answered_by_one_checkpoint(monkeypatch):
    w, original = world(3), programs.recommend
    engine = opened(w)
    old, new = engine.params, jax.tree.map(lambda x: x * 0.5, engine.params)
    by_old = engine.recommend(w.histories, k=5, beams=2, widen=8)
    engine.params = new
    by_new = engine.recommend(w.histories, k=5, beams=2, widen=8)
    assert np.abs(by_old.scores - by_new.scores).max() > 0.1
    engine.params, ran = old, []

    def swapping(*args):
        ran.append(engine.params is new)
        engine.params = new
        return original(*args)

    monkeypatch.setattr(programs, "recommend", swapping)
    futures = [engine.submit(h, k=5, beams=2, widen=8) for h in w.histories]
    for u, future in enumerate(futures):
        np.testing.assert_allclose(future.result(LONG).scores[0], by_old.scores[u], atol=1e-4)
    assert len(ran) > 1  # the swap came before the last program of the call
    engine.close()
