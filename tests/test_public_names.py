"""`import m6rec_jax` is light; what it offers is there when asked for."""

import subprocess
import sys

import pytest

import m6rec_jax


def test_importing_the_package_loads_nothing_heavy_and_the_names_resolve_afterwards():
    code = (
        "import sys, m6rec_jax\n"
        "print([name for name in ('jax', 'numpy', 'polars', 'flax') if name in sys.modules])\n"
        "from m6rec_jax import Recommender, prepare\n"
        "print(Recommender.__module__, prepare.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["[]", "m6rec_jax.recommend.recommender m6rec_jax.data.prepare"]


def test_every_public_name_resolves_and_others_do_not():
    assert {"prepare", "Recommender", "__version__"} <= set(m6rec_jax.__all__) <= set(dir(m6rec_jax))
    assert callable(m6rec_jax.prepare) and callable(m6rec_jax.Recommender.load)
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        m6rec_jax.train  # noqa: B018
