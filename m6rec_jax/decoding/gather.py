"""Requests that arrive one by one, answered together: a thread gathers those of one kind into a batch.

The first to wait decides when: a batch leaves `wait` seconds after it came, or earlier when it is full. Who waits in a
full queue would be answered too late anyway, so more are refused.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Generic, NamedTuple, TypeVar

Kind = TypeVar("Kind", bound=Hashable)
Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Busy(RuntimeError):
    """Too many requests wait already; ask again later."""


class _Waiting(NamedTuple):
    request: object
    future: Future
    since: float


class Gatherer(Generic[Kind, Request, Answer]):
    """`submit(kind, request)` gives a future of what `answer(kind, requests)` returns for it.

    `wait` seconds at most for company, `most` requests in a batch, `room` requests waiting. The thread lives while anybody
    waits, so that an idle queue holds nothing alive, and the interpreter ends after the last answer.
    """

    def __init__(self, answer: Callable[[Kind, list[Request]], Sequence[Answer]], *, wait: float = 0.003,
                 most: int = 32, room: int = 1024) -> None:  # fmt: skip
        self.wait, self.most, self.room = wait, most, room
        self._answer = answer
        self._kinds: dict[Kind, deque[_Waiting]] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, kind: Kind, request: Request) -> Future[Answer]:
        """Queue a request. An error of its own comes through the future and spoils no other.

        Raises Busy when `room` requests wait, RuntimeError after `close`.
        """
        future: Future[Answer] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("closed: no more requests are answered")
            if sum(map(len, self._kinds.values())) >= self.room:
                raise Busy(f"{self.room} requests wait already: ask again later, or give the queue more room")
            self._kinds.setdefault(kind, deque()).append(_Waiting(request, future, time.monotonic()))
            if self._thread is None:
                # No daemon: a thread inside a program must not outlive the interpreter.
                self._thread = threading.Thread(target=self._run, name="gatherer", daemon=False)
                self._thread.start()
            self._changed.notify()
        return future

    def close(self) -> None:
        """Take no more requests, answer those that wait, and return when the thread has ended."""
        with self._changed:
            self._closed, thread = True, self._thread
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():  # not from a future's callback
            thread.join()

    def _run(self) -> None:
        while batch := self._next():
            kind, waiting = batch
            self._attempt(kind, [one for one in waiting if one.future.set_running_or_notify_cancel()])

    def _next(self) -> tuple[Kind, list[_Waiting]] | None:
        """The batch of whoever waits longest, when it is time; None when nobody waits, and the thread is over."""
        with self._changed:
            if not self._kinds:
                self._thread = None
                return None
            kind = min(self._kinds, key=lambda kind: self._kinds[kind][0].since)
            queue = self._kinds[kind]
            leaves = queue[0].since + self.wait
            while len(queue) < self.most and not self._closed and (left := leaves - time.monotonic()) > 0:
                self._changed.wait(left)
            batch = [queue.popleft() for _ in range(min(self.most, len(queue)))]
            if not queue:
                del self._kinds[kind]
            return kind, batch

    def _attempt(self, kind: Kind, going: list[_Waiting]) -> None:
        """Answer a batch; when that fails, each of it alone."""
        try:
            answers = self._answer(kind, [one.request for one in going]) if going else []
            answered = list(zip(going, answers, strict=True))
        except BaseException as error:  # whatever it is, it must not end the thread: who waits would wait for ever
            if len(going) == 1:
                going[0].future.set_exception(error)
                return
            for one in going:
                self._attempt(kind, [one])
            return
        for one, answer in answered:
            one.future.set_result(answer)
