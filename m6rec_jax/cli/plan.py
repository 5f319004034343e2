"""`m6rec plan`: compile a configuration's training step for hardware that is not here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from m6rec_jax.artifacts.atomic import write_text
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.settings import Parser, add_config_options, config_of, load_config
from m6rec_jax.topologies import known


def plan(argv: list[str]) -> None:
    """Print what a step takes on a topology and write plan.json; InputError when the step does not fit."""
    options = _options(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the devices of this machine, if any, have no part in it

    from m6rec_jax.training.plan import calibrate, search
    from m6rec_jax.training.plan.lower import blueprint_of, lower, settled
    from m6rec_jax.training.plan.report import plan_of, table

    if options["calibration"]:
        print(calibrate.told())
        return
    if options["topology"] is None:
        raise InputError(f"--topology is missing; known: {known()}")

    from m6rec_jax.topologies import topology

    items = options["items"]
    at = topology(options["topology"])
    config = settled(options["made"], at.devices)
    blueprint = blueprint_of(config, items, options["text_vocab"], options["content_width"])
    teacher = None if options["teacher"] is None else load_config([options["teacher"]]).model
    tries, found = [config], []
    if options["search"]:
        found = search.candidates(at, config, blueprint, [items], teacher)
        print(search.told(found))
        tries = [one.config for one in found[: options["tries"]]]
    for config in tries:
        blueprint = blueprint_of(config, items, options["text_vocab"], options["content_width"])
        made = lower(at, config, blueprint, items, teacher)
        figures, sent = plan_of(at, made, blueprint)
        told = table(at, made, blueprint, figures, sent, [items])
        print(told, flush=True)
        if figures["fits"]:
            break
    if options["search"] and figures["fits"]:
        note(f"compiles and fits: {next(one.overrides for one in found if one.config == config)}")
    if options["out"] is not None:
        write_text(options["out"], json.dumps(figures, indent=2) + "\n")
    if not figures["fits"]:
        raise InputError(f"{at.name}: {told.splitlines()[-1]}")


def _options(argv: list[str]) -> dict[str, Any]:
    parser = Parser(
        prog="m6rec plan",
        usage="m6rec plan --config FILE --topology NAME [--out plan.json] [options]",
        description="Compile the training step of a configuration for devices that are not here: does it fit, what does "
        "it compute and send, how long will it take.\n\n"
        "example:\n  m6rec plan --config base --topology tpu:v5e:4x4 --out plan.json",
    )
    parser.add_argument("--topology", default=None, metavar="NAME", help=f"known: {known()}")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="plan.json to write")
    parser.add_argument("--items", type=int, default=100_000, metavar="N", help="items in the catalogue")
    parser.add_argument("--text-vocab", type=int, default=32_000, metavar="N", help="text pieces")
    parser.add_argument("--content-width", type=int, default=128, metavar="N", help="features of an item")
    parser.add_argument(
        "--teacher", default=None, metavar="FILE", help="configuration of the run that would teach this one"
    )
    parser.add_argument("--search", action="store_true", help="propose mesh, remat and rows, and compile the best")
    parser.add_argument("--tries", type=int, default=2, metavar="N", help="with --search: compile at most so many")
    parser.add_argument("--calibration", action="store_true", help="print the time model against published runs")
    add_config_options(parser)
    options = parser.parse(argv)
    values = options.as_dict()
    for name in ("items", "text_vocab", "content_width", "tries"):
        if values[name] < 1:
            raise InputError(f"--{name.replace('_', '-')}={values[name]}: must be at least 1")
    return {**values, "made": config_of(options)}
