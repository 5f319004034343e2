"""Texts written in slots by a thread: whoever asks joins those that are being written, a few tokens at a time.

Between two rounds of the device the thread looks at what came: it cuts at stop strings, gives out what is final, and
fills the slots of texts that ended with those that wait, first come, first served.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple

import jax
import numpy as np

from m6rec_jax.config import ModelConfig
from m6rec_jax.decoding import programs
from m6rec_jax.decoding.gather import Busy
from m6rec_jax.decoding.shapes import pad, prefix_width
from m6rec_jax.decoding.slots import Slots, empty
from m6rec_jax.decoding.texts import Desk, Finish, Spool, Text, TextRequest
from m6rec_jax.model.items import ItemTable
from m6rec_jax.vocab import EOS, ITEM

SLOTS = 8
STEPS = 8  # tokens between two looks: fewer waste less behind a stop string, more look less often

OnText = Callable[[str], None]


class Checkpoint(NamedTuple):
    """What one text is written with, from its first token to its last; `version` tells the parameters from all others."""

    version: Hashable
    params: Any
    items: ItemTable


@dataclass(frozen=True)
class _Job:
    request: TextRequest
    checkpoint: Checkpoint
    future: Future[Text]
    on_text: OnText | None
    spool: Spool


class Writer:
    """`slots` texts at a time, `steps` tokens a round; at most `room` wait.

    Texts of one checkpoint share the slots; another checkpoint waits until they have ended. The thread lives while
    there is something to write. A future that is cancelled gives up its slot.
    """

    def __init__(self, define: Any, config: ModelConfig, desk: Desk, *, slots: int = SLOTS, steps: int = STEPS,
                 room: int = 1024) -> None:  # fmt: skip
        self.desk, self.steps, self.room = desk, steps, room
        self._define, self._config = define, config
        self._lock = threading.Lock()  # over the waiting, the thread and `_closed`; the slots are the thread's alone
        self._waiting: deque[_Job] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._jobs: list[_Job | None] = [None] * slots
        self._slots: Slots | None = None  # on the device, made when first needed

    def submit(self, requests: Sequence[TextRequest], checkpoint: Checkpoint, on_text: Sequence[OnText | None]) -> list[Future[Text]]:  # fmt: skip
        """A future for each text; `on_text` is called by the thread with each piece that became final.

        Raises Busy when others wait and the requests would make it more than `room`, RuntimeError after `close`.
        """
        jobs = [
            _Job(request, checkpoint, Future(), on_piece, Spool(self.desk.tokenizer, request.stop))
            for request, on_piece in zip(requests, on_text, strict=True)
        ]
        with self._lock:
            if self._closed:
                raise RuntimeError("closed: no more texts are written")
            if self._waiting and len(self._waiting) + len(jobs) > self.room:
                raise Busy(f"{len(self._waiting)} texts wait already: ask again later, or give `room` more than {self.room}")  # fmt: skip
            self._waiting += jobs
            if self._thread is None and jobs:
                self._thread = threading.Thread(target=self._run, name="writer", daemon=False)
                self._thread.start()
        return [job.future for job in jobs]

    def write(self, requests: Sequence[TextRequest], checkpoint: Checkpoint, on_text: Callable[[int, str], None] | None) -> list[Text]:  # fmt: skip
        """Wait for the texts; `on_text(i, piece)` says whose piece it is."""
        self._elsewhere()
        tell = [None if on_text is None else lambda piece, i=i: on_text(i, piece) for i in range(len(requests))]
        futures = self.submit(requests, checkpoint, tell)
        try:
            return [future.result() for future in futures]
        finally:  # after an error nobody waits for the others
            for future in futures:
                future.cancel()

    def stream(self, request: TextRequest, checkpoint: Checkpoint) -> Iterator[str]:
        """The pieces of one text; whoever closes the iterator ends the text."""
        self._elsewhere()
        said: SimpleQueue[str | None] = SimpleQueue()
        [future] = self.submit([request], checkpoint, [said.put])
        future.add_done_callback(lambda _: said.put(None))

        def pieces() -> Iterator[str]:
            try:
                while (piece := said.get()) is not None:
                    yield piece
                future.result()  # an error, if there was one
            finally:
                future.cancel()

        made = pieces()
        weakref.finalize(made, future.cancel)  # closed before its first piece, it never comes to `finally`
        return made

    def close(self) -> None:
        """Write what was asked for, take no more, and return when the thread has ended."""
        with self._lock:
            self._closed, thread = True, self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _elsewhere(self) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "on_text cannot wait for a text: it is called by the thread that writes them; use submit"
            )

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                fresh = self._admit()
                if not any(self._jobs):
                    self._thread = None
                    return
            try:
                new, ended = self._round(fresh)
                for slot in self._busy():
                    self._read(slot, new[slot], int(ended[slot]))
            except BaseException as error:  # whatever it is, who waits must hear of it, and the next ones be answered
                self._slots = None  # it was given to the program that failed
                for slot in self._busy():
                    self._leave(slot, error)

    def _busy(self) -> list[int]:
        return [slot for slot, job in enumerate(self._jobs) if job is not None]

    def _admit(self) -> list[int]:
        """Give free slots to those who wait; which ones."""
        fresh, free = [], [slot for slot, job in enumerate(self._jobs) if job is None]
        running = next((job.checkpoint.version for job in self._jobs if job is not None), None)
        while self._waiting and free:
            job = self._waiting[0]
            if running not in (None, job.checkpoint.version):
                break
            self._waiting.popleft()
            if job.future.cancelled():
                job.future.set_running_or_notify_cancel()  # who waits for several futures hears of it
                continue
            running = job.checkpoint.version
            fresh.append(free.pop(0))
            self._jobs[fresh[-1]] = job
        return fresh

    def _round(self, fresh: list[int]) -> tuple[list[list[int]], np.ndarray]:
        """Read the prompts of the `fresh` slots, then write on in all: new tokens a slot, and what ended each."""
        jobs = [job for job in self._jobs if job is not None]
        _, params, items = jobs[0].checkpoint
        if self._slots is None:
            self._slots = empty(self._config, self.desk.vocab, len(self._jobs), prefix_width(self.desk.length))
        for slot in fresh:
            job = self._jobs[slot]
            assert job is not None
            request = job.request
            prompt = pad([(request.tokens, request.item_rows)], 1, prefix_width(len(request.tokens)))
            self._slots = programs.begin_text(
                self._define, params, items, self._slots, np.int32(slot), *prompt, request.sampling()
            )
        alive = np.array([job is not None for job in self._jobs])
        self._slots, out, written, ended = programs.advance_texts(
            self._define, self.steps, params, items, self._slots, alive
        )
        out, written, ended = jax.device_get((out, written, ended))
        return [tokens[:n].tolist() for tokens, n in zip(out, written, strict=True)], ended

    def _read(self, slot: int, new: list[int], ended: int) -> None:
        """What a round brought to a slot; `ended`: the token that ended it, 0 for none."""
        job = self._jobs[slot]
        assert job is not None
        if job.future.cancelled():
            return self._leave(slot, None)
        spool = job.spool
        for token in new:
            spool.add(token)
            if spool.stopped:
                break
        full = len(spool.tokens) >= job.request.limit
        ends: dict[int, Finish] = {EOS: "end", ITEM: "item"}
        finish = "stop" if spool.stopped else ends.get(ended) or ("length" if full else None)
        try:
            piece = spool.take(finish is not None)
            if piece and job.on_text is not None:
                job.on_text(piece)
        except BaseException as error:  # of whoever asked, and nobody else's
            return self._leave(slot, error)
        if finish is not None:
            self._leave(slot, Text(spool.text, tuple(spool.tokens), finish))

    def _leave(self, slot: int, outcome: Text | BaseException | None) -> None:
        """Free a slot and tell who asked, unless it was cancelled."""
        job, self._jobs[slot] = self._jobs[slot], None
        assert job is not None
        if not job.future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Text):
            job.future.set_result(outcome)
        elif outcome is not None:
            job.future.set_exception(outcome)
