"""Recommending needs nothing beyond requirements/serve.lock."""

import importlib.util
import json
import pkgutil
import subprocess
import sys
from importlib.metadata import packages_distributions

from packaging.utils import canonicalize_name

import m6rec_jax.decoding
from tests.packaging.locks import installed_on

# Imports argv[2] while no top-level module named in argv[1] is to be found.
PROGRAM = """
import importlib, json, sys
from importlib.machinery import PathFinder

missing, find = set(json.loads(sys.argv[1])), PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in missing else find(name, *rest)
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)
"""


def test_decoding_and_recommend_import_nothing_else():
    held = {*installed_on("serve"), "m6rec-jax"}
    missing = [
        module
        for module, owners in packages_distributions().items()
        if not held & set(map(canonicalize_name, owners)) and not module.startswith("_")
    ]
    assert {"grain", "matplotlib"} <= set(missing)
    modules = [f"m6rec_jax.decoding.{module.name}" for module in pkgutil.iter_modules(m6rec_jax.decoding.__path__)]
    modules += ["m6rec_jax.recommend.recommender"]
    assert all(map(importlib.util.find_spec, modules))
    arguments = [json.dumps(missing), json.dumps(modules)]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
