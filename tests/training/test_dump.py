"""Where the arrays of the shipped configurations lie, held against files that are read in review.

After a change that is meant: `REWRITE_GOLDEN=1 python -m pytest tests/training/test_dump.py`, then look at the diff.
"""

import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from m6rec_jax.config import MeshConfig
from m6rec_jax.model.load import Blueprint
from m6rec_jax.settings import find_config, load_config
from m6rec_jax.training.dump import dump_shardings
from m6rec_jax.training.sharding import axis_sizes
from m6rec_jax.vocab import Vocab

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    "small-8": ("small", 8, {}),
    "base-16": ("base", 16, {}),
    "7b-64": ("7b", 64, {}),
    "7b-512-long": ("7b", 512, {"sequence": 4, "stage": 2}),
}


def dump(name, devices, axes):
    config = load_config([find_config(name)])
    mesh = MeshConfig(**{**asdict(config.mesh), **axes})
    vocab = Vocab(32_000, (100_000,))
    blueprint = Blueprint(config.model, vocab, 256)
    lines = dump_shardings(blueprint, replace(config, mesh=mesh), axis_sizes(mesh, devices), vocab.slices[1].padded)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("case", CASES)
def test_every_array_lies_where_the_golden_file_says(case):
    found, path = dump(*CASES[case]), GOLDEN / f"{case}.txt"
    if os.environ.get("REWRITE_GOLDEN"):
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8"), f"{path.name} says otherwise; how to write it anew: see above"
