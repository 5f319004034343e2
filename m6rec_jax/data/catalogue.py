"""The catalogue: which items there are, in which row, and what the language objectives read of them."""

from __future__ import annotations

import numpy as np
import polars as pl
import xxhash

from m6rec_jax.data.features import NUMBER_PREFIX
from m6rec_jax.data.tokenizer import Tokenizer
from m6rec_jax.vocab import SEP

HOLD_OUT = 50  # one text in so many is held out of language training ...
LEAST_TEXTS = 50  # ... where there are at least this many
PLAIN = ("item_id", "title", "text", "categories", "attributes", "published", "type", "image", "audio", "video")


def lay_out(items: pl.DataFrame, before: pl.DataFrame | None = None) -> pl.DataFrame:
    """Items in catalogue order with a `listed` flag: those of `before` keep their rows, new ones follow.

    An item that is no longer in `items` keeps its row too (`listed` false); one whose new entry is empty keeps what was
    known. A catalogue that shares no item with `before` is laid out afresh.
    """
    items = items.select([c for c in items.columns if c in PLAIN or c.startswith(NUMBER_PREFIX)])
    fresh = items.with_columns(listed=pl.lit(True))
    if before is None or not (shared := items["item_id"].is_in(before["item_id"].implode())).any():
        return fresh
    before = before.select([c for c in before.columns if c in items.columns])
    bare = (pl.col("title") == "") & (pl.col("text") == "") & (pl.col("categories").list.len() == 0)
    known = pl.concat([items.filter(shared & ~items.select(bare).to_series()), before], how="diagonal_relaxed")
    known = before.select("item_id").join(known.unique("item_id", keep="first"), on="item_id", maintain_order="left")
    known = known.with_columns(listed=pl.col("item_id").is_in(items["item_id"].implode()))
    return pl.concat([known, fresh.filter(~shared)], how="diagonal_relaxed")


def held_out(keys: list[str], eligible: np.ndarray) -> np.ndarray:
    """[n] bool: about 2 % of the eligible texts, chosen by the hash of their key alone; none of a handful."""
    if eligible.sum() < LEAST_TEXTS:
        return np.zeros(len(keys), bool)
    chosen = np.fromiter((xxhash.xxh3_64_intdigest(k.encode()) % HOLD_OUT == 0 for k in keys), bool, len(keys))
    return chosen & eligible


def item_fields(items: pl.DataFrame) -> list[list[str]]:
    """The texts of an item by field: titles [C], categories, attributes, numbers in words, running texts; "" = none."""
    joined = items.select(
        pl.col("title").fill_null(""),
        pl.col("categories").list.join(", ").fill_null(""),
        pl.col("attributes").list.join("; ").fill_null(""),
        pl.col("numbers").list.join("; ").fill_null(""),
        pl.col("text").fill_null(""),
    )
    return [joined[c].to_list() for c in joined.columns]


def item_tokens(fields: list[list[str]], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Text tokens of each item: its title, then `<sep>` and a field, again and again; empty for an item without text."""
    coded = [tokenizer.encode_batch(texts) for texts in fields]
    made = []
    for title, *others in zip(*coded, strict=True):
        tokens = list(title)
        for other in others:
            if other:
                tokens.append(SEP)
                tokens += other
        made.append(np.array(tokens, np.int32))
    return made
