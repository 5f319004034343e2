import sys

import pytest

from m6rec_jax import allocator


def test_glibc_takes_every_setting_and_elsewhere_nothing_is_asked(monkeypatch):
    allocator.keep_freed_memory.cache_clear()
    if sys.platform.startswith("linux"):
        import ctypes

        if not hasattr(ctypes.CDLL(None), "mallopt"):
            pytest.skip("no glibc")
        assert allocator.keep_freed_memory()
    allocator.keep_freed_memory.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()
    allocator.keep_freed_memory.cache_clear()
