"""What holds for all tests of launch/."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def interruptible() -> Iterator[None]:
    """Where the tests run in the background of a script, SIGINT is ignored, and so it would be by all that they start."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
