import platform
import subprocess
import sys

import pytest

from m6rec_jax import allocator

# A thread takes and frees 80 MB six times; how many pages the kernel had to hand out after the first time.
PROGRAM = """
import resource, sys, threading
from m6rec_jax.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
faults = []
def work():
    for _ in range(6):
        len(bytearray(80 << 20))
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(faults[-1] - faults[0])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_a_buffer_that_comes_again_costs_no_new_pages():
    pages = {}
    for mode in ("kept", "as it is"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
        pages[mode] = int(done.stdout)
    assert pages["kept"] < 1000 or pages["kept"] < 0.1 * pages["as it is"]


def test_elsewhere_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    allocator.keep_freed_memory.cache_clear()
    assert not allocator.keep_freed_memory()
    allocator.keep_freed_memory.cache_clear()
