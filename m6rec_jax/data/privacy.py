"""User ids as keyed hashes: applied right after reading, so that nothing written, logged or rejected holds a raw one.

Item ids stay as they are: they name products, and output has to be joined with the shop's own tables.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import polars as pl

from m6rec_jax.data.card import Card
from m6rec_jax.errors import InputError

MIN_KEY_BYTES = 16
HEX_DIGITS = 32  # 128 bits of HMAC-SHA256: no collision among any number of users there will be


def read_key(card: Card) -> bytes | None:
    """The key that the card names; None when ids are plain. Raises InputError when it is missing or too short."""
    if card.privacy.ids == "plain":
        return None
    path = Path(card.privacy.key)
    way_out = f"make one and keep it safe: (umask 077; head -c 32 /dev/urandom > {path})"
    if not path.is_file():
        raise InputError(f"{card.origin}: privacy.key: {path}: no such file; {way_out}")
    key = path.read_bytes()
    if len(key) < MIN_KEY_BYTES:
        raise InputError(f"{card.origin}: privacy.key: {path}: {len(key)} bytes, at least {MIN_KEY_BYTES} are needed; {way_out}")  # fmt: skip
    return key


def check_key_place(card: Card, out: Path | str) -> None:
    """Refuse a key file inside the dataset folder `out`: whoever gets the dataset would get the key with it."""
    if card.privacy.ids == "plain":
        return
    key, folder = Path(card.privacy.key).resolve(), Path(out).resolve()
    if key.is_relative_to(folder):
        raise InputError(f"{card.origin}: privacy.key: {key}: lies inside the dataset {folder}; move it out of there")


def key_mark(key: bytes) -> str:
    """What tells two keys apart and nothing else: a keyed hash that is no user's."""
    return hmac.digest(key, b"\0the mark of this key", hashlib.sha256).hex()[:HEX_DIGITS]


def hide_ids(frame: pl.DataFrame, key: bytes | None, column: str = "user_id") -> pl.DataFrame:
    """`frame` with each id of `column` replaced by the hex of its keyed hash; unchanged without a key."""
    if key is None or column not in frame.columns or frame.height == 0:
        return frame
    raw = frame[column].unique().drop_nulls()
    hidden = pl.Series([hide_id(one, key) for one in raw.to_list()], dtype=pl.String)
    return frame.with_columns(pl.col(column).replace_strict(raw, hidden, default=None, return_dtype=pl.String))


def hide_id(raw: str, key: bytes) -> str:
    """The keyed hash of one id: 32 hex digits of HMAC-SHA256, the same for the same key wherever it appears."""
    return hmac.digest(key, raw.encode("utf-8"), hashlib.sha256).hex()[:HEX_DIGITS]
