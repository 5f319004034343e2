"""The files of flags: every flag is explained, and exists in the jax and libtpu that are installed."""

import os
import platform
import re
import sys
from importlib.metadata import version

import pytest

from tests.launch.places import LAUNCH, run, settings

FILES = {"h100.env": "XLA_FLAGS", "tpu.env": "LIBTPU_INIT_ARGS"}
HERE = sys.version_info >= (3, 12) and (sys.platform, platform.machine()) == ("linux", "x86_64")
NEWEST = pytest.mark.skipif(
    not HERE, reason="the flags are of jax 0.12 (Python 3.12 and later) and libtpu (Linux, x86_64)"
)
TPU = (
    "from jax.experimental import topologies\n"
    "print(len(topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices), 'devices')"
)


def cpu(flags):
    """XLA has one parser for the flags of all its backends: a CPU tells whether a GPU's flag exists."""
    return run(
        sys.executable, "-c", "import jax; print(len(jax.devices()), 'devices')", env={**os.environ, "XLA_FLAGS": flags}
    )


def tpu(flags):
    """libtpu reads its flags when it is loaded, which needs no TPU; several processes of a machine may do so."""
    more = {"LIBTPU_INIT_ARGS": flags, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return run(sys.executable, "-c", TPU, env={**os.environ, **more})


@pytest.mark.parametrize("name", FILES)
def test_a_line_is_a_setting_or_a_comment(name):
    text = (LAUNCH / "env" / name).read_text(encoding="utf-8")
    for line in text.splitlines():
        assert re.fullmatch(r"|#( .*)?|[A-Z][A-Z0-9_]*=[^\s'\"$][^'\"$]*", line), line


@pytest.mark.parametrize("name", FILES)
def test_each_flag_says_what_it_does_and_when_it_was_seen(name):
    flags = [flag.split("=")[0] for flag in settings(name)[FILES[name]].split()]
    text = re.sub(r"\n#   ", " ", (LAUNCH / "env" / name).read_text(encoding="utf-8"))
    explained = re.findall(r"# (--\w+): (\S[^;]+); seen: ([\w.]+ [\d.]+)", text)
    assert [flag for flag, *_ in explained] == flags
    named = {"XLA_FLAGS": "jaxlib", "LIBTPU_INIT_ARGS": "libtpu"}[FILES[name]]
    assert {seen.split()[0] for *_, seen in explained} == {named}


@NEWEST
@pytest.mark.parametrize("name", FILES)
def test_the_versions_in_which_flags_were_seen_are_those_installed(name):
    if name == "tpu.env":
        pytest.importorskip("libtpu")
    seen = set(re.findall(r"seen: (jaxlib|libtpu) ([\d.]+)", (LAUNCH / "env" / name).read_text(encoding="utf-8")))
    assert seen and seen == {(package, version(package)) for package, _ in seen}


@NEWEST
def test_gpu_flags_exist():
    assert cpu(settings("h100.env")["XLA_FLAGS"]).returncode == 0
    unknown = cpu("--xla_gpu_enable_latency_hidden_scheduler=true")
    assert unknown.returncode != 0 and "Unknown flag" in unknown.stderr


@NEWEST
def test_tpu_flags_exist():
    pytest.importorskip("libtpu")
    known = tpu(settings("tpu.env")["LIBTPU_INIT_ARGS"])
    assert (known.returncode, known.stdout.strip()) == (0, "4 devices"), known.stderr
    unknown = tpu("--xla_tpu_enable_latency_hidden_scheduler=true")
    assert unknown.returncode != 0 and "Unknown command line flag" in unknown.stderr
