"""Where an engine's arrays lie: on one device, or users spread over several with everything else on each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from m6rec_jax.decoding import programs
from m6rec_jax.model.sharding import BATCH, spec


class Devices:
    """Some devices of this process; None or one: wherever jax puts things.

    With several, they make a `mesh`, and what is `run` runs on all of them, each for its own users. Rows of such a batch
    are a multiple of `count`.
    """

    def __init__(self, devices: Sequence[jax.Device] | None) -> None:
        several = devices is not None and len(devices) > 1
        self.count = len(devices) if several else 1
        self.one = devices[0] if several else None  # where programs run that are not spread
        shape = (self.count, *(1 for _ in BATCH[1:]))
        self.mesh = Mesh(np.array(devices).reshape(shape), BATCH, (AxisType.Auto,) * len(BATCH)) if several else None

    def everywhere(self, tree: Any) -> Any:
        """The arrays on every device."""
        return jax.device_put(tree) if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, spec()))

    def spread(self, tree: Any) -> Any:
        """Arrays `[B, ...]` cut into as many lots of rows as there are devices."""
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, spec("batch")))

    def run(self, program: Callable[..., Any], static: tuple, shared: tuple, own: tuple) -> Any:
        """`program(*static, *shared, *own)`, one of `programs`: `shared` lies everywhere, `own` are arrays `[B, ...]`."""
        if self.mesh is None:
            return program(*static, *shared, *own)
        return programs.spread(program, static, self.mesh, shared, self.spread(own))

    def first(self, tree: Any) -> Any:
        """What lies everywhere as the first device has it, not copied: for programs that run there alone."""
        return tree if self.mesh is None else jax.tree.map(lambda x: x.addressable_data(0), tree)
