"""Token tables and the item encoder: what a token, and a whole item, look like to the model (DESIGN section 5)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m6rec_jax.config import ModelConfig
from m6rec_jax.model import sharding
from m6rec_jax.model.layers import keep_mask, weight
from m6rec_jax.vocab import PAD_MULTIPLE, Vocab


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


ITEM_AXES = ItemTable(content=("vocab", None), seen=("vocab",))


class Embeddings(nnx.Module):
    """One table a vocabulary slice, tied between input and output, and the projection of item content.

    With one code level (atomic) an item is id part + content part on both sides. The id part of an unseen item
    is zero, so it is ranked by its content alone; in training id parts are dropped at random to keep that honest.
    """

    def __init__(self, config: ModelConfig, vocab: Vocab, content_width: int, *, rngs: nnx.Rngs):
        self.config, self.vocab = config, vocab
        std = config.width**-0.5
        self.tables = nnx.Dict(
            {s.name: weight(rngs, (s.padded, config.width), ("vocab", "embed"), std) for s in vocab.slices}
        )
        self.content = weight(rngs, (content_width, config.width), (None, "embed"), std) if config.content else None

    @property
    def atomic(self) -> bool:
        return len(self.vocab.levels) == 1

    def read(
        self, tokens: Int[Array, "B *T"], item_rows: Int[Array, "B *T"], items: ItemTable, key: jax.Array | None
    ) -> Float[Array, "B *T D"]:
        """Input vectors: the token's row, plus the item's projected content where `item_rows >= 0`."""
        rest = (None,) * (tokens.ndim - 1)
        id_kept = jnp.ones(tokens.shape, bool)
        if key is not None and self.config.id_dropout > 0:
            id_kept = keep_mask(key, tokens.shape, round(self.config.id_dropout * 256), "batch", *rest)
            id_kept = id_kept | (item_rows < 0)

        def look_up(tables, content, items, tokens, item_rows, id_kept):
            x = 0.0
            for s, table in zip(self.vocab.slices, tables, strict=True):
                if self.atomic and s is self.vocab.levels[0] and content is not None:
                    table = jnp.where(_rows_like(items.seen, table)[:, None], table, 0)
                x = x + _local_rows(table, tokens - s.offset)
            x = jnp.where(id_kept[..., None], x, 0)
            if content is not None:
                x = x + _local_rows(items.content, item_rows) @ content
            return sharding.psum(x, sharding.TENSOR)

        row = ("batch", *rest)
        axes = ([("vocab", None)] * len(self.tables), (None, None) if self.config.content else None, ITEM_AXES)
        return sharding.per_shard(look_up, (*axes, row, row, row), (*row, None))(
            [self.tables[s.name][...] for s in self.vocab.slices], self._content(), items, tokens, item_rows, id_kept
        )

    def table(self, slice_index: int, items: ItemTable, key: jax.Array | None = None) -> Float[Array, "V D"]:
        """The output table of a slice: its rows, and for atomic items their content as well."""
        table = sharding.gather_weight(self.tables[self.vocab.slices[slice_index].name][...], "vocab", "embed")
        if not (self.atomic and slice_index == 1 and self.config.content):
            return table
        kept = _rows_like(items.seen, table)
        if key is not None and self.config.id_dropout > 0:
            kept = kept & keep_mask(key, kept.shape, round(self.config.id_dropout * 256), "vocab")
        content = jnp.einsum(
            "vc,cd->vd", sharding.place(items.content, "vocab", None), self._content(), out_sharding=sharding.out("vocab", None)
        )  # fmt: skip
        return jnp.where(kept[:, None], table, 0) + content[: table.shape[0]]

    def _content(self) -> Array | None:
        return None if self.content is None else sharding.gather_weight(self.content[...], None, "embed")


def _rows_like(seen: Array, table: Array) -> Array:
    return seen[: table.shape[0]]


def _local_rows(table: Float[Array, "V D"], rows: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    """Rows of this device's shard of a table; zeros for rows held elsewhere or out of range."""
    local = rows - sharding.tensor_index() * table.shape[0]
    inside = (local >= 0) & (local < table.shape[0])
    return jnp.where(inside[..., None], table[jnp.where(inside, local, 0)], 0)
