"""`m6rec plan`: compile a configuration's training step for hardware that is not here."""

from __future__ import annotations

import json
import os
from pathlib import Path

from m6rec_jax.artifacts.atomic import write_text
from m6rec_jax.errors import InputError
from m6rec_jax.settings import Parser, add_config_options, config_of
from m6rec_jax.topologies import known


def plan(argv: list[str]) -> None:
    """Print what a step takes on a topology and write plan.json; InputError when the step does not fit."""
    parser = Parser(
        prog="m6rec plan",
        usage="m6rec plan --config FILE --topology NAME [--out plan.json] [options]",
        description="Compile the training step of a configuration for devices that are not here: does it fit, what does "
        "it compute and send.\n\nexample:\n  m6rec plan --config base --topology tpu:v5e:4x4 --out plan.json",
    )
    parser.add_argument("--topology", required=True, metavar="NAME", help=f"known: {known()}")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="plan.json to write")
    parser.add_argument("--items", type=int, default=100_000, metavar="N", help="items in the catalogue")
    parser.add_argument("--text-vocab", type=int, default=32_000, metavar="N", help="text pieces")
    parser.add_argument("--content-width", type=int, default=128, metavar="N", help="features of an item")
    add_config_options(parser)
    options = parser.parse(argv)
    values = options.as_dict()  # `options.items` is a method
    items, pieces, content = sizes = [values[name] for name in ("items", "text_vocab", "content_width")]
    for name, size in zip(("items", "text-vocab", "content-width"), sizes, strict=True):
        if size < 1:
            raise InputError(f"--{name}={size}: must be at least 1")
    config = config_of(options)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the devices of this machine, if any, have no part in it

    from m6rec_jax.topologies import topology
    from m6rec_jax.training.plan.lower import blueprint_of, lower, settled
    from m6rec_jax.training.plan.report import plan_of, table

    at = topology(options.topology)
    config = settled(config, at.devices)
    blueprint = blueprint_of(config, items, pieces, content)
    made = lower(at, config, blueprint, items)
    figures, sent = plan_of(at, made, blueprint)
    told = table(at, made, blueprint, figures, sent, [items])
    print(told)
    if options.out is not None:
        write_text(options.out, json.dumps(figures, indent=2) + "\n")
    if not figures["fits"]:
        raise InputError(f"{options.topology}: {told.splitlines()[-1]}")
