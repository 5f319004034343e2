"""`m6rec doctor`: what a bug report needs and nothing secret: versions, devices, memory, missing extras."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tomllib
from pathlib import Path

import m6rec_jax
from m6rec_jax.settings import Parser

DISTRIBUTION = "m6rec-jax"
VERSIONS = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "sentencepiece"),
    *("polars", "numpy", "scipy", "jsonargparse", "rich"),
)
EXTRA = r"""extra\s*==\s*['"]([^'"]+)"""  # the marker of a requirement that belongs to an extra
# What each extra that this version declares is for.
PURPOSE = {
    "aot": "compiling for TPUs and GPUs that are not here",
    "baselines": "nearest-neighbour search",
    "dev": "the tests and checks of this project",
    "eval": "cross-checking measures, scoring texts",
    "kernels": "fused attention kernels on GPU and TPU",
    "privacy": "differentially private training",
    "profile": "interest topics of users",
    "quant": "quantised models and LoRA",
    "serve": "the HTTP API and page",
    "sweep": "searching settings, locally or under Slurm",
    "text": "near-duplicates, Chinese variants, personal data in texts, sentence embeddings",
}


def doctor(argv: list[str]) -> None:
    """Print versions, devices, memory and extras to standard output."""
    Parser(
        prog="m6rec doctor",
        usage="m6rec doctor",
        description="Show versions, devices, memory and which extras are missing. Safe to paste into a report.\n\n"
        "example:\n  m6rec doctor",
    ).parse(argv)
    print(f"{'m6rec':<18}{m6rec_jax.__version__}")
    print(f"{'python':<18}{platform.python_version()} ({platform.system()} {platform.machine()})")
    for name in VERSIONS:
        print(f"{name:<18}{version(name) or 'missing: install m6rec_jax again'}")
    print()
    for line in (*machine(), *devices()):
        print(line)
    for extra, missing in missing_extras().items():
        what = f"missing {', '.join(missing)}" if missing else "installed"
        print(f"extra [{extra}]".ljust(18) + f" {what}; for {PURPOSE.get(extra, extra)}")


def version(distribution: str) -> str | None:
    """Installed version, None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> list[str]:
    """Processors, memory and free disk of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [f"{'cores':<18}{cores}"]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        lines.append(f"{'memory':<18}{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB")
    return [*lines, f"{'disk free here':<18}{shutil.disk_usage('.').free / 1e9:.1f} GB"]


def devices() -> list[str]:
    """A line for each kind of device that jax finds; one line that says why, where it finds none."""
    try:
        import jax

        found = jax.devices()
    except Exception as error:  # a broken driver is what a doctor is for
        return [f"{'devices':<18}none: {' '.join(str(error).split())[:200]}"]
    lines = []
    for kind in dict.fromkeys(d.device_kind for d in found):
        same = [d for d in found if d.device_kind == kind]
        limit = (same[0].memory_stats() or {}).get("bytes_limit")
        lines.append(f"{'devices':<18}{len(same)} x {kind} ({same[0].platform})" + (f", {limit / 1e9:.1f} GB each" if limit else ""))  # fmt: skip
    return lines


def missing_extras() -> dict[str, list[str]]:
    """Each declared extra with those of its packages that are not installed."""
    return {
        extra: [name for name in names if version(name) is None] for extra, names in sorted(declared_extras().items())
    }


def declared_extras() -> dict[str, list[str]]:
    """Extras and their packages: from the installed package, else from pyproject.toml beside it."""
    try:
        facts = importlib.metadata.metadata(DISTRIBUTION)
        extras = {extra: [] for extra in facts.get_all("Provides-Extra") or []}
        for requirement in facts.get_all("Requires-Dist") or []:
            marked = re.search(EXTRA, requirement)
            if marked:
                extras[marked[1]] += _packages(requirement)
        return extras
    except importlib.metadata.PackageNotFoundError:
        file = Path(m6rec_jax.__file__).resolve().parent.parent / "pyproject.toml"
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {}) if file.is_file() else {}
        extras = project.get("optional-dependencies", {})
        return {extra: [name for one in names for name in _packages(one)] for extra, names in extras.items()}


def _packages(requirement: str) -> list[str]:
    """Packages that a requirement asks for: itself, or those behind its own extras, as in `jax[tpu]`."""
    name = re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0]
    within = re.match(r"\s*\[([^]]*)\]", requirement.strip().removeprefix(name))
    wanted = {extra.strip() for extra in within[1].split(",")} if within else set()
    if not wanted or version(name) is None:
        return [name]
    found = []
    for inner in importlib.metadata.metadata(name).get_all("Requires-Dist") or []:
        marked = re.search(EXTRA, inner)
        if marked and marked[1] in wanted:
            found += _packages(inner)
    return found or [name]
