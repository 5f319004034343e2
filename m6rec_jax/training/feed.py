"""The batches of a run from a position on, and what is kept of one that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import numpy as np

from m6rec_jax.config import DataConfig
from m6rec_jax.data.packing import ROW_ARRAYS
from m6rec_jax.errors import InputError
from m6rec_jax.training.checkpoint import Position
from m6rec_jax.training.guards import Rewind, past_holes

Batches = Callable[[Position, int, list[Rewind]], Iterator[dict[str, np.ndarray]]]  # from there, after that step


class Feed:
    """Batches from a position on, the rows of `rewinds` left out; `row`: the plan row that the batch last pulled begins with."""

    def __init__(self, config: DataConfig, batches: Batches, position: Position, step: int, rewinds: list[Rewind]):
        self.config = config
        self.fault: InputError | None = None
        self.row = -1
        self._rewinds, self._next = rewinds, position.rows
        self._batches = batches(position, step, rewinds)

    def pull(self) -> dict[str, np.ndarray]:
        """The next batch. Of several processes, what one cannot read is kept as `fault`, and an empty batch given: the
        step that the others take is taken, and then all stop together. Raises InputError where there is one process."""
        self.row = past_holes(self._next, self._rewinds)
        self._next = self.row + self.config.rows
        try:
            return next(self._batches)
        except InputError as error:
            if jax.process_count() == 1:
                raise
            self.fault = error
            shape = (self.config.rows // jax.process_count(), self.config.length)
            return {name: np.zeros(shape, kind) for name, kind in ROW_ARRAYS.items()}
