"""From parameters (a nested dict of arrays, as checkpoints hold them) to a model, inside or outside jit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from m6rec_jax.config import ModelConfig
from m6rec_jax.model import sharding
from m6rec_jax.model.transformer import Transformer
from m6rec_jax.vocab import Vocab


@dataclass(frozen=True)
class Blueprint:
    """A model without its parameters: hashable, made without allocating anything."""

    config: ModelConfig
    vocab: Vocab
    content_width: int

    def abstract(self) -> tuple[nnx.GraphDef, nnx.State]:
        """Graph and abstract state; every leaf carries its logical axes as `.axes`."""
        make = lambda: Transformer(self.config, self.vocab, self.content_width, rngs=nnx.Rngs(0))  # noqa: E731
        return nnx.split(nnx.eval_shape(make))

    def shapes(self) -> dict[str, Any]:
        """Nested dict of ShapeDtypeStruct, the tree that checkpoints hold."""
        return nnx.to_pure_dict(self.abstract()[1])

    def specs(self) -> dict[str, Any]:
        """Nested dict of PartitionSpec, from each parameter's logical axes."""
        state = self.abstract()[1]
        axes = jax.tree.map(lambda v: sharding.spec(*v.axes), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
        return nnx.to_pure_dict(axes)

    def parameters(self) -> int:
        """How many parameters the model has."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes()))

    def bind(self, params: dict[str, Any]) -> Transformer:
        """The model with these parameters; cheap enough to call inside a jitted function."""
        graph, state = self.abstract()
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def init(self, seed: int) -> dict[str, Any]:
        """Fresh parameters, placed by the mesh in force; the same values on every mesh."""

        def make(key: jax.Array) -> dict[str, Any]:
            model = Transformer(self.config, self.vocab, self.content_width, rngs=nnx.Rngs(key))
            params = nnx.to_pure_dict(nnx.state(model))
            return jax.tree.map(jax.sharding.reshard, params, self.specs()) if sharding.has_mesh() else params

        return jax.jit(make)(jax.random.key(seed))
