"""Token tables and the item encoder: what a token, and a whole item, look like to the model (DESIGN section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m6rec_jax.config import ModelConfig
from m6rec_jax.model import sharding
from m6rec_jax.model.layers import keep_mask, weight
from m6rec_jax.model.products import product
from m6rec_jax.model.quantised import dense
from m6rec_jax.vocab import PAD_MULTIPLE, Vocab, domain_prefix


class ItemTable(NamedTuple):
    """Frozen facts of the catalogue, padded to a multiple of 128 rows; arguments of every program, never parameters.

    `content [C, Dc]` float32 features; `seen [C]` whether an item occurs in the training events.
    """

    content: Float[Array, "C Dc"]
    seen: Bool[Array, " C"]


def item_table(content: np.ndarray, seen: np.ndarray) -> ItemTable:
    """Pad to the vocabulary's multiple of 128; spare rows have no content and are not seen."""
    spare = -len(content) % PAD_MULTIPLE
    return ItemTable(
        np.pad(np.asarray(content, np.float32), ((0, spare), (0, 0))), np.pad(np.asarray(seen, bool), (0, spare))
    )


class OutputTable(NamedTuple):
    """An output table in parts, whose row i is `ids[i] + content[i] @ projection`; the last two are None without content.

    Who scores a few rows only need not project all.
    """

    ids: Float[Array, "V E"]
    content: Float[Array, "V Dc"] | None = None
    projection: Float[Array, "Dc E"] | None = None

    def astype(self, dtype: Any) -> OutputTable:
        return jax.tree.map(lambda x: x.astype(dtype), self)

    @property
    def axes(self) -> OutputTable:
        """Logical axes of the parts."""
        there = self.content is not None
        return OutputTable(("vocab", None), ("vocab", None) if there else None, (None, None) if there else None)


# Letters and logical axes of what stands before the last axis of rows, of beams, and of states alone.
_LEAD = {1: ("n", ("batch",)), 2: ("bt", ("batch", "position")), 3: ("bmt", ("batch", None, None))}
ITEM_AXES = ItemTable(content=("vocab", None), seen=("vocab",))
# Facts of one catalogue or, of several domains, of each in order; item rows count through them all, spare rows included.
Catalogues = ItemTable | tuple[ItemTable, ...]


def catalogues(items: Catalogues) -> list[ItemTable]:
    """The facts of each domain."""
    return [items] if isinstance(items, ItemTable) else list(items)


