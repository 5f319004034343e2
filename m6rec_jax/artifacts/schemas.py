"""Names and versions of the contracts on disk (DESIGN section 3): what a `schema` and a `version` field may say."""

from __future__ import annotations

from typing import NamedTuple


class Schema(NamedTuple):
    """A kind of artefact and the version this code writes and reads."""

    name: str
    version: int


DATASET = Schema("dataset", 1)  # dataset/manifest.json
RUN = Schema("run", 1)  # run/run.json
CHECKPOINT = Schema("checkpoint", 2)  # run/checkpoints/<step>/manifest.json
GATE = Schema("gate", 4)  # run/gate.json
TUNED = Schema("tuned", 3)  # manifest.json of what `tune` writes
EXITS = Schema("exits", 1)  # exits.json: when rows may leave early
LISTS = Schema("lists", 1)  # manifest.json beside the parts that generate writes
EVALUATION = Schema("evaluation", 1)  # evaluate's report.json
COMPARISON = Schema("comparison", 1)  # compare's --out
BENCHMARK = Schema("benchmark", 1)  # benchmarks/*.json: {schema, commit, machine, rows}
