"""Worlds as fixtures."""

from __future__ import annotations

import pytest

from tests.decoding.worlds import World, world


@pytest.fixture(params=[1, 3], ids=["L1", "L3"])
def any_world(request) -> World:
    return world(request.param)


@pytest.fixture
def deep() -> World:
    return world(3)