class Embeddings(nnx.Module):
    """One table a vocabulary slice, tied between input and output, and a projection of item content a domain.

    With one code level (atomic) an item is id part + content part on both sides. The id part of an unseen item
    is zero, so it is ranked by its content alone; in training id parts are dropped at random to keep that honest.
    With `model.embed` rows are E long and one matrix `[E, D]` turns them into the width, and states back into theirs, its
    transpose (factorised embeddings, Lan et al. 2020, tied).
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab: Vocab,
        content_width: int,
        more_widths: tuple[int, ...] = (),
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.vocab = config, vocab
        E = config.table_width
        std = E**-0.5
        self.tables = nnx.Dict({s.name: weight(rngs, (s.padded, E), ("vocab", "embed"), std) for s in vocab.slices})
        project = lambda width: weight(rngs, (width, E), (None, "embed"), std)  # noqa: E731
        self.content = project(content_width) if config.content else None
        if config.content and more_widths:
            self.more_content = nnx.Dict(
                {f"{domain_prefix(i)}content": project(w) for i, w in enumerate(more_widths, 1)}
            )
        if config.embed:
            self.projection = weight(rngs, (E, config.width), (None, "embed"), config.width**-0.5)

    def read(
        self, tokens: Int[Array, "B *T"], item_rows: Int[Array, "B *T"], items: Catalogues, key: jax.Array | None
    ) -> Float[Array, "B *T D"]:
        """Input vectors: the token's row, plus the item's projected content where `item_rows >= 0`."""
        rest = ("position",) if tokens.ndim == 2 else (None,) * (tokens.ndim - 1)
        id_kept = jnp.ones(tokens.shape, bool)
        if key is not None and self.config.id_dropout > 0:
            id_kept = keep_mask(key, tokens.shape, round(self.config.id_dropout * 256), "batch", *rest)
            id_kept = id_kept | (item_rows < 0)

        facts = catalogues(items)
        first_rows = [sum(len(t.seen) for t in facts[:i]) for i in range(len(facts))]

        def look_up(tables, contents, facts, tokens, item_rows, id_kept):
            x = 0.0
            for s, table in zip(self.vocab.slices, tables, strict=True):
                if s.atomic and contents:
                    table = jnp.where(_rows_like(facts[s.domain].seen, table)[:, None], table, 0)
                x = x + _local_rows(table, tokens - s.offset)
            x = jnp.where(id_kept[..., None], x, 0)
            if contents:
                for content, domain, first in zip(contents, facts, first_rows, strict=True):
                    x = x + _local_rows(domain.content, item_rows - first) @ content
            return sharding.psum(x, sharding.TENSOR)

        row, contents = ("batch", *rest), self._contents()
        axes = ([("vocab", None)] * len(self.tables), [(None, None)] * len(contents), [ITEM_AXES] * len(facts))
        x = sharding.per_shard(look_up, (*axes, row, row, row), (*row, None))(
            [dense(self.tables[s.name][...]) for s in self.vocab.slices], contents, facts, tokens, item_rows, id_kept
        )
        return self._turned(x, "e", "d")

    def narrowed(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n E"]:
        """States as the tables' rows are multiplied with: as they are, or through the transpose of the projection."""
        return self._turned(hidden, "d", "e")

    def _turned(self, x: Float[Array, "*n i"], of: str, to: str) -> Float[Array, "*n o"]:
        if not self.config.embed:
            return x
        lead, axes = _LEAD[x.ndim - 1]
        dtype = jnp.dtype(self.config.dtype)
        matrix = sharding.gather_weight(self.projection[...], None, "embed").astype(dtype)
        return product(f"{lead}{of},ed->{lead}{to}", x.astype(dtype), matrix, sharding.out(*axes, None))

    def table(self, slice_index: int, items: Catalogues, key: jax.Array | None = None) -> Float[Array, "V E"]:
        """The output table of a slice: its rows, and for atomic items their content as well."""
        parts = self.table_parts(slice_index, items, key)
        if parts.content is None:
            return parts.ids
        content = jnp.einsum("vc,cd->vd", parts.content, parts.projection, out_sharding=sharding.out("vocab", None))
        return parts.ids + content

    def table_parts(self, slice_index: int, items: Catalogues, key: jax.Array | None = None) -> OutputTable:
        """`table` before the content is projected."""
        s = self.vocab.slices[slice_index]
        table = sharding.gather_weight(dense(self.tables[s.name][...]), "vocab", "embed")
        if not (s.atomic and self.config.content):
            return OutputTable(table)
        facts = catalogues(items)[s.domain]
        kept = _rows_like(facts.seen, table)
        if key is not None and self.config.id_dropout > 0:
            kept = kept & keep_mask(key, kept.shape, round(self.config.id_dropout * 256), "vocab")
        content = sharding.place(facts.content, "vocab", None)[: table.shape[0]]
        return OutputTable(jnp.where(kept[:, None], table, 0), content, self._contents()[s.domain])

    def _contents(self) -> list[Array]:
        """The projection of each domain, ready for use; none when content is off."""
        if self.content is None:
            return []
        more = [self.more_content[f"{domain_prefix(i)}content"] for i in range(1, self.vocab.domains)]
        return [sharding.gather_weight(matrix[...], None, "embed") for matrix in (self.content, *more)]


def widened(embeddings: Mapping[str, Any], rows: Array) -> Array:
    """Rows `[n, E]` of a table as the residual stream has them `[n, D]`: as they are, or through the projection."""
    return rows @ embeddings["projection"] if "projection" in embeddings else rows


def _rows_like(seen: Array, table: Array) -> Array:
    return seen[: table.shape[0]]


def _local_rows(table: Float[Array, "V D"], rows: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    """Rows of this device's shard of a table; zeros for rows held elsewhere or out of range."""
    local = rows - sharding.tensor_index() * table.shape[0]
    inside = (local >= 0) & (local < table.shape[0])
    return jnp.where(inside[..., None], table[jnp.where(inside, local, 0)], 0)
