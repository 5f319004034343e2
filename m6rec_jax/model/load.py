"""From parameters (a nested dict of arrays, as checkpoints hold them) to a model, inside or outside jit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx

from m6rec_jax.config import ModelConfig
from m6rec_jax.model import sharding
from m6rec_jax.model.transformer import Transformer
from m6rec_jax.vocab import OPTIONS, Vocab, domain_prefix

NONE = slice(0, 0)  # the options of no task


@dataclass(frozen=True)
class Blueprint:
    """A model without its parameters: hashable, made without allocating anything."""

    config: ModelConfig
    vocab: Vocab
    content_width: int
    more_widths: tuple[int, ...] = ()  # of content in the vocabulary's further domains

    def abstract(self) -> tuple[nnx.GraphDef, nnx.State]:
        """Graph and abstract state; every leaf carries its logical axes as `.axes`."""
        return nnx.split(nnx.eval_shape(lambda: self._make(nnx.Rngs(0))))

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
        """Fresh parameters, placed by the mesh in force; the same values on every mesh.

        The compiler cuts what is drawn: each device draws its shard, and none ever holds a whole weight.
        """

        def make(key: jax.Array) -> dict[str, Any]:
            return nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(key))))

        placed = jax.sharding.auto_axes(make, out_sharding=self.specs()) if sharding.has_mesh() else make
        return jax.jit(placed)(jax.random.key(seed))

    def domain(self, number: int, options: slice = NONE) -> Blueprint:
        """The model of one domain alone, as that of a run which never saw another; with the `options` of these tasks."""
        width = (self.content_width, *self.more_widths)[number]
        vocab = replace(self.vocab.domain(number), options=self.vocab.options[options])
        return Blueprint(self.config, vocab, width)

    def domain_params(self, params: dict[str, Any], number: int, options: slice = NONE) -> dict[str, Any]:
        """Of parameters of this model, those of `domain(number, options)`: text and layers, and what is its own."""
        if self.vocab.domains == 1 and self.vocab.options[options] == self.vocab.options:
            return params
        embeddings, prefix = params["embeddings"], domain_prefix(number)
        names = ["text", *(s.name for s in self.vocab.slices[1:] if s.domain == number and s.name != OPTIONS)]
        own: dict[str, Any] = {"tables": {n.removeprefix(prefix): embeddings["tables"][n] for n in names}}
        if sizes := self.vocab.options[options]:
            first, padded = (
                sum(self.vocab.options[: options.start]),
                self.domain(number, options).vocab.slices[-1].padded,
            )
            rows = np.asarray(embeddings["tables"][OPTIONS])[first : first + sum(sizes)]
            own["tables"][OPTIONS] = np.pad(rows, ((0, padded - len(rows)), (0, 0)))
        if self.config.content:
            own["content"] = embeddings["more_content"][f"{prefix}content"] if number else embeddings["content"]
        if self.config.embed:
            own["projection"] = embeddings["projection"]
        return {**params, "embeddings": own}

    def with_domain(self, params: dict[str, Any], number: int, own: dict[str, Any]) -> dict[str, Any]:
        """`params` of this model with those of `domain(number)` put in: what `domain_params` takes out."""
        if self.vocab.domains == 1 and not self.vocab.options:
            return own
        embeddings, prefix, new = params["embeddings"], domain_prefix(number), own["embeddings"]
        tables = {**embeddings["tables"], **{n if n == "text" else prefix + n: t for n, t in new["tables"].items()}}
        made = {**embeddings, "tables": tables} | {n: new[n] for n in ("projection",) if n in new}
        if self.config.content and number:
            made["more_content"] = {**embeddings["more_content"], f"{prefix}content": new["content"]}
        elif self.config.content:
            made["content"] = new["content"]
        return {**own, "embeddings": made}

    def _make(self, rngs: nnx.Rngs) -> Transformer:
        return Transformer(self.config, self.vocab, self.content_width, self.more_widths, rngs=rngs)
