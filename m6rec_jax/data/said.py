"""What the language objectives read: texts of items and documents, and which of them are held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from m6rec_jax.data import catalogue
from m6rec_jax.data.records import DOCUMENT, ITEM, Record
from m6rec_jax.data.splits import SPLITS
from m6rec_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Said:
    """All text of items and documents, and which of it language training does not hear."""

    fields: list[list[str]]
    has_text: np.ndarray
    quiet_items: np.ndarray
    documents: list[str]
    quiet_documents: np.ndarray

    @classmethod
    def of(cls, items: pl.DataFrame, corpus: pl.DataFrame | None, quiet: np.ndarray | None = None) -> Said:
        """`quiet` [C]: items to be held out beside those that always are."""
        fields = catalogue.item_fields(items)
        has_text = np.array([any(parts) for parts in zip(*fields, strict=True)], bool)
        documents = corpus["text"].to_list() if corpus is not None else []
        quiet_documents = catalogue.held_out(documents, np.ones(len(documents), bool))
        quiet_items = catalogue.held_out(items["item_id"].to_list(), has_text)
        if quiet is not None:
            quiet_items |= quiet & has_text
        return cls(fields, has_text, quiet_items, documents, quiet_documents)

    def heard(self, attributes: Iterable[str], queries: Iterable[str]) -> Iterator[str]:
        """What the tokenizer may learn from: training items, documents and queries, and what is known of users."""
        for parts in self.fields:
            yield from (part for part, quiet in zip(parts, self.quiet_items, strict=True) if part and not quiet)
        yield from (text for text, quiet in zip(self.documents, self.quiet_documents, strict=True) if not quiet)
        yield from attributes
        yield from queries

    def records(self, tokenizer: Tokenizer) -> dict[str, list[Record]]:
        """ITEM and DOCUMENT records of train and valid, by row."""
        items = catalogue.item_tokens(self.fields, tokenizer)
        documents = [np.array(t, np.int32) for t in tokenizer.encode_batch(self.documents)]
        return {
            split: [
                *(Record(ITEM, r, tokens=items[r]) for r in np.flatnonzero(self.has_text & (self.quiet_items == quiet)).tolist()),
                *(Record(DOCUMENT, r, tokens=documents[r]) for r in np.flatnonzero(self.quiet_documents == quiet).tolist()),
            ]
            for split, quiet in (("train", False), ("valid", True))
        }  # fmt: skip


def texts_by_split(texts: dict[str, list[Record]]) -> list[list[Record]]:
    """Records of items and documents that follow the histories, by the number of the split."""
    return [texts.get(split, []) for split in SPLITS]
