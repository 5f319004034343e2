"""The locks: complete, hashed, free of places, and in step with pyproject.toml on every machine they are for."""

import shutil
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.locks import MACHINES, ROOT, brought_by, installed_on, read_lock

LOCKS = ("core", "all", "serve", "cuda", "tpu", "beam")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
GROUPS = PROJECT["dependency-groups"]
ASKED = {
    "core": PROJECT["project"]["dependencies"] + GROUPS["build"],
    "all": PROJECT["project"]["dependencies"] + GROUPS["build"] + [line for lines in EXTRAS.values() for line in lines],
    "serve": GROUPS["serving"],
    "cuda": PROJECT["project"]["dependencies"] + GROUPS["build"] + GROUPS["cuda"] + EXTRAS["kernels"],
    "tpu": PROJECT["project"]["dependencies"] + GROUPS["build"] + GROUPS["tpu"],
    "beam": GROUPS["beam"] + GROUPS["build"],
}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_hashes(lock):
    pins = read_lock(lock)
    assert pins
    assert not [pin.name for pin in pins if not pin.hashes]


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_what_the_project_asks_for(lock, machine):
    held = installed_on(lock, machine)
    for requirement in map(Requirement, ASKED[lock]):
        if requirement.marker is None or requirement.marker.evaluate(machine):
            version = held.get(canonicalize_name(requirement.name))
            assert version, f"{requirement} is not in {lock}.lock: make lock"
            assert requirement.specifier.contains(version), f"{lock}.lock has {version}, not {requirement}: make lock"


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_beam_brings_no_jax_and_prepares_with_the_same_packages(machine):
    """What decides a dataset's bytes has one version in both environments; numpy alone does Beam hold below 2.5."""
    beam, core = installed_on("beam", machine), installed_on("core", machine)
    assert not {"jax", "jaxlib", "flax", "grain"} & beam.keys()
    deciding = ("array-record", "ftfy", "msgpack", "polars", "scipy", "selectolax", "sentencepiece", "xxhash")
    assert {name: beam[name] for name in deciding} == {name: core[name] for name in deciding}


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("lock", ["core", "serve"])
def test_install_all_only_adds(lock, machine):
    everything = installed_on("all", machine)
    assert installed_on(lock, machine).items() <= everything.items()


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("lock", ["cuda", "tpu"])
def test_an_image_for_hardware_is_the_core_its_drivers_and_kernels(lock, machine):
    core, image = installed_on("core", machine), installed_on(lock, machine)
    assert core.items() <= image.items()
    drivers = {
        "cuda": ("nvidia-", "jax-cuda13-"),
        "tpu": ("libtpu", "requests", "urllib3", "certifi", "charset-", "idna"),
    }
    kernels = brought_by(lock, "tokamax")
    assert bool(kernels) == (lock == "cuda")
    assert not [name for name in set(image) - set(core) - kernels if not name.startswith(drivers[lock])]


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_heavy_frameworks_stay_out(machine):
    named = set(installed_on("all", machine))
    assert not named & {"torch", "tensorflow", "tensorflow-cpu", "keras", "triton"}
    assert not [name for name in named if name.startswith("nvidia-")]


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_the_serving_image_leaves_training_out(machine):
    left_out = {"grain", "tensorboardx", "matplotlib", "implicit", "pandas", "pyarrow", "libtpu"}
    assert not set(installed_on("serve", machine)) & left_out


@pytest.mark.parametrize(
    "line",
    [
        "# from https://packages.example.org/simple",
        "    # https://packages.example.org/simple/jax/",
        "--index-url packages.example.org",
        "-i packages.example.org",
        "--find-links /srv/wheels",
        "jax @ file:///srv/wheels/jax.whl",
    ],
)
def test_the_gate_refuses_a_lock_that_names_a_place(tmp_path, line):
    lock = tmp_path / "core.lock"
    shutil.copy(ROOT / "requirements/core.lock", lock)
    gate = ["make", "-s", "check-locks", f"LOCKS={lock}"]
    assert subprocess.run(gate, cwd=ROOT, check=False).returncode == 0
    with lock.open("a") as file:
        file.write(line + "\n")
    refused = subprocess.run(gate, cwd=ROOT, check=False, capture_output=True, text=True)
    assert refused.returncode != 0
    assert line in refused.stdout
