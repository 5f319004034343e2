"""What must be settled before jax is imported: CPU only, and how many devices it shows.

tests/multidevice needs eight fake devices and every other test one. That is a property of a process, so
`pytest tests/multidevice` is a run of its own and other runs leave that folder out.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

APART = Path(__file__).parent / "multidevice"
MARKED = ("multidevice", "multiprocess")

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile far more than they compute: half the time goes when the compiler does not try hard.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; pools of threads in each only get in the way
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"):
        os.environ.setdefault(name, "1")

# No deadline: a busy machine is not a failure. In CI, hypothesis takes the same examples every time.
hypothesis.settings.register_profile("no-deadline", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("no-deadline")


# A compiled program holds some ten mappings of memory, of which Linux allows a process 65,530 unless told otherwise; past
# that the compiler dies of a segmentation fault. A worker that has made very many lets go of them between modules.
MOST_MAPPINGS = 25_000


@pytest.fixture(autouse=True, scope="module")
def few_mappings() -> Iterator[None]:
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.is_file() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        sys.modules["jax"].clear_caches()
        gc.collect()


def _apart(config: pytest.Config) -> bool:
    paths = [Path(arg.partition("::")[0]).resolve() for arg in config.args]
    return all(path.is_relative_to(APART) for path in paths)


def pytest_configure(config: pytest.Config) -> None:
    if _apart(config):
        os.environ["JAX_NUM_CPU_DEVICES"] = "8"
        # Eight devices on few cores: a collective whose threads come late is not stuck (after 40 seconds the process would
        # be aborted), and programs that are dispatched one at a time never take each other's threads.
        os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
        os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=150"


def pytest_report_header(config: pytest.Config) -> str:
    return "eight fake devices" if _apart(config) else "one device; not in this run: tests/multidevice"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path == APART and not _apart(config) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(APART) and not _apart(config):
            raise pytest.UsageError("tests/multidevice needs a process of its own: pytest tests/multidevice")
        for name in MARKED:
            if name in item.path.parts:
                item.add_marker(name)
